//! What is told of memory that can't be read.

use super::error::PostcopyError;
use super::event::Unreadable;
use crate::guest::physical;
use crate::image::Image;
use crate::memory::MemoryError;
use crate::page::BlockId;

/// The error with the guest-physical address, as far as it can be derived, and the same to be told
/// in an event.
pub(super) fn describe(image: &Image, error: MemoryError) -> (Unreadable, PostcopyError) {
    let (block, offset) = match &error {
        MemoryError::Source { block, offset, .. } => (block.clone(), *offset),
        _ => (String::new(), 0),
    };
    let manifest = image.manifest();
    let index = manifest.blocks.iter().position(|known| known.name == block);
    let guest_physical = index.and_then(|index| {
        let block = BlockId(index as u16);
        physical::address(&manifest.machine, &manifest.blocks, block, offset)
    });
    let error = PostcopyError::Unreadable { error, guest_physical };
    let why = error.to_string();
    (Unreadable { block, offset, guest_physical, why }, error)
}
