//! An image without memory: the machine, its devices and the list of its blocks.

use std::path::Path;
use std::sync::Arc;

use crate::cancel::Cancellation;
use crate::host::shared_memory;
use crate::identity::Identity;
use crate::image::format::error::ImageError;
use crate::image::format::layout::SUPERBLOCK_BYTES;
use crate::image::format::manifest::{Details, Manifest, Sections, check_blocks};
use crate::image::read::image::Image;
use crate::image::write::index::empty_index;
use crate::image::write::options::CacheUse;
use crate::image::write::sink::Sink;
use crate::image::write::tail::{self, Parts};
use crate::page::Block;

/// An image in memory of a guest whose pages are read by something else. Its own index says of each
/// that it is missing, so that whoever asks it for one gets an error. `path` is what errors call it.
///
/// # Errors
/// Blocks that the format does not allow, sections that are too large, a lack of memory.
pub fn skeleton(
    path: &Path,
    identity: Identity,
    blocks: &[Block],
    details: Details,
    sections: &Sections,
) -> Result<Arc<Image>, ImageError> {
    let pages = check_blocks(blocks).map_err(ImageError::Blocks)?;
    let index = empty_index(pages)?;
    let manifest = Manifest {
        identity,
        created_by: concat!("snapback ", env!("CARGO_PKG_VERSION")).into(),
        machine: details.machine,
        moment_unix_us: details.moment_unix_us,
        pause_us: details.pause_us,
        blocks: blocks.to_vec(),
        data_pages: 0,
        zero_pages: 0,
        layers: Vec::new(),
        flat: Vec::new(),
    };
    let io = |error| ImageError::io("write", path, error);
    let file = shared_memory::file(c"snapback-skeleton").map_err(io)?;
    let start = SUPERBLOCK_BYTES as u64;
    let ours = file.try_clone().map_err(io)?;
    let sink = Sink::new(ours, start, None, CacheUse::Keep, Cancellation::new());
    let parts = Parts { manifest: &manifest, sections, chunks: &[], index: &index, chunk_pages: 1 };
    tail::write(&file, path, sink, parts)?;
    Image::open_file(file, path)
}
