//! Brings everything that nobody has asked for yet.
//!
//! Threads take the next stretch of memory from a shared list, read and decompress
//! it while holding nothing, and install what is still absent piece by piece,
//! standing aside for any fault between two pieces. A stretch that can't be read is
//! passed over: it only slows things down. What is absent at the end is asked for as
//! if the guest had, so that memory becomes whole or the failure is loud.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::window::Window;
use super::{FaultServer, Memory, MemoryError};
use crate::page::{BlockId, ChunkReader, PAGE_SHIFT, Run};

/// Bytes that are read and made ready in one go. Userfaultfd installs 2 MiB a call
/// at the speed of memory (measured), and a huge page of the usual size fits.
const WINDOW_BYTES: u64 = 2 << 20;

/// Brings all memory, with up to `threads` threads, and returns when all pages are
/// claimed by somebody. `stop` ends it early, between two pieces.
///
/// # Errors
/// When memory can't be brought for good: a way that is broken, or pages that can't
/// be read even at the second try. The guest can then never be whole.
pub fn prefetch(
    memory: &Arc<Memory>,
    threads: usize,
    stop: &AtomicBool,
) -> Result<(), MemoryError> {
    let windows = Windows::new(memory);
    let fill = || -> Result<(), MemoryError> {
        let mut filler = Filler::new(memory, stop)?;
        while let Some(window) = windows.next().filter(|_| !stop.load(Ordering::Relaxed)) {
            match filler.fill(window) {
                Err(MemoryError::Source { block, offset, source }) => tracing::warn!(
                    "prefetch passes over {window}: offset {offset:#x} of `{block}`: {source}"
                ),
                done => done?,
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.max(1))
            .map(|_| std::thread::Builder::new().name("prefetch".into()).spawn_scoped(scope, fill))
            .collect();
        let mut result = fill();
        // A helper that could not be spawned leaves its share to the others.
        for helper in helpers.into_iter().flatten() {
            let helped = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(helped);
        }
        result
    })?;
    if stop.load(Ordering::Relaxed) { Ok(()) } else { demand_the_rest(memory) }
}

/// Asks for every page that is still absent.
fn demand_the_rest(memory: &Arc<Memory>) -> Result<(), MemoryError> {
    let mut server = None;
    let windows = Windows::new(memory);
    while let Some(window) = windows.next() {
        for page in window.pages() {
            if memory.claims.is_claimed(page.block, page.number) {
                continue;
            }
            let server = match &mut server {
                Some(server) => server,
                none => none.insert(FaultServer::new(Arc::clone(memory))?),
            };
            server.serve(page.block, page.offset(), 1 << PAGE_SHIFT)?;
        }
    }
    Ok(())
}

/// The machine's memory, cut into windows that are handed out once each.
struct Windows {
    /// For each block, the windows before it and its pages.
    starts: Vec<(u64, u64)>,
    window_pages: u64,
    next: AtomicU64,
}

impl Windows {
    fn new(memory: &Memory) -> Windows {
        let window_pages = window_pages(memory);
        let mut before = 0;
        let start = |block: &crate::page::Block| {
            let start = (before, block.pages());
            before += block.pages().div_ceil(window_pages);
            start
        };
        let starts = memory.blocks().iter().map(start).collect();
        Windows { starts, window_pages, next: AtomicU64::new(0) }
    }

    fn next(&self) -> Option<Run> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let block = self.starts.partition_point(|(before, _)| *before <= index).checked_sub(1)?;
        let (before, pages) = self.starts[block];
        let first = (index - before) * self.window_pages;
        let count = pages.checked_sub(first).filter(|left| *left > 0)?.min(self.window_pages);
        Some(Run { block: BlockId(block as u16), first, count })
    }
}

fn window_pages(memory: &Memory) -> u64 {
    let largest = memory.blocks().iter().map(|block| block.page_size).max();
    WINDOW_BYTES.max(largest.unwrap_or(0)) >> PAGE_SHIFT
}

/// One thread's share.
struct Filler<'a> {
    memory: &'a Memory,
    stop: &'a AtomicBool,
    reader: Box<dyn ChunkReader>,
    window: Window,
}

impl<'a> Filler<'a> {
    fn new(memory: &'a Memory, stop: &'a AtomicBool) -> Result<Filler<'a>, MemoryError> {
        let reader = memory.source.reader().map_err(MemoryError::Reader)?;
        let window = Window::new(window_pages(memory) as usize);
        Ok(Filler { memory, stop, reader, window })
    }

    fn fill(&mut self, run: Run) -> Result<(), MemoryError> {
        let memory = self.memory;
        self.window.load(memory, &mut *self.reader, run, |page, _| {
            !memory.claims.is_claimed(page.block, page.number)
        })?;
        for (run, content) in self.window.pieces() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            memory.install(run, content, || memory.stand_aside())?;
        }
        Ok(())
    }
}
