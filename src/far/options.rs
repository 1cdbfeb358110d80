//! How a snapshot is opened from afar.

use std::time::Duration;

use super::cache::CacheOptions;
use crate::repository::{Access, Address, SnapshotName};

/// Which snapshot, and how it is read.
#[derive(Clone)]
#[non_exhaustive]
pub struct FarOptions {
    /// The repository.
    pub repository: Address,
    /// The snapshot.
    pub name: SnapshotName,
    /// How the repository is reached.
    pub access: Access,
    /// What was fetched is kept there.
    pub cache: CacheOptions,
    /// How long a disk waits where the store does not answer before the guest is stopped, which goes on when
    /// it answers again; or where what the store has is damaged, before the guest sees an error.
    pub patience: Duration,
}

impl FarOptions {
    /// This snapshot of this repository, with the default cache.
    pub fn new(repository: Address, name: SnapshotName, access: Access) -> FarOptions {
        let patience = Duration::from_secs(120);
        FarOptions { repository, name, access, cache: CacheOptions::default(), patience }
    }
}
