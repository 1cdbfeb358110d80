//! Marks: what a prune has found to be referred to by nothing, and will remove later.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::repository::error::RepositoryError;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{MapId, PackId};
use crate::repository::reading::repository::Repository;

/// The longest mark.
pub const MAX_MARK: u64 = 256 << 20;

/// What a mark says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Who has put it.
    pub by: String,
    /// The packs, with their lengths.
    pub packs: Vec<(PackId, u64)>,
    /// The maps.
    pub maps: Vec<MapId>,
}

/// Gives `take` each mark, with its key.
pub fn for_each_mark(
    repository: &Repository,
    mut take: impl FnMut(&str, Mark) -> Result<(), RepositoryError>,
) -> Result<(), RepositoryError> {
    let keys = repository.remote.list("marks")?.into_iter().map(|listing| listing.key).collect();
    // One that is gone was removed with what it marks.
    repository.remote.get_each(keys, |key, bytes| {
        take(key, repository.open_json(Kind::Mark, key, &bytes, MAX_MARK)?)
    })
}

/// All packs that are marked.
pub fn marked_packs(repository: &Repository) -> Result<HashSet<PackId>, RepositoryError> {
    let mut packs = HashSet::new();
    for_each_mark(repository, |_, mark| {
        packs.extend(mark.packs.iter().map(|(pack, _)| *pack));
        Ok(())
    })?;
    Ok(packs)
}
