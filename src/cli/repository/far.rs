//! A revert of a snapshot that is still in its repository.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::{RepositoryArgs, blocking};
use crate::cli::failure::Failure;
use crate::cli::output::Output;
use crate::cli::parse_rate;
use crate::far::{FarOptions, FarSnapshot};

/// Where the snapshot is, and what is kept of it here.
#[derive(Args, Clone)]
pub(in crate::cli) struct FarArgs {
    #[command(flatten)]
    pub repository: RepositoryArgs,
    /// Keep what is fetched from a repository there
    /// [default: $XDG_CACHE_HOME/snapback, or ~/.cache/snapback]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Keep at most this much, in bytes (suffixes K, M, G: powers of 1024)
    #[arg(long, value_name = "SIZE", default_value = "16G", value_parser = parse_rate)]
    cache_size: u64,
}

impl FarArgs {
    /// The snapshot, where the argument names one of a repository: behind the repository's address, or
    /// by itself where `--repo` is given.
    pub async fn open(
        &self,
        image: &Path,
        output: &Arc<Output>,
    ) -> Result<Option<FarSnapshot>, Failure> {
        let text = image.to_string_lossy();
        match text.contains("://") || self.repository.repo.is_some() {
            true => self.open_in_repository(&text, output).await.map(Some),
            false => Ok(None),
        }
    }

    /// The snapshot of this name, which may begin with its repository's address.
    pub async fn open_in_repository(
        &self,
        name: &str,
        output: &Arc<Output>,
    ) -> Result<FarSnapshot, Failure> {
        let (address, name) = match name.contains("://").then(|| name.rsplit_once('/')).flatten() {
            Some((address, name)) => (address.parse()?, name),
            None => (self.repository.address()?, name),
        };
        let access = self.repository.access.uninterrupted(output);
        let mut options = FarOptions::new(address, name.parse()?, access);
        if let Some(directory) = &self.cache {
            options.cache.directory = directory.clone();
        }
        options.cache.bytes = self.cache_size;
        options.patience = self.repository.access.store_timeout;
        blocking(move || FarSnapshot::open(&options)).await
    }
}
