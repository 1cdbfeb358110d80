//! The memory of a guest at its moment, read while it is still being captured.

use std::sync::Arc;
use std::time::Duration;

use super::captured::CapturedMemory;
use crate::page::{
    Block, BlockId, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, Run, SourceError,
};

/// Pages that are captured and read at once: what a fault brings beside the page that it is about.
pub const GROUP: u64 = 16;

/// How long a page is waited for that is about to be captured.
const NAP: Duration = Duration::from_micros(50);

/// Who captures memory.
pub trait Capture: Send + Sync {
    /// Captures pages of one group ahead of others, as far as that can be, or has it done. Those
    /// that it leaves out are captured by somebody else.
    ///
    /// # Errors
    /// When pages can't be captured.
    fn capture(&self, run: Run) -> Result<(), SourceError>;

    /// Whether some of these pages are not captured, and nobody captures them any more.
    fn is_over(&self, run: Run) -> bool;
}

/// The pages of a guest that goes on: those that have been captured, and the others as soon as
/// somebody asks for them.
pub struct LivePages {
    memory: Arc<CapturedMemory>,
    capture: Box<dyn Capture>,
    /// With the sizes of their pages in QEMU.
    blocks: Vec<Block>,
    /// The number of each block's first group.
    groups: Vec<u64>,
}

/// Why a page can't be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest that was forked or followed, or the save of it, has ended before all of its memory \
     was captured: page {number} of block `{block}` is lost"
)]
struct Lost {
    block: String,
    number: u64,
}

impl LivePages {
    /// Those that `capture` puts into `memory`.
    pub fn new(
        memory: Arc<CapturedMemory>,
        blocks: Vec<Block>,
        capture: Box<dyn Capture>,
    ) -> LivePages {
        let mut next = 0;
        let groups = blocks.iter().map(|block| {
            let first = next;
            next += block.pages().div_ceil(GROUP);
            first
        });
        let groups = groups.collect();
        LivePages { memory, capture, blocks, groups }
    }

    /// Where they are put.
    pub fn memory(&self) -> &Arc<CapturedMemory> {
        &self.memory
    }

    /// The group of a page.
    fn group(&self, page: Page) -> Run {
        let first = page.number / GROUP * GROUP;
        let count = GROUP.min(self.blocks[page.block.index()].pages() - first);
        Run { block: page.block, first, count }
    }

    /// Waits until pages of one group are captured, and has them captured.
    fn ensure(&self, run: Run) -> Result<(), SourceError> {
        if self.memory.has(run) {
            return Ok(());
        }
        self.capture.capture(run)?;
        match self.wait_for(run) {
            true => Ok(()),
            false => {
                let block = self.blocks[run.block.index()].name.clone();
                Err(Lost { block, number: run.first }.into())
            }
        }
    }

    /// Waits until pages are captured, or never will be. Whether they are.
    fn wait_for(&self, run: Run) -> bool {
        loop {
            // Asked before: what is captured last is here when nobody captures any more.
            let over = self.capture.is_over(run);
            if self.memory.has(run) {
                return true;
            }
            if over {
                return false;
            }
            std::thread::sleep(NAP);
        }
    }

    /// Captures a page, with its group, ahead of others, if there is such a page. Whoever waits for
    /// it sees whether that went well.
    pub fn capture_now(&self, page: Page) {
        let exists = |block: &Block| page.number < block.pages();
        if self.blocks.get(page.block.index()).is_some_and(exists) {
            let group = self.group(page);
            if !self.memory.has(group)
                && let Err(error) = self.capture.capture(group)
            {
                tracing::debug!("{group} is not captured ahead of its turn: {error}");
            }
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
        self.memory.has(Run::single(page)) && self.memory.is_zero(page)
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
