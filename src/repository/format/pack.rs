//! Packs, and the indexes that tell what lies in them.

use super::bytes::{Reader, as_u32};
use super::ids::{ExtentId, PackId};

/// The longest extent, before it is compressed.
pub const MAX_EXTENT: usize = 256 << 10;
/// By how much an extent may be longer where it is stored: encrypted.
pub const MAX_OVERHEAD: usize = 64;
/// The longest pack: what is read of one is bounded by it.
pub const MAX_PACK: u64 = 64 << 20;
/// What the extents of a pack take at most.
pub const PACK_TARGET: usize = 32 << 20;
/// A pack this long is put even where a file ends.
pub const PACK_LEAST: usize = 16 << 20;

/// Length of the trailer, which ends each pack: length of the footer, magic.
pub const TRAILER: usize = 12;
const MAGIC: [u8; 8] = *b"SNAPPACK";

/// Length of an entry.
const ENTRY: usize = 44;

/// An extent in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub id: ExtentId,
    /// Offset in the pack.
    pub at: u32,
    /// Length in the pack.
    pub stored: u32,
    /// Length of what it holds.
    pub raw: u32,
}

/// What extents with so many stored bytes in all take in packs, with what a footer says of them: a pack
/// that is no longer has nothing else in it.
pub fn room(extents: usize, stored: u64) -> u64 {
    /// Of a footer and a trailer, whatever they say.
    const FRAME: u64 = 128;
    stored + (extents * ENTRY) as u64 + FRAME
}

/// A pack, as an index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub pack: PackId,
    /// Length of the object.
    pub len: u64,
    pub entries: Vec<Entry>,
}

/// Says what is wrong with the lengths of an extent.
pub fn check_lengths(at: u32, stored: u32, raw: u32) -> Result<(), String> {
    let fits = |len: u32, most: usize| len > 0 && len as usize <= most;
    let end = u64::from(at) + u64::from(stored);
    match fits(raw, MAX_EXTENT) && fits(stored, raw as usize + MAX_OVERHEAD) && end <= MAX_PACK {
        true => Ok(()),
        false => Err(format!("an extent of {raw} bytes can't be {stored} bytes at {at}")),
    }
}

fn put_entries(to: &mut Vec<u8>, entries: &[Entry]) {
    to.extend(as_u32(entries.len()).to_le_bytes());
    for Entry { id, at, stored, raw } in entries {
        to.extend(id.0);
        [at, stored, raw].iter().for_each(|n| to.extend(n.to_le_bytes()));
    }
}

fn take_entries(from: &mut Reader<'_>) -> Result<Vec<Entry>, String> {
    let count = from.count(ENTRY)?;
    let entry = |from: &mut Reader<'_>| {
        let entry = Entry {
            id: ExtentId(from.array()?),
            at: from.u32()?,
            stored: from.u32()?,
            raw: from.u32()?,
        };
        check_lengths(entry.at, entry.stored, entry.raw).map(|()| entry)
    };
    (0..count).map(|_| entry(from)).collect()
}

/// The body of a pack's footer.
pub fn footer(entries: &[Entry]) -> Vec<u8> {
    let mut body = Vec::with_capacity(4 + entries.len() * ENTRY);
    put_entries(&mut body, entries);
    body
}

/// Reads the body of a footer.
pub fn read_footer(body: &[u8]) -> Result<Vec<Entry>, String> {
    let mut from = Reader(body);
    let entries = take_entries(&mut from)?;
    from.end().map(|()| entries)
}

/// What ends a pack whose footer is so long.
pub fn trailer(footer: usize) -> [u8; TRAILER] {
    let mut trailer = [0; TRAILER];
    trailer[..4].copy_from_slice(&as_u32(footer).to_le_bytes());
    trailer[4..].copy_from_slice(&MAGIC);
    trailer
}

/// The length of the footer, by the last bytes of a pack of this length.
pub fn footer_len(tail: &[u8], pack: u64) -> Result<usize, String> {
    let trailer = tail.last_chunk::<TRAILER>().ok_or("it is too short")?;
    if trailer[4..] != MAGIC {
        return Err("it does not end as a pack does".into());
    }
    let len = u32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]]);
    match u64::from(len) + TRAILER as u64 <= pack {
        true => Ok(len as usize),
        false => Err(format!("a footer of {len} bytes does not lie in {pack} bytes")),
    }
}

/// The bodies of an index's two parts: which packs it is of, and what lies in them. A prune reads
/// the first alone.
pub fn index(packs: &[Listed]) -> (Vec<u8>, Vec<u8>) {
    let entries: usize = packs.iter().map(|pack| pack.entries.len()).sum();
    let mut head = Vec::with_capacity(4 + packs.len() * 28);
    head.extend(as_u32(packs.len()).to_le_bytes());
    let mut body = Vec::with_capacity(packs.len() * 4 + entries * ENTRY);
    for Listed { pack, len, entries } in packs {
        head.extend(pack.0);
        head.extend(len.to_le_bytes());
        put_entries(&mut body, entries);
    }
    (head, body)
}

/// Reads the first part of an index: packs and their lengths.
pub fn read_index_head(head: &[u8]) -> Result<Vec<(PackId, u64)>, String> {
    let mut from = Reader(head);
    let count = from.count(24)?;
    let packs = (0..count).map(|_| Ok((PackId(from.array()?), from.u64()?)));
    let packs = packs.collect::<Result<_, String>>()?;
    from.end().map(|()| packs)
}

/// Reads an index of these packs.
pub fn read_index(packs: Vec<(PackId, u64)>, body: &[u8]) -> Result<Vec<Listed>, String> {
    let mut from = Reader(body);
    let listed = |(pack, len)| Ok(Listed { pack, len, entries: take_entries(&mut from)? });
    let packs = packs.into_iter().map(listed).collect::<Result<_, String>>()?;
    from.end().map(|()| packs)
}

/// Puts the two parts of an index together, as they were closed.
pub fn join_index(head: &[u8], body: &[u8]) -> Vec<u8> {
    [&as_u32(head.len()).to_le_bytes(), head, body].concat()
}

/// Takes the two parts of an index apart; of the second, as much as is there.
pub fn split_index(bytes: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let mut from = Reader(bytes);
    let len = from.u32()? as usize;
    Ok((from.take(len)?, from.0))
}
