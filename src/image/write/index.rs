//! The page index of an image that is being written.

use std::path::Path;

use nix::unistd::{SysconfVar, sysconf};

use crate::image::format::error::ImageError;
use crate::image::format::layout::PageEntry;
use crate::image::format::manifest::LayerRef;
use crate::image::write::pack::Stored;
use crate::page::PAGE_SIZE;

/// Checks that the index of so many pages takes no more than a quarter of this host's memory.
/// A file that is imported can claim any number of pages in a few bytes; a machine that this
/// host could run stays far below.
pub(in crate::image) fn check_index(path: &Path, pages: u64) -> Result<(), ImageError> {
    let value = |name| sysconf(name).ok().flatten().and_then(|n| u64::try_from(n).ok());
    let Some((count, bytes)) = value(SysconfVar::_PHYS_PAGES).zip(value(SysconfVar::PAGE_SIZE))
    else {
        return Ok(());
    };
    let (index, limit) = (pages * size_of::<u64>() as u64, count.saturating_mul(bytes) / 4);
    if index > limit {
        let (path, ram) = (path.to_owned(), pages * PAGE_SIZE as u64);
        return Err(ImageError::IndexTooLarge { path, ram, index, limit });
    }
    Ok(())
}

/// The empty index. The kernel gives it memory as it is touched, but a length that can't be
/// allocated must be an error: `vec!` alone would end the process.
pub(in crate::image) fn empty_index(pages: u64) -> Result<Vec<u64>, ImageError> {
    Vec::<u64>::new().try_reserve_exact(pages as usize).map_err(|_| {
        ImageError::Blocks(format!("there is no memory for an index of {pages} pages"))
    })?;
    Ok(vec![PageEntry::MISSING; pages as usize])
}

/// The raw entry of a page that is on its way to a chunk, in that job's buffer. No
/// finished index holds one.
pub(in crate::image) fn pending(job: u64) -> u64 {
    const KIND: u64 = 3;
    KIND | job << 8
}

/// Enters where pages are stored, unless they have been added again meanwhile. Returns how
/// many of them were stored already.
pub(in crate::image) fn resolve(index: &mut [u64], stored: &Stored) -> u64 {
    for (at, entry) in stored.entries() {
        if index[at] == pending(stored.job) {
            index[at] = entry.encode();
        }
    }
    if stored.again { u64::from(stored.mask.count_ones()) } else { 0 }
}

/// Counts the pages that lie in each layer, and drops the layers in which no page lies: the
/// image does not need them.
pub(in crate::image) fn renumber_layers(layers: Vec<LayerRef>, index: &mut [u64]) -> Vec<LayerRef> {
    if layers.is_empty() {
        return layers;
    }
    let layer_of = |raw: u64| match PageEntry::decode(raw) {
        Ok(PageEntry::Stored { layer, .. }) => usize::from(layer),
        _ => 0,
    };
    let mut pages = vec![0u64; layers.len() + 1];
    index.iter().for_each(|raw| pages[layer_of(*raw)] += 1);
    let mut numbers = vec![0u8; layers.len() + 1];
    let mut kept = Vec::new();
    for (layer, old) in layers.into_iter().zip(1..) {
        if pages[old] > 0 {
            kept.push(LayerRef { pages: pages[old], ..layer });
            numbers[old] = kept.len() as u8;
        }
    }
    for raw in index {
        if let Ok(PageEntry::Stored { layer, chunk, slot }) = PageEntry::decode(*raw) {
            let layer = numbers[usize::from(layer)];
            *raw = PageEntry::Stored { layer, chunk, slot }.encode();
        }
    }
    kept
}
