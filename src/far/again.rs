//! How another process goes on with a snapshot that this one has opened: what stands in a ledger.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::cache::CacheOptions;
use super::options::FarOptions;
use crate::repository::{Access, KeySource, RepositoryError, SnapshotManifest, StoreWait};

/// How a snapshot is opened again. Keys and credentials are not part of it: they come from where they came
/// from before, the environment included.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct FarAgain {
    /// The repository, with all that its address says.
    repository: String,
    name: String,
    /// So that it is the same one, even if it is called otherwise by now, or has been forgotten. Who has
    /// signed it was looked at when it was opened first.
    pub(super) manifest: SnapshotManifest,
    keys: Vec<KeySource>,
    trusted: Vec<String>,
    plain: bool,
    store_patience: Duration,
    cache: CacheOptions,
    patience: Duration,
    /// The socket by which its disks are served, if they are.
    pub(super) socket: Option<PathBuf>,
}

impl fmt::Debug for FarAgain {
    /// Without the address, which may hold a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FarAgain").field(&self.name).finish()
    }
}

impl FarAgain {
    /// The same as with these options, which have led to this snapshot.
    pub(super) fn new(
        options: &FarOptions,
        manifest: &SnapshotManifest,
        socket: Option<PathBuf>,
    ) -> FarAgain {
        let Access { keys, trusted, plain, .. } = &options.access;
        FarAgain {
            repository: options.repository.full(),
            name: options.name.to_string(),
            manifest: manifest.clone(),
            keys: keys.clone(),
            trusted: trusted.clone(),
            plain: *plain,
            store_patience: options.access.patience(),
            cache: options.cache.clone(),
            patience: options.patience,
            socket,
        }
    }

    /// The options that it stands for. `tell` is told when the store is waited for.
    pub(super) fn options(
        &self,
        tell: impl Fn(StoreWait) + Send + Sync + 'static,
    ) -> Result<FarOptions, RepositoryError> {
        let access = Access::new()
            .with_waits(tell)
            .with_patience(self.store_patience)
            .with_keys(self.keys.clone())
            .with_trusted(self.trusted.clone())
            .with_plain(self.plain);
        let mut options = FarOptions::new(self.repository.parse()?, self.name.parse()?, access);
        (options.cache, options.patience) = (self.cache.clone(), self.patience);
        Ok(options)
    }
}
