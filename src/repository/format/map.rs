//! Maps: what a file consists of.

use std::collections::{BTreeMap, HashMap};

use super::bytes::{Reader, as_u32};
use super::ids::{ExtentId, PackId};
use super::pack::{check_lengths, room};

/// The longest map, before it is compressed: of a disk with some 2 TB of data.
pub const MAX_MAP: u64 = 2 << 30;
/// What lies in a map of the file itself, at most.
pub const MAX_INLINE: u64 = 64 << 20;

/// Length of an extent's record, without its id.
const RECORD: usize = 24;

/// A part of a file, and where it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub offset: u64,
    /// Length in the file.
    pub raw: u32,
    /// The pack.
    pub pack: PackId,
    /// Offset in the pack.
    pub at: u32,
    /// Length in the pack.
    pub stored: u32,
    /// What it is called, by its bytes.
    pub id: ExtentId,
}

impl Extent {
    /// The offset in the file of the byte behind its last one.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.raw)
    }
}

/// Bytes of the file that lie in the map itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inline {
    /// Offset in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What a file consists of. Whatever neither an extent nor an inline part covers is zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileMap {
    /// Random, so that no push puts a map that a prune may just be removing.
    pub salt: [u8; 16],
    /// Length of the file.
    pub len: u64,
    /// Its stored parts, in order; none overlaps another one or an inline part.
    pub extents: Vec<Extent>,
    /// Its parts that lie here, in order.
    pub inline: Vec<Inline>,
}

impl FileMap {
    /// The packs that it refers to, each once, in the order of the file.
    pub fn packs(&self) -> Vec<PackId> {
        let mut seen = std::collections::HashSet::new();
        let packs = self.extents.iter().map(|extent| extent.pack);
        packs.filter(|pack| seen.insert(*pack)).collect()
    }

    /// Bytes that it has in packs.
    pub fn stored(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.stored)).sum()
    }

    /// The extents that hold anything of these bytes of the file, by their places in the list.
    pub fn extents_in(&self, range: std::ops::Range<u64>) -> std::ops::Range<usize> {
        let from = self.extents.partition_point(|extent| extent.end() <= range.start);
        let to = self.extents.partition_point(|extent| extent.offset < range.end);
        from..to.max(from)
    }

    /// Length of the map's object's body. More than [`MAX_MAP`] is not read again.
    pub fn encoded_len(&self) -> u64 {
        let inline: usize = self.inline.iter().map(|part| 12 + part.bytes.len()).sum();
        (36 + self.packs().len() * 16 + self.extents.len() * (RECORD + 32) + inline) as u64
    }

    /// What maps use of each pack, in bytes. What several places in them refer to counts once.
    pub fn used(maps: &[&FileMap]) -> BTreeMap<PackId, u64> {
        let mut packs: Vec<PackId> = Vec::new();
        let mut numbers: HashMap<PackId, u32> = HashMap::new();
        let mut places: Vec<(u32, u32, u32)> = Vec::new();
        for extent in maps.iter().flat_map(|map| &map.extents) {
            let number = *numbers.entry(extent.pack).or_insert_with(|| {
                packs.push(extent.pack);
                as_u32(packs.len() - 1)
            });
            places.push((number, extent.at, extent.stored));
        }
        places.sort_unstable();
        places.dedup_by_key(|(pack, at, _)| (*pack, *at));
        let of_packs = places.chunk_by(|(a, ..), (b, ..)| a == b).map(|of| {
            let stored = of.iter().map(|(.., stored)| u64::from(*stored)).sum();
            (packs[of[0].0 as usize], room(of.len(), stored))
        });
        of_packs.collect()
    }

    /// The body of the map's object.
    pub fn encode(&self) -> Vec<u8> {
        let packs = self.packs();
        let number: HashMap<_, _> =
            packs.iter().enumerate().map(|(number, pack)| (*pack, as_u32(number))).collect();
        let mut body = Vec::with_capacity(self.encoded_len() as usize);
        body.extend(self.salt);
        body.extend(self.len.to_le_bytes());
        body.extend(as_u32(packs.len()).to_le_bytes());
        packs.iter().for_each(|pack| body.extend(pack.0));
        body.extend(as_u32(self.extents.len()).to_le_bytes());
        // Side by side they compress; ids do not.
        for extent in &self.extents {
            body.extend(extent.offset.to_le_bytes());
            [extent.raw, number[&extent.pack], extent.at, extent.stored]
                .iter()
                .for_each(|n| body.extend(n.to_le_bytes()));
        }
        self.extents.iter().for_each(|extent| body.extend(extent.id.0));
        body.extend(as_u32(self.inline.len()).to_le_bytes());
        for Inline { offset, bytes } in &self.inline {
            body.extend(offset.to_le_bytes());
            body.extend(as_u32(bytes.len()).to_le_bytes());
            body.extend(bytes);
        }
        body
    }

    /// Reads the body of a map's object, and checks all that a reader relies on.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8]) -> Result<FileMap, String> {
        let mut from = Reader(body);
        let (salt, len) = (from.array()?, from.u64()?);
        let packs = from.count(16)?;
        let packs =
            (0..packs).map(|_| from.array().map(PackId)).collect::<Result<Vec<_>, String>>()?;
        let count = from.count(RECORD + 32)?;
        let (mut records, mut ids) =
            (Reader(from.take(count * RECORD)?), Reader(from.take(count * 32)?));
        let mut extents = Vec::with_capacity(count);
        let mut end = 0;
        for _ in 0..count {
            let offset = records.u64()?;
            let (raw, pack) = (records.u32()?, records.u32()?);
            let (at, stored) = (records.u32()?, records.u32()?);
            check_lengths(at, stored, raw)?;
            let pack = *packs.get(pack as usize).ok_or("it names a pack that it does not list")?;
            if offset < end || offset.checked_add(u64::from(raw)).is_none_or(|end| end > len) {
                return Err(format!("an extent at {offset} overlaps another, or the file's end"));
            }
            end = offset + u64::from(raw);
            extents.push(Extent { offset, raw, pack, at, stored, id: ExtentId(ids.array()?) });
        }
        let count = from.count(12)?;
        let mut inline = Vec::with_capacity(count);
        end = 0;
        for _ in 0..count {
            let (offset, bytes) = (from.u64()?, from.u32()?);
            let bytes = from.take(bytes as usize)?.to_vec();
            if offset < end || offset.checked_add(bytes.len() as u64).is_none_or(|end| end > len) {
                return Err(format!("a part at {offset} overlaps another, or the file's end"));
            }
            end = offset + bytes.len() as u64;
            inline.push(Inline { offset, bytes });
        }
        from.end()?;
        let map = FileMap { salt, len, extents, inline };
        let overlapped = map.inline.iter().find(|part| {
            !map.extents_in(part.offset..part.offset + part.bytes.len() as u64).is_empty()
        });
        match overlapped {
            Some(part) => Err(format!("a part at {} overlaps an extent", part.offset)),
            None => Ok(map),
        }
    }
}
