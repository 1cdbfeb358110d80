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
    /// The manifests in whose places others were put, by their keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub manifests: Vec<String>,
}

impl Mark {
    /// Whether it marks nothing.
    pub fn is_empty(&self) -> bool {
        self.packs.is_empty() && self.maps.is_empty() && self.manifests.is_empty()
    }
}

/// All that is marked, and that nothing new may refer to.
#[derive(Debug, Default)]
pub struct Marked {
    pub packs: HashSet<PackId>,
    pub maps: HashSet<MapId>,
    pub manifests: HashSet<String>,
}

impl Marked {
    /// Adds what a mark says.
    pub fn add(&mut self, mark: &Mark) {
        self.packs.extend(mark.packs.iter().map(|(pack, _)| *pack));
        self.maps.extend(&mark.maps);
        self.manifests.extend(mark.manifests.iter().cloned());
    }
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

/// All that is marked.
pub fn marked(repository: &Repository) -> Result<Marked, RepositoryError> {
    let mut marked = Marked::default();
    for_each_mark(repository, |_, mark| {
        marked.add(&mark);
        Ok(())
    })?;
    Ok(marked)
}
