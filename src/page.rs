//! The vocabulary of the crate: blocks, pages, runs of pages, and the trait of a source
//! of pages.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a target page, the unit in which QEMU's migration stream carries
/// memory on x86 and on ARM's `virt` (`TARGET_PAGE_SIZE` in QEMU's `exec/cpu-all.h`).
pub const PAGE_SIZE: usize = 4096;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The bytes of one target page.
pub type PageBytes = [u8; PAGE_SIZE];

/// A RAMBlock's place in a machine's list of blocks. The list keeps the order of
/// the migration stream's block list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(pub u16);

impl BlockId {
    /// This block's position in the list of blocks.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// One RAMBlock of a machine, as QEMU names and sizes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// QEMU's name of the block (`idstr`), at most 255 bytes.
    pub name: String,
    /// Used length in bytes, a multiple of [`PAGE_SIZE`].
    pub len: u64,
    /// Size in bytes of the host pages that back the block: 4096, or the huge
    /// page size of hugetlbfs. A power of two, at least [`PAGE_SIZE`].
    pub page_size: u64,
}

impl Block {
    /// Number of target pages in the block.
    pub fn pages(&self) -> u64 {
        self.len >> PAGE_SHIFT
    }

    /// Number of target pages in one host page of the block.
    pub fn pages_per_host_page(&self) -> u64 {
        self.page_size >> PAGE_SHIFT
    }
}

/// One target page of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page {
    /// The block it lies in.
    pub block: BlockId,
    /// Its number within the block, counted in units of [`PAGE_SIZE`].
    pub number: u64,
}

impl Page {
    /// The page's offset in its block, in bytes.
    pub fn offset(self) -> u64 {
        self.number << PAGE_SHIFT
    }
}

/// Neighbouring target pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// The block they lie in.
    pub block: BlockId,
    /// The first page's number within the block.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

impl Run {
    /// The run of a single page.
    pub fn single(page: Page) -> Run {
        Run { block: page.block, first: page.number, count: 1 }
    }

    /// Offset of the first page in its block, in bytes.
    pub fn offset(self) -> u64 {
        self.first << PAGE_SHIFT
    }

    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        self.count << PAGE_SHIFT
    }

    /// Number of the page behind the last one.
    pub fn end(self) -> u64 {
        self.first + self.count
    }

    /// The pages of the run, in order.
    pub fn pages(self) -> impl Iterator<Item = Page> {
        (self.first..self.end()).map(move |number| Page { block: self.block, number })
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} offset {:#x}, {} pages", self.block.0, self.offset(), self.count)
    }
}

/// The number of a stored chunk, which holds one or more pages.
/// Meaningful only to the [`PageSource`] that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub u64);

/// Where a page's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// The page is all zeros; nothing is stored for it.
    Zero,
    /// The page is one of several in a chunk.
    Stored {
        /// The chunk that holds it.
        chunk: ChunkId,
        /// The page's place in the chunk, in pages.
        slot: usize,
    },
}

/// Why a source could not read a page. It names the source and the position in it; the
/// caller adds the page.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// A source of a machine's pages, which are verified.
pub trait PageSource: Send + Sync {
    /// The machine's blocks; [`BlockId`]s index this list.
    fn blocks(&self) -> &[Block];

    /// The most pages that a chunk holds. Pages of one aligned group of this many
    /// are likely to be stored together.
    fn chunk_pages(&self) -> usize;

    /// Where the page is stored. Reads at most the page's part of the index, once.
    ///
    /// # Errors
    /// When the page does not exist, or its part of the index is damaged.
    fn locate(&self, page: Page) -> Result<Location, SourceError>;

    /// Whether the page is all zeros. Cheaper than [`PageSource::locate`] where it is not;
    /// false if that is unknown.
    fn is_zero(&self, page: Page) -> bool {
        matches!(self.locate(page), Ok(Location::Zero))
    }

    /// Looks again at where its bytes lie: they may have been put back. Called now and then as
    /// long as something can't be read.
    fn look_again(&self) {}

    /// Whether its bytes come from afar: reading takes long, and many readers at a time are no slower
    /// than one.
    fn is_far(&self) -> bool {
        false
    }

    /// Tells that these pages are going to be read, in this order. A source whose bytes come from
    /// afar fetches them ahead; returns at once.
    fn will_need(&self, pages: &[Page]) {
        let _ = pages;
    }

    /// A reader with buffers of its own; each thread takes one.
    ///
    /// # Errors
    /// When the reader's buffers or decompressor cannot be made.
    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError>;
}

/// Reads chunks, one thread's share of a [`PageSource`].
pub trait ChunkReader: Send {
    /// Reads, decompresses and verifies one chunk. The bytes are those of its
    /// slots in order, each [`PAGE_SIZE`] long, valid until the next call.
    /// Allocates nothing once its buffers have grown to the chunk size.
    ///
    /// # Errors
    /// When the chunk can't be read or its checksum does not match. What is
    /// returned without error has been verified.
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError>;

    /// Does the same straight into `out`, saving a copy, if the chunk has exactly its
    /// length; false, with nothing read, if it has another.
    ///
    /// # Errors
    /// As for [`ChunkReader::read`]; `out` then holds anything.
    fn read_to(&mut self, chunk: ChunkId, out: &mut [u8]) -> Result<bool, SourceError> {
        let _ = (chunk, out);
        Ok(false)
    }

    /// Does the same for several chunks, whose bytes go into `out` one behind the other;
    /// each comes with the length in bytes that it must have. Returns how many were read,
    /// from the first on: none if the first has another length, and fewer than all wherever
    /// that suits. A source that stores neighbours side by side reads them in one go.
    ///
    /// # Errors
    /// As for [`ChunkReader::read`], of the first chunk; where a later one can't be had, the
    /// run ends before it.
    fn read_run(
        &mut self,
        chunks: &[(ChunkId, usize)],
        out: &mut [u8],
    ) -> Result<usize, SourceError> {
        match chunks.first() {
            Some((chunk, len)) => Ok(usize::from(self.read_to(*chunk, &mut out[..*len])?)),
            None => Ok(0),
        }
    }
}
