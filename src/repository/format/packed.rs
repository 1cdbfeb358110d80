//! A repository in one file: its objects one behind the other, and a directory of them at the end.

use std::collections::BTreeMap;
use std::ops::Range;

use super::bytes::{Reader, as_u32};

/// Length of the head of the file.
pub const HEAD: usize = 16;
/// Length of what ends the file.
pub const TAIL: usize = 24;
/// The longest directory.
pub const MAX_DIRECTORY: u64 = 256 << 20;

const MAGIC: [u8; 8] = *b"SNAPFILE";
const END: [u8; 8] = *b"SNAPDONE";
const VERSION: u32 = 1;

/// The objects, and where each lies in the file.
pub type Directory = BTreeMap<String, Range<u64>>;

/// What the file begins with.
pub fn head() -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&MAGIC);
    head[8..12].copy_from_slice(&VERSION.to_le_bytes());
    head
}

/// Checks what a file begins with.
pub fn check_head(head: &[u8]) -> Result<(), String> {
    let mut from = Reader(head);
    if from.array()? != MAGIC {
        return Err("it does not begin as one".into());
    }
    match from.u32()? {
        VERSION => Ok(()),
        version => Err(format!("its version is {version}, of a later snapback")),
    }
}

/// The directory as it is written, with what ends the file behind it. It begins at this offset.
pub fn directory(objects: &Directory, at: u64) -> Vec<u8> {
    let mut bytes = as_u32(objects.len()).to_le_bytes().to_vec();
    for (key, place) in objects {
        bytes.extend(as_u32(key.len()).to_le_bytes());
        bytes.extend(key.as_bytes());
        bytes.extend(place.start.to_le_bytes());
        bytes.extend(place.end.to_le_bytes());
    }
    bytes.extend(blake3::hash(&bytes).as_bytes());
    let len = bytes.len() as u64;
    bytes.extend(at.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(END);
    bytes
}

/// Where the directory lies, by the end of a file of this length.
pub fn directory_place(tail: &[u8], len: u64) -> Result<Range<u64>, String> {
    let mut from = Reader(tail);
    let (at, bytes) = (from.u64()?, from.u64()?);
    if from.array()? != END {
        return Err("it is cut short".into());
    }
    from.end()?;
    let end = at.checked_add(bytes).filter(|end| end.checked_add(TAIL as u64) == Some(len));
    match end.filter(|_| at >= HEAD as u64 && bytes <= MAX_DIRECTORY) {
        Some(end) => Ok(at..end),
        None => Err("its directory does not lie in it".into()),
    }
}

/// Reads the directory, which begins at this offset.
pub fn read_directory(bytes: &[u8], at: u64) -> Result<Directory, String> {
    let len = bytes.len().checked_sub(32).ok_or("its directory is too short")?;
    let (bytes, sum) = bytes.split_at(len);
    if blake3::hash(bytes).as_bytes() != sum {
        return Err("the checksum of its directory does not match".into());
    }
    let mut from = Reader(bytes);
    let count = from.count(20)?;
    let mut objects = Directory::new();
    for _ in 0..count {
        let len = from.u32()? as usize;
        let key = String::from_utf8(from.take(len)?.to_vec()).map_err(|_| "a key is no text")?;
        let place = from.u64()?..from.u64()?;
        if place.start < HEAD as u64 || place.start > place.end || place.end > at {
            return Err(format!("`{key}` does not lie in it"));
        }
        objects.insert(key, place);
    }
    from.end().map(|()| objects)
}
