//! What an image says of the machine, beside its memory: the manifest, and the
//! opaque sections of the migration stream.

use std::collections::HashSet;

use crate::identity::Identity;
use serde::{Deserialize, Serialize};

use crate::image::format::layout::{MAX_LAYERS, MAX_PAGES};
use crate::machine::Machine;
use crate::page::{Block, PAGE_SIZE};

/// Most blocks that an image may have: as many as a
/// [`BlockId`](crate::page::BlockId) can count.
pub const MAX_BLOCKS: usize = 65535;
/// Longest name of a block, in bytes: the stream has one byte for its length.
pub const MAX_NAME_BYTES: usize = 255;

/// What the image says of itself and of the machine. Stored as JSON; fields that
/// are not known are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Manifest {
    /// The image's identity, the same as in its superblock.
    pub identity: Identity,
    /// The program that wrote it, with its version.
    pub created_by: String,
    /// The machine at the moment of its snapshot.
    pub machine: Machine,
    /// The moment of the snapshot, in microseconds since 1970 (UTC).
    pub moment_unix_us: u64,
    /// How long the guest stood still for the snapshot, in microseconds, if that
    /// was measured.
    pub pause_us: Option<u64>,
    /// The machine's RAMBlocks in the order of the migration stream.
    pub blocks: Vec<Block>,
    /// Number of target pages that are stored.
    pub data_pages: u64,
    /// Number of target pages that are all zeros.
    pub zero_pages: u64,
    /// The other images in which pages of this one lie; the page index refers to them
    /// by their place here, from 1 up. At most 255.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerRef>,
    /// In an image of the flat layout: where each block begins in the file, in bytes. All
    /// its pages lie there as they lie in memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flat: Vec<u64>,
}

/// Another image, in which pages of this one lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerRef {
    /// Its identity.
    pub identity: Identity,
    /// Length of its file in bytes.
    pub file_len: u64,
    /// Its path as seen from this image's directory: where it is looked for first.
    pub relative: String,
    /// Its absolute path when this image was written.
    pub absolute: String,
    /// How many pages of this image lie there.
    pub pages: u64,
}

/// The parts of the manifest that a writer does not know by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    /// The machine at the moment of its snapshot.
    pub machine: Machine,
    /// The moment of the snapshot, in microseconds since 1970 (UTC).
    pub moment_unix_us: u64,
    /// How long the guest stood still for it, in microseconds, if known.
    pub pause_us: Option<u64>,
}

/// The parts of the migration stream that are not RAM, byte for byte. Each is at
/// most 1 GiB long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sections {
    /// The stream's header and configuration section.
    pub config: Vec<u8>,
    /// The device state sections.
    pub devices: Vec<u8>,
    /// The description of the device state that ends the stream (JSON).
    pub vmdesc: Vec<u8>,
}

/// Checks a list of blocks against the rules of the format. Returns the number
/// of target pages in all.
///
/// # Errors
/// Says which block breaks which rule.
pub(in crate::image) fn check_blocks(blocks: &[Block]) -> Result<u64, String> {
    if blocks.len() > MAX_BLOCKS {
        return Err(format!("{} blocks are more than {MAX_BLOCKS}", blocks.len()));
    }
    let mut names = HashSet::with_capacity(blocks.len());
    let mut pages = 0u64;
    for (number, block) in blocks.iter().enumerate() {
        if block.name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "the name of block {number} is longer than {MAX_NAME_BYTES} bytes"
            ));
        }
        if !names.insert(block.name.as_str()) {
            return Err(format!("two blocks are named {:?}", block.name));
        }
        if block.len % PAGE_SIZE as u64 != 0 {
            return Err(format!(
                "block {:?} has {} bytes, not a multiple of {PAGE_SIZE}",
                block.name, block.len
            ));
        }
        if !block.page_size.is_power_of_two() || block.page_size < PAGE_SIZE as u64 {
            return Err(format!(
                "block {:?} has pages of {} bytes, not a power of two from {PAGE_SIZE} up",
                block.name, block.page_size
            ));
        }
        // No overflow: each addend is below 2^52, and the sum so far below 2^36.
        pages += block.pages();
        if pages > MAX_PAGES {
            return Err(format!(
                "up to block {:?} there are more than {MAX_PAGES} pages",
                block.name
            ));
        }
    }
    Ok(pages)
}

/// Checks the list of other images against the rules of the format.
///
/// # Errors
/// Says what is wrong with it.
pub(in crate::image) fn check_layers(manifest: &Manifest, allowed: bool) -> Result<(), String> {
    let layers = &manifest.layers;
    if !layers.is_empty() && !allowed {
        return Err("it refers to other images, the superblock to none".into());
    }
    if layers.len() > MAX_LAYERS {
        return Err(format!("it refers to {} images, more than {MAX_LAYERS}", layers.len()));
    }
    let mut seen = HashSet::from([manifest.identity]);
    match layers.iter().find(|layer| !seen.insert(layer.identity)) {
        Some(twice) => Err(format!("it refers to itself, or twice to image {}", twice.identity)),
        None => Ok(()),
    }
}
