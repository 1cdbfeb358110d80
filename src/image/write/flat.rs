//! Writing an image in the flat layout.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::identity::Identity;
use xxhash_rust::xxh3::xxh3_64;

use crate::cancel::Cancellation;
use crate::image::format::error::ImageError;
use crate::image::format::flat::places;
use crate::image::format::layout::{ChunkEntry, Codec, PageEntry};
use crate::image::format::manifest::Manifest;
use crate::image::read::cursor::Piece;
use crate::image::read::image::Image;
use crate::image::write::every_page::for_every_page;
use crate::image::write::index::check_index;
use crate::image::write::options::{CacheUse, Saved};
use crate::image::write::sink::Sink;
use crate::image::write::tail::{self, Index, Parts};
use crate::image::write::target::Target;
use crate::page::{Block, BlockId, PAGE_SIZE, Page, PageBytes, Run};

/// The most pages of a chunk.
const CHUNK_PAGES: u64 = 16;

/// Writes all pages of an image, wherever they lie, into a new image of the flat layout.
///
/// # Errors
/// What can't be read, as the image says it, or can't be written. Nothing is left then.
pub(in crate::image) fn write(
    image: &Arc<Image>,
    to: &Path,
    force: bool,
    progress: impl FnMut(u64, u64) -> bool,
) -> Result<Saved, ImageError> {
    let Manifest { machine, moment_unix_us, pause_us, blocks, .. } = image.manifest().clone();
    check_index(to, blocks.iter().map(Block::pages).sum())?;
    let target = Target::create(to, force)?;
    let io = |e| ImageError::io("write", to, e);
    let (flat, data_end) = places(&blocks);
    target.file().set_len(data_end).map_err(io)?;
    let mut data = Data::new(target.file(), &flat);
    for_every_page(image, to, progress, |piece| {
        match piece {
            Piece::Zeros(run) => data.zeros(run),
            Piece::Data(run, bytes) => {
                let mut pages = run.pages().zip(bytes.as_chunks().0);
                pages.try_for_each(|(page, bytes)| data.page(page, bytes))
            }
        }
        .map_err(io)
    })?;
    let Data { chunks, index, zero_pages, .. } = data.finish().map_err(io)?;
    let (identity, sections) = (Identity::random(), image.sections()?);
    let data_pages = index.len() as u64 - zero_pages;
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
    let (manifest, sections, chunk_pages) = (&manifest, &sections, CHUNK_PAGES as u32);
    let parts =
        Parts { manifest, sections, chunks: &chunks, index: Index::Entries(&index), chunk_pages };
    let image_bytes = tail::finish(target, sink, parts)?;
    let (repeated_pages, parent_pages) = (0, 0);
    Ok(Saved { identity, data_pages, zero_pages, repeated_pages, parent_pages, image_bytes })
}

/// The data region in the making, and the tables that describe it. Pages come in ascending
/// order, all of them.
struct Data<'a> {
    file: &'a File,
    /// Where each block begins in the file.
    places: &'a [u64],
    chunks: Vec<ChunkEntry>,
    index: Vec<u64>,
    zero_pages: u64,
    /// The first page of the chunk that is being gathered, and its bytes so far.
    first: Page,
    gathered: Vec<u8>,
}

impl<'a> Data<'a> {
    fn new(file: &'a File, places: &'a [u64]) -> Data<'a> {
        Data {
            file,
            places,
            chunks: Vec::new(),
            index: Vec::new(),
            zero_pages: 0,
            first: Page { block: BlockId(0), number: 0 },
            gathered: Vec::with_capacity(CHUNK_PAGES as usize * PAGE_SIZE),
        }
    }

    /// Leaves the next pages as a hole.
    fn zeros(&mut self, run: Run) -> io::Result<()> {
        self.store()?;
        self.zero_pages += run.count;
        self.index.extend((0..run.count).map(|_| PageEntry::ZERO));
        Ok(())
    }

    /// Adds the next page to the chunk that is being gathered. A chunk ends before zeros,
    /// at the end of an aligned group, and with its block.
    fn page(&mut self, page: Page, bytes: &PageBytes) -> io::Result<()> {
        if page.number.is_multiple_of(CHUNK_PAGES) || page.block != self.first.block {
            self.store()?;
        }
        if self.gathered.is_empty() {
            self.first = page;
        }
        let (chunk, slot) = (self.chunks.len() as u64, (page.number - self.first.number) as u8);
        self.index.push(PageEntry::Stored { layer: 0, chunk, slot }.encode());
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes the chunk that has been gathered, if there is one, to its place.
    fn store(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let offset = self.places[self.first.block.index()] + self.first.offset();
        self.file.write_all_at(&self.gathered, offset)?;
        self.chunks.push(ChunkEntry {
            offset,
            stored_len: self.gathered.len() as u32,
            codec: Codec::Plain,
            pages: (self.gathered.len() / PAGE_SIZE) as u8,
            checksum: xxh3_64(&self.gathered),
        });
        self.gathered.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<Data<'a>> {
        self.store()?;
        Ok(self)
    }
}
