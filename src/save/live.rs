//! The memory of a guest at its moment, read while it is still being captured.

use std::sync::Arc;
use std::time::Duration;

use super::captured::CapturedMemory;
use super::direct::{Place, Places, capture};
use super::merge::Merge;
use crate::host::procfs::Pagemap;
use crate::page::{
    Block, BlockId, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, Run, SourceError,
};

/// Pages that are captured and read at once: what a fault brings beside the page that it is about.
const GROUP: u64 = 16;

/// How long a page is waited for that QEMU's stream is about to bring.
const NAP: Duration = Duration::from_micros(50);

/// The pages of a guest that goes on: those that have been captured, and the others as soon as
/// somebody asks for them. One that the guest has not written to is read from the guest itself; one
/// that it has, QEMU has sent before.
pub(crate) struct LivePages {
    merge: Arc<Merge>,
    memory: Arc<CapturedMemory>,
    /// With the sizes of their pages in QEMU.
    blocks: Vec<Block>,
    /// The number of each block's first group.
    groups: Vec<u64>,
    guest: Option<(Places, Pagemap)>,
}

/// Why a page can't be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest that was forked, or its QEMU's stream, has ended before all of its memory was \
     captured: page {number} of block `{block}` is lost"
)]
struct Lost {
    block: String,
    number: u64,
}

impl LivePages {
    /// Those that `merge` captures and keeps in `memory`. `places` are in the stream's order.
    pub(super) fn new(
        merge: Arc<Merge>,
        memory: Arc<CapturedMemory>,
        blocks: Vec<Block>,
        places: Option<Places>,
    ) -> LivePages {
        let mut next = 0;
        let groups = blocks.iter().map(|block| {
            let first = next;
            next += block.pages().div_ceil(GROUP);
            first
        });
        let groups = groups.collect();
        let guest = places.and_then(|places| {
            let pagemap = Pagemap::open(places.pid()).ok()?;
            Some((places, pagemap))
        });
        LivePages { merge, memory, blocks, groups, guest }
    }

    /// The group of a page.
    fn group(&self, page: Page) -> Run {
        let first = page.number / GROUP * GROUP;
        let count = GROUP.min(self.blocks[page.block.index()].pages() - first);
        Run { block: page.block, first, count }
    }

    /// Waits until pages are captured, and captures them where that can be.
    fn ensure(&self, run: Run) -> Result<(), SourceError> {
        let mut buffer = [0; GROUP as usize * PAGE_SIZE];
        let mut readable = true;
        loop {
            if self.merge.has(run) {
                return Ok(());
            }
            if self.merge.is_broken() {
                let block = self.blocks[run.block.index()].name.clone();
                return Err(Lost { block, number: run.first }.into());
            }
            if let Some((places, pagemap)) = self.guest.as_ref().filter(|_| readable)
                && let Some(Place { start, read_only: false }) = places.of(run.block)
            {
                // What is not captured by this, QEMU has sent: it need not be read again.
                capture(places.pid(), pagemap, start, run, &self.merge, &mut buffer)?;
                readable = false;
                continue;
            }
            std::thread::sleep(NAP);
        }
    }

    /// The group of this number.
    fn group_of(&self, chunk: ChunkId) -> Run {
        let block = self.groups.partition_point(|first| *first <= chunk.0) - 1;
        let number = (chunk.0 - self.groups[block]) * GROUP;
        self.group(Page { block: BlockId(block as u16), number })
    }
}

impl PageSource for Arc<LivePages> {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn chunk_pages(&self) -> usize {
        GROUP as usize
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        let group = self.group(page);
        self.ensure(group)?;
        if self.memory.is_zero(page) {
            return Ok(Location::Zero);
        }
        let chunk = ChunkId(self.groups[page.block.index()] + page.number / GROUP);
        Ok(Location::Stored { chunk, slot: (page.number % GROUP) as usize })
    }

    fn is_zero(&self, page: Page) -> bool {
        self.merge.has(Run::single(page)) && self.memory.is_zero(page)
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        let buffer = vec![0; GROUP as usize * PAGE_SIZE];
        Ok(Box::new(LiveReader { pages: Arc::clone(self), buffer }))
    }
}

/// Reads groups of pages.
struct LiveReader {
    pages: Arc<LivePages>,
    buffer: Vec<u8>,
}

impl ChunkReader for LiveReader {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        let group = self.pages.group_of(chunk);
        self.pages.ensure(group)?;
        let bytes = &mut self.buffer[..group.bytes() as usize];
        self.pages.memory.read(group, bytes)?;
        Ok(bytes)
    }
}
