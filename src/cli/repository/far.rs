//! A revert of a snapshot that is still in its repository.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::{RepositoryArgs, blocking};
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::cli::parse_rate;
use crate::far::{CacheOptions, FarOptions, FarSnapshot};

/// Where the snapshot is, and what is kept of it here.
#[derive(Args, Clone)]
pub(in crate::cli) struct FarArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Keep what is fetched from a repository there
    /// [default: $XDG_CACHE_HOME/snapback, or ~/.cache/snapback]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Keep at most this much, in bytes (suffixes K, M, G: powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "16G", value_parser = parse_rate)]
    cache_size: u64,
}

impl FarArgs {
    /// The snapshot of this name, in the repository that is named with it or beside it.
    pub async fn open_in_repository(
        &self,
        name: &Path,
        output: &Arc<Output>,
    ) -> Result<FarSnapshot, Failure> {
        let mut args = self.clone();
        if !name.to_string_lossy().contains("://") {
            args.repository.repo = Some(args.repository.named()?);
        }
        let missing = || unreachable!("a repository is named");
        Ok(args.open(name, output).await?.unwrap_or_else(missing))
    }

    /// The snapshot, where the argument names one of a repository: behind the repository's address, or
    /// by itself where `--repo` is given.
    pub async fn open(
        &self,
        image: &Path,
        output: &Arc<Output>,
    ) -> Result<Option<FarSnapshot>, Failure> {
        let text = image.to_string_lossy();
        let (address, name) = match text.contains("://").then(|| text.rsplit_once('/')).flatten() {
            Some((address, name)) => (address.parse()?, name),
            None if self.repository.repo.is_some() => (self.repository.address()?, &*text),
            None => return Ok(None),
        };
        let access = self.repository.access.uninterrupted(output);
        let mut options = FarOptions::new(address, name.parse()?, access);
        let default = CacheOptions::default();
        options.cache.directory = self.cache.clone().unwrap_or(default.directory);
        options.cache.bytes = self.cache_size;
        options.patience = self.repository.access.store_timeout;
        blocking(move || FarSnapshot::open(&options)).await.map(Some)
    }
}
