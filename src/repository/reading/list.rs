//! `list`: what there is.

use std::collections::{BTreeMap, BTreeSet};

use super::repository::Repository;
use crate::repository::error::RepositoryError;
use crate::repository::format::ids::SnapshotId;
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::format::time::readable;

/// All snapshots, or those of a machine, each with its tags: the oldest first.
///
/// # Errors
/// When the store fails, or a manifest is damaged.
pub fn list(
    repository: &Repository,
    machine: Option<&str>,
) -> Result<Vec<(SnapshotManifest, BTreeSet<String>)>, RepositoryError> {
    let snapshots = match machine {
        Some(machine) => repository.snapshots_of(machine)?,
        None => repository.snapshots()?,
    };
    let mut manifests = repository.manifests_of(&snapshots)?;
    manifests.sort_by_key(|manifest| (manifest.moment_unix_us, manifest.id));
    let mut tags = all_tags(repository)?;
    let with_tags = |manifest: SnapshotManifest| {
        let tags = tags.remove(&manifest.id).unwrap_or_default();
        (manifest, tags)
    };
    Ok(manifests.into_iter().map(with_tags).collect())
}

/// The tags of all snapshots.
pub fn all_tags(
    repository: &Repository,
) -> Result<BTreeMap<SnapshotId, BTreeSet<String>>, RepositoryError> {
    let mut tags: BTreeMap<SnapshotId, BTreeSet<String>> = BTreeMap::new();
    for listing in repository.remote.list("tags")? {
        if let Some((id, tag)) = repository.tag(&listing) {
            tags.entry(id).or_default().insert(tag);
        }
    }
    Ok(tags)
}

/// A moment as people read it, in UTC.
pub fn time_text(unix_us: u64) -> String {
    readable(i64::try_from(unix_us / 1_000_000).unwrap_or(i64::MAX / 1_000_000))
}
