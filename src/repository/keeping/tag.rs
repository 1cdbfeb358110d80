//! `tag`: names that people give to snapshots.

use std::collections::BTreeSet;

use crate::repository::error::RepositoryError;
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::reading::repository::Repository;
use crate::repository::writing::push::check_words;

/// Adds tags to a snapshot and takes others away. Each tag is an object of its own, so that two who
/// do so at once don't undo each other's. Returns the tags that it has then.
///
/// # Errors
/// When a tag can't be one, or the store fails.
pub fn tag(
    repository: &Repository,
    manifest: &SnapshotManifest,
    add: &BTreeSet<String>,
    remove: &BTreeSet<String>,
) -> Result<BTreeSet<String>, RepositoryError> {
    check_words(&manifest.machine, add)?;
    for tag in add {
        repository.remote.put(&repository.tag_key(manifest.id, tag), bytes::Bytes::new())?;
    }
    let keys = remove.iter().map(|tag| repository.tag_key(manifest.id, tag)).collect();
    repository.remote.delete_all(keys)?;
    repository.tags_of(manifest.id)
}
