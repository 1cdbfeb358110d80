//! Pages whose bytes follow from their place.

use std::path::Path;
use std::sync::Arc;

use snapback::image::{Compression, Details, Image, ImageWriter, Sections, WriterOptions};
use snapback::page::{
    Block, BlockId, ChunkId, ChunkReader, Location, PAGE_SHIFT, PAGE_SIZE, Page, PageBytes,
    PageSource, SourceError,
};

/// A source that holds nothing: it computes what is asked for.
///
/// Stretches of pages are zero, long ones and short ones, and so are single pages in between; half
/// of each other page can't be compressed. A chunk holds the pages of its group in reverse order.
#[derive(Clone)]
pub struct Pattern {
    blocks: Vec<Block>,
    chunk_pages: usize,
    /// No page is zero.
    dense: bool,
    /// The chunk of this page can't be read.
    broken: Option<Page>,
}

impl Pattern {
    pub fn new(blocks: &[Block], chunk_pages: usize) -> Pattern {
        Pattern { blocks: blocks.to_vec(), chunk_pages, dense: false, broken: None }
    }

    /// The same without zero pages.
    pub fn dense(self) -> Pattern {
        Pattern { dense: true, ..self }
    }

    /// The same with one chunk that can't be read, the one that holds `page`.
    pub fn broken_at(self, page: Page) -> Pattern {
        Pattern { broken: Some(page), ..self }
    }

    pub fn is_zero(&self, page: Page) -> bool {
        let is_long = page.number / 512 % 4 == 1;
        let is_short = page.number / 96 % 4 == 3;
        !self.dense && (is_long || is_short || mix(page, 0).is_multiple_of(5))
    }

    /// One word of a page.
    pub fn word(&self, page: Page, index: usize) -> u64 {
        match self.is_zero(page) {
            true => 0,
            // Never zero, so that a page that was not brought can't pass for one.
            false if index.is_multiple_of(2) => mix(page, index as u64) | 1,
            false => 0x5555_5555_5555_5555,
        }
    }

    pub fn page(&self, page: Page) -> PageBytes {
        let mut bytes = [0; PAGE_SIZE];
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.word(page, index).to_le_bytes());
        }
        bytes
    }

    fn chunk(&self, page: Page) -> ChunkId {
        ChunkId((u64::from(page.block.0) << 48) | (page.number / self.chunk_pages as u64))
    }
}

fn mix(page: Page, index: u64) -> u64 {
    let place = (u64::from(page.block.0) << 56) ^ (page.number << PAGE_SHIFT) ^ index;
    let mixed = (place ^ (place >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

impl PageSource for Pattern {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        if self.is_zero(page) {
            return Ok(Location::Zero);
        }
        let slot = self.chunk_pages - 1 - page.number as usize % self.chunk_pages;
        Ok(Location::Stored { chunk: self.chunk(page), slot })
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        Ok(Box::new(Computing { pattern: self.clone(), bytes: Vec::new() }))
    }
}

struct Computing {
    pattern: Pattern,
    bytes: Vec<u8>,
}

impl ChunkReader for Computing {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        if self.pattern.broken.is_some_and(|page| self.pattern.chunk(page) == chunk) {
            return Err("this chunk is broken".into());
        }
        let block = BlockId((chunk.0 >> 48) as u16);
        let pages = self.pattern.chunk_pages as u64;
        let first = (chunk.0 & ((1 << 48) - 1)) * pages;
        self.bytes.clear();
        for number in (first..first + pages).rev() {
            self.bytes.extend_from_slice(&self.pattern.page(Page { block, number }));
        }
        Ok(&self.bytes)
    }
}

/// Writes an image of all the pattern's pages to `path`, and opens it.
pub fn write_image(pattern: &Pattern, path: &Path, compression: Compression) -> Arc<Image> {
    let chunk_pages = pattern.chunk_pages;
    let mut options = WriterOptions::default();
    (options.compression, options.chunk_pages) = (compression, chunk_pages);
    let mut writer = ImageWriter::create(path, options, pattern.blocks.clone()).unwrap();
    for (n, block) in pattern.blocks.iter().enumerate() {
        for number in 0..block.pages() {
            let page = Page { block: BlockId(n as u16), number };
            match pattern.is_zero(page) {
                true => writer.zero(page).unwrap(),
                false => writer.page(page, &pattern.page(page)).unwrap(),
            }
        }
    }
    writer.finish(Details::default(), Sections::default()).unwrap();
    Image::open(path).unwrap()
}
