//! A guest's memory, as an image holds it, in ours.

// Each benchmark uses a part of this.
#![allow(dead_code)]

use std::path::Path;

use snapback::image::Image;
use snapback::page::{Block, BlockId, Location, PAGE_SIZE, Page, PageBytes, PageSource};

use crate::support::Result;

/// All pages of a machine.
pub struct Memory {
    pub blocks: Vec<Block>,
    /// Each block's bytes.
    bytes: Vec<Vec<u8>>,
}

impl Memory {
    /// Reads an image's memory.
    ///
    /// # Errors
    /// When the image can't be read or is damaged.
    pub fn of(image: &Path) -> Result<Memory> {
        let image = Image::open(image)?;
        let blocks = image.blocks().to_vec();
        let mut bytes: Vec<Vec<u8>> =
            blocks.iter().map(|block| vec![0; block.len as usize]).collect();
        let mut reader = image.reader()?;
        for page in pages(&blocks) {
            if let Location::Stored { chunk, slot } = image.locate(page)? {
                let stored = &reader.read(chunk)?[slot * PAGE_SIZE..][..PAGE_SIZE];
                bytes[page.block.index()][page.offset() as usize..][..PAGE_SIZE]
                    .copy_from_slice(stored);
            }
        }
        Ok(Memory { blocks, bytes })
    }

    /// Every page, in order.
    pub fn pages(&self) -> impl Iterator<Item = (Page, &PageBytes)> {
        (0..).zip(&self.bytes).flat_map(|(block, bytes)| {
            (0..)
                .zip(bytes.as_chunks::<PAGE_SIZE>().0)
                .map(move |(number, bytes)| (Page { block: BlockId(block), number }, bytes))
        })
    }

    /// The pages of every aligned group of so many.
    pub fn groups(&self, pages: usize) -> impl Iterator<Item = &[PageBytes]> {
        self.bytes.iter().flat_map(move |bytes| bytes.as_chunks().0.chunks(pages))
    }

    /// What a chunk of so many pages would hold: every group's pages that are not all
    /// zeros.
    pub fn chunks(&self, pages: usize) -> Vec<Vec<u8>> {
        let packed = self.groups(pages).map(|group| {
            let stored = group.iter().filter(|page| !is_zero(page));
            stored.flatten().copied().collect::<Vec<u8>>()
        });
        packed.filter(|chunk| !chunk.is_empty()).collect()
    }

    /// Bytes in pages that are not all zeros.
    pub fn data_bytes(&self) -> u64 {
        (self.pages().filter(|(_, bytes)| !is_zero(bytes)).count() * PAGE_SIZE) as u64
    }

    /// Bytes of all pages.
    pub fn all_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }
}

pub fn is_zero(page: &PageBytes) -> bool {
    *page == [0; PAGE_SIZE]
}

/// All pages of these blocks, in order.
pub fn pages(blocks: &[Block]) -> impl Iterator<Item = Page> {
    (0..).zip(blocks).flat_map(|(block, of)| {
        (0..of.pages()).map(move |number| Page { block: BlockId(block), number })
    })
}
