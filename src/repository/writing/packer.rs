//! Extents put into packs, and packs put into the store.

use std::collections::VecDeque;

use bytes::Bytes;

use super::known::{Place, close_index, index_key};
use crate::repository::error::RepositoryError;
use crate::repository::format::bytes::as_u32;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{ExtentId, ObjectId, PackId, random};
use crate::repository::format::pack::{Entry, Listed, PACK_LEAST, PACK_TARGET, footer, trailer};
use crate::repository::reading::repository::{Repository, pack_key};
use crate::repository::remote::Pending;

/// How many packs are on their way at once.
const UNDER_WAY: usize = 4;
/// Extents of an index at most, of some 256 GiB: 180 MB, of which a reader holds one at a time.
const IN_INDEX: usize = 4 << 20;

/// Puts extents into packs, one behind the other.
pub struct Packer<'a> {
    repository: &'a Repository,
    pack: PackId,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    under_way: VecDeque<(Listed, Pending)>,
    done: Vec<Listed>,
    sent: u64,
}

impl<'a> Packer<'a> {
    pub fn new(repository: &'a Repository) -> Packer<'a> {
        Packer {
            repository,
            pack: PackId(random()),
            bytes: Vec::new(),
            entries: Vec::new(),
            under_way: VecDeque::new(),
            done: Vec::new(),
            sent: 0,
        }
    }

    /// Adds an extent, which is not there yet. Waits while too many packs are on their way.
    pub fn add(
        &mut self,
        id: ExtentId,
        stored: &[u8],
        raw: usize,
    ) -> Result<Place, RepositoryError> {
        if self.bytes.len() + stored.len() > PACK_TARGET {
            self.flush()?;
        }
        let entry = Entry {
            id,
            at: as_u32(self.bytes.len()),
            stored: as_u32(stored.len()),
            raw: as_u32(raw),
        };
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(PACK_TARGET + (1 << 20));
        }
        self.bytes.extend_from_slice(stored);
        self.entries.push(entry);
        let Entry { at, stored, raw, .. } = entry;
        Ok(Place { pack: self.pack, at, stored, raw })
    }

    /// A file ends here: extents of another one go into another pack if this one is large enough.
    pub fn end_file(&mut self) -> Result<(), RepositoryError> {
        if self.bytes.len() >= PACK_LEAST { self.flush() } else { Ok(()) }
    }

    /// Bytes sent so far, or on their way.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends the pack, and behind it an index of it alone: a push that is killed is continued from
    /// those.
    fn flush(&mut self) -> Result<(), RepositoryError> {
        if self.entries.is_empty() {
            return Ok(());
        }
        while self.under_way.len() >= UNDER_WAY
            || self.under_way.front().is_some_and(|(_, p)| p.is_done())
        {
            self.wait()?;
        }
        let pack = std::mem::replace(&mut self.pack, PackId(random()));
        let mut bytes = std::mem::take(&mut self.bytes);
        let entries = std::mem::take(&mut self.entries);
        let (keys, key) = (&self.repository.keys, pack_key(pack));
        let footer = keys.close(Kind::Footer, &key, &footer(&entries), true);
        bytes.extend(&footer);
        bytes.extend(trailer(footer.len()));
        let listed = Listed { pack, len: bytes.len() as u64, entries };
        self.sent += listed.len;
        let draft = index_key(ObjectId(pack.0));
        let of = close_index(self.repository, &draft, std::slice::from_ref(&listed));
        let objects = vec![(key, Bytes::from(bytes)), (draft, Bytes::from(of))];
        self.under_way.push_back((listed, self.repository.remote.begin_puts(objects)));
        Ok(())
    }

    fn wait(&mut self) -> Result<(), RepositoryError> {
        if let Some((listed, pending)) = self.under_way.pop_front() {
            pending.wait()?;
            self.done.push(listed);
        }
        Ok(())
    }

    /// Sends the rest and waits for all. Returns the packs, after indices of many have taken the
    /// place of those of each.
    pub fn finish(mut self) -> Result<Vec<Listed>, RepositoryError> {
        self.flush()?;
        while !self.under_way.is_empty() {
            self.wait()?;
        }
        put_index(self.repository, &self.done)?;
        Ok(self.done)
    }
}

/// Puts indices of many packs in place of those of each.
fn put_index(repository: &Repository, packs: &[Listed]) -> Result<(), RepositoryError> {
    for group in groups(packs, IN_INDEX).filter(|group| group.len() > 1) {
        let key = index_key(ObjectId(random()));
        repository.remote.put(&key, close_index(repository, &key, group))?;
        let drafts = group.iter().map(|listed| index_key(ObjectId(listed.pack.0)));
        repository.remote.delete_all(drafts.collect())?;
    }
    Ok(())
}

/// Packs in groups of at most so many extents, or of a single pack.
fn groups(mut packs: &[Listed], most: usize) -> impl Iterator<Item = &[Listed]> {
    std::iter::from_fn(move || {
        let mut extents = 0;
        let fits = packs.iter().take_while(|listed| {
            extents += listed.entries.len();
            extents <= most
        });
        let group;
        (group, packs) = packs.split_at(fits.count().max(1).min(packs.len()));
        (!group.is_empty()).then_some(group)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::format::ids::ExtentId;

    #[test]
    fn packs_are_listed_by_as_many_indices_as_keep_each_short() {
        let packs = [2, 1, 3, 9, 1].map(|count| {
            let entry = Entry { id: ExtentId([0; 32]), at: 0, stored: 1, raw: 1 };
            Listed { pack: PackId([count; 16]), len: 1, entries: vec![entry; count.into()] }
        });
        let lengths = |most| groups(&packs, most).map(<[Listed]>::len).collect::<Vec<_>>();
        assert_eq!(lengths(3), [2, 1, 1, 1]);
        assert_eq!(lengths(100), [5]);
        assert_eq!(groups(&[], 3).count(), 0);
    }
}
