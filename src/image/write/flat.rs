//! The flat layout: each block's pages lie in the file as they lie in memory, plain and
//! one behind the other, so that QEMU can map them. It is an ordinary image none the
//! less: every page is found by the index and checked as in any other. Zeros are holes.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use crate::cancel::Cancellation;
use crate::image::format::error::ImageError;
use crate::image::format::flat::places;
use crate::image::format::layout::{ChunkEntry, Codec, PageEntry};
use crate::image::format::manifest::Manifest;
use crate::image::read::image::Image;
use crate::image::write::index::check_index;
use crate::image::write::options::{CacheUse, Saved};
use crate::image::write::sink::Sink;
use crate::image::write::tail;
use crate::image::write::target::{Target, check_replaces_none};
use crate::page::{Block, BlockId, ChunkId, Location, PAGE_SIZE, Page};

/// The most pages of a chunk.
const CHUNK_PAGES: u64 = 16;

/// Writes all pages of an image, wherever they lie, into a new image of the flat layout.
/// The rest is as [`flatten`](super::flatten()) has it.
///
/// # Errors
/// What can't be read, as the image says it, or can't be written. Nothing is left then.
pub fn flatten_flat(
    image: &Arc<Image>,
    to: &Path,
    force: bool,
    mut progress: impl FnMut(u64, u64) -> bool,
) -> Result<Saved, ImageError> {
    let Manifest { machine, moment_unix_us, pause_us, blocks, .. } = image.manifest().clone();
    check_replaces_none(to, image.files())?;
    check_index(to, blocks.iter().map(Block::pages).sum())?;
    let target = Target::create(to, force)?;
    let io = |e| ImageError::io("write", to, e);
    let (flat, data_end) = places(&blocks);
    target.file().set_len(data_end).map_err(io)?;
    let mut pages = Pages::new(image)?;
    let (mut table, mut index) = (Vec::<ChunkEntry>::new(), Vec::<u64>::new());
    let (mut data_pages, mut zero_pages) = (0, 0);
    let total = blocks.iter().map(|block| block.pages()).sum();
    let mut group = Vec::with_capacity(CHUNK_PAGES as usize * PAGE_SIZE);
    for ((block, id), start) in blocks.iter().zip((0..).map(BlockId)).zip(&flat) {
        let mut number = 0;
        while number < block.pages() {
            // Neighbouring pages that are not zero, up to the end of their group.
            let first = number;
            let group_end = block.pages().min((first / CHUNK_PAGES + 1) * CHUNK_PAGES);
            group.clear();
            while number < group_end && pages.append(Page { block: id, number }, &mut group)? {
                let (chunk, slot) = (table.len() as u64, (number - first) as u8);
                index.push(PageEntry::Stored { layer: 0, chunk, slot }.encode());
                number += 1;
            }
            if group.is_empty() {
                index.push(PageEntry::ZERO);
                zero_pages += 1;
                number += 1;
            } else {
                let offset = start + first * PAGE_SIZE as u64;
                target.file().write_all_at(&group, offset).map_err(io)?;
                data_pages += number - first;
                table.push(ChunkEntry {
                    offset,
                    stored_len: group.len() as u32,
                    codec: Codec::Plain,
                    pages: (number - first) as u8,
                    checksum: xxh3_64(&group),
                });
            }
            if index.len().is_multiple_of(1024) && !progress(index.len() as u64, total) {
                return Err(ImageError::Interrupted(to.to_owned()));
            }
        }
    }
    progress(total, total);
    let (identity, sections) = (Uuid::new_v4(), image.sections()?);
    let manifest = Manifest {
        identity,
        created_by: concat!("snapback ", env!("CARGO_PKG_VERSION")).into(),
        machine,
        moment_unix_us,
        pause_us,
        blocks,
        data_pages,
        zero_pages,
        layers: Vec::new(),
        flat,
    };
    let file = target.file().try_clone().map_err(io)?;
    let sink = Sink::new(file, data_end, None, CacheUse::Keep, Cancellation::new());
    let chunk_pages = CHUNK_PAGES as u32;
    let image_bytes =
        tail::finish(target, sink, &manifest, &sections, &table, &index, chunk_pages)?;
    let (repeated_pages, parent_pages) = (0, 0);
    Ok(Saved { identity, data_pages, zero_pages, repeated_pages, parent_pages, image_bytes })
}

impl Image {
    /// A reader of its pages in order.
    pub(crate) fn pages(self: &Arc<Image>) -> Result<Pages<'_>, ImageError> {
        Pages::new(self)
    }
}

/// Reads an image's pages in order.
pub(crate) struct Pages<'a> {
    image: &'a Arc<Image>,
    buffers: crate::image::read::layer::Buffers,
    held: Option<ChunkId>,
}

impl<'a> Pages<'a> {
    fn new(image: &'a Arc<Image>) -> Result<Pages<'a>, ImageError> {
        Ok(Pages { image, buffers: image.buffers()?, held: None })
    }

    /// Appends a page's bytes; false if it is all zeros.
    pub(crate) fn append(&mut self, page: Page, out: &mut Vec<u8>) -> Result<bool, ImageError> {
        let Location::Stored { chunk, slot } = self.image.find(page)? else { return Ok(false) };
        if self.held != Some(chunk) {
            let (layer, number, entry) = self.image.chunk(chunk)?;
            self.held = None;
            self.buffers.read(layer, number, &entry)?;
            self.held = Some(chunk);
        }
        // Image::find has seen that the chunk has such a slot.
        out.extend_from_slice(&self.buffers.plain()[slot * PAGE_SIZE..(slot + 1) * PAGE_SIZE]);
        Ok(true)
    }
}
