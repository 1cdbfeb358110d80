//! The flat layout: each block's pages lie in the file as they lie in memory, plain and
//! one behind the other, so that QEMU can map them. It is an ordinary image none the less:
//! every page is found by the index and checked as in any other. Zeros are holes.

use crate::image::format::layout::{Region, SUPERBLOCK_BYTES, Superblock};
use crate::image::format::manifest::Manifest;
use crate::page::{Block, PAGE_SIZE};

/// Where a large block may begin: at a huge page, so that its mapping can have them.
const LARGE: u64 = 2 << 20;

/// Where each block begins in the file, and where the last one ends.
pub(in crate::image) fn places(blocks: &[Block]) -> (Vec<u64>, u64) {
    let mut end = SUPERBLOCK_BYTES as u64;
    let place = |block: &Block| {
        let align = if block.len >= LARGE { LARGE } else { PAGE_SIZE as u64 };
        let start = end.next_multiple_of(align);
        end = start + block.len;
        start
    };
    (blocks.iter().map(place).collect(), end)
}

/// Checks what a manifest says of the places of blocks: none, or one for each, whole
/// pages within the data region, in order.
///
/// # Errors
/// Says which block's is wrong.
pub(in crate::image) fn check_places(
    manifest: &Manifest,
    superblock: &Superblock,
) -> Result<(), String> {
    let Manifest { blocks, flat, .. } = manifest;
    if flat.is_empty() {
        return Ok(());
    }
    if flat.len() != blocks.len() {
        return Err(format!("places of {} blocks, where there are {}", flat.len(), blocks.len()));
    }
    let data = superblock.region(Region::Data);
    let mut free = data.offset;
    for (block, start) in blocks.iter().zip(flat) {
        let end = start.checked_add(block.len).filter(|end| *end <= data.offset + data.len);
        match end {
            Some(end) if *start >= free && start.is_multiple_of(PAGE_SIZE as u64) => free = end,
            _ => return Err(format!("block {:?} can't lie at file offset {start:#x}", block.name)),
        }
    }
    Ok(())
}
