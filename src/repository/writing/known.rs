//! What lies in a repository already.

use std::collections::{HashMap, HashSet};

use crate::repository::error::RepositoryError;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{ExtentId, ObjectId, PackId};
use crate::repository::format::pack::{
    Entry, Listed, index, join_index, read_index, read_index_head, split_index,
};
use crate::repository::reading::repository::Repository;

/// The longest index, before it is compressed.
pub const MAX_INDEX: u64 = 2 << 30;

/// The most extents that are known, of some 512 GiB: what is not known is stored again.
const MAX_KNOWN: usize = 8 << 20;

/// Where an extent lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pack: PackId,
    pub at: u32,
    pub stored: u32,
    pub raw: u32,
}

/// The extents that lie in a repository, and those that are being added to it.
#[derive(Default)]
pub struct Known {
    packs: Vec<PackId>,
    extents: HashMap<ExtentId, (u32, u32, u32, u32)>,
    added: HashMap<ExtentId, Place>,
}

impl Known {
    /// Reads all indexes, and leaves out these packs.
    pub fn read(
        repository: &Repository,
        without: &HashSet<PackId>,
    ) -> Result<Known, RepositoryError> {
        let mut known = Known::default();
        for_each_index(repository, |_, packs| {
            let packs = packs.into_iter().filter(|listed| !without.contains(&listed.pack));
            packs.for_each(|listed| known.add(listed.pack, &listed.entries));
            Ok(())
        })?;
        Ok(known)
    }

    /// Adds what lies in a pack.
    pub fn add(&mut self, pack: PackId, entries: &[Entry]) {
        if self.extents.len() + entries.len() > MAX_KNOWN {
            return;
        }
        let number = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        self.packs.push(pack);
        for Entry { id, at, stored, raw } in entries {
            self.extents.entry(*id).or_insert((number, *at, *stored, *raw));
        }
    }

    /// Notes an extent that is put into a pack now.
    pub fn note(&mut self, id: ExtentId, place: Place) {
        self.added.insert(id, place);
    }

    /// Where an extent lies, if it is there.
    pub fn find(&self, id: &ExtentId) -> Option<Place> {
        match self.extents.get(id) {
            Some(&(pack, at, stored, raw)) => {
                Some(Place { pack: self.packs[pack as usize], at, stored, raw })
            }
            None => self.added.get(id).copied(),
        }
    }
}

/// Gives `take` each index, with its key.
pub fn for_each_index(
    repository: &Repository,
    mut take: impl FnMut(&str, Vec<Listed>) -> Result<(), RepositoryError>,
) -> Result<(), RepositoryError> {
    let keys = repository.remote.list("index")?.into_iter().map(|listing| listing.key).collect();
    // One that is gone was put into another one meanwhile.
    repository.remote.get_each(keys, |key, bytes| take(key, open_index(repository, key, &bytes)?))
}

/// Reads an index.
pub fn open_index(
    repository: &Repository,
    key: &str,
    bytes: &[u8],
) -> Result<Vec<Listed>, RepositoryError> {
    let open = || {
        let (head, body) = split_index(bytes)?;
        let packs = open_head(repository, key, head)?;
        read_index(packs, &repository.keys.open(Kind::Index, key, body, MAX_INDEX)?)
    };
    open().map_err(|problem| repository.damaged(key, problem))
}

/// Reads the first part of an index, as it was closed.
pub fn open_head(
    repository: &Repository,
    key: &str,
    head: &[u8],
) -> Result<Vec<(PackId, u64)>, String> {
    read_index_head(&repository.keys.open(Kind::IndexHead, key, head, MAX_INDEX)?)
}

/// An index as it is put.
pub fn close_index(repository: &Repository, key: &str, packs: &[Listed]) -> Vec<u8> {
    let (head, body) = index(packs);
    let close = |kind, part: &[u8]| repository.keys.close(kind, key, part, true);
    join_index(&close(Kind::IndexHead, &head), &close(Kind::Index, &body))
}

/// The key of an index.
pub fn index_key(id: ObjectId) -> String {
    format!("index/{id}")
}
