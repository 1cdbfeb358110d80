//! Brings all pages that were not requested yet, in the order in which the guest is likely
//! to use them.
//!
//! 1. The working set, as it was first touched in an earlier revert.
//! 2. Zero ranges, in large calls, where the transport can do that.
//! 3. The rest, in windows of 2 MiB.
//!
//! Threads take the next window from a shared list, read and decompress a part of it at
//! a time while holding nothing, and install what is still absent, standing aside for
//! any fault between two reads (briefly) and between two calls. A stretch that can't be
//! read is passed over. What is absent at the end is tried once more, page by page, so that
//! memory becomes whole or the failure is loud.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::pace::{FillDelay, Pace};
use super::window::Window;
use super::{Content, Memory, MemoryError};
use crate::page::{Block, BlockId, ChunkReader, PAGE_SHIFT, PAGE_SIZE, Page, Run};

/// Bytes that a thread takes on at once: memory that one table of pages maps, so that
/// two threads don't meet at its lock, and a huge page of the usual size.
const WINDOW_BYTES: u64 = 2 << 20;

/// Bytes that are read and made ready in one go, and then installed while they lie in
/// the processor's cache still.
const PART_BYTES: u64 = 256 << 10;

/// What is brought, and how fast.
#[derive(Debug, Clone, Default)]
pub struct FillOptions {
    /// Threads that fill; 0 means 1.
    pub threads: usize,
    /// Pages to bring first, in this order.
    pub working_set: Vec<Page>,
    /// The most bytes a second that are read and installed; as fast as can be without.
    /// Zeros, which are read from nowhere, don't count.
    pub rate: Option<u64>,
    /// Nothing is brought for so long, beside what is asked for.
    pub hold: Option<Duration>,
    /// What anything beyond the working set waits for.
    pub delay: Option<FillDelay>,
}

/// Brings all memory, and returns when all pages are claimed by somebody, but for those that
/// can't be read: it returns how many of them there are. `pace` holds it back, and ends it early.
///
/// # Errors
/// When memory can't be brought for good: a transport that is broken, or pages that can't be read
/// even at the second try, where nobody listens ([`Memory::telling`]).
pub fn prefetch(
    memory: &Arc<Memory>,
    options: &FillOptions,
    pace: &Pace,
) -> Result<u64, MemoryError> {
    if let Some(hold) = options.hold {
        pace.wait(hold);
    }
    bring_set(memory, &options.working_set, pace, true)?;
    if let Some(delay) = options.delay {
        pace.wait_for_turn(memory, delay);
    }
    let _filling = Filling::new(memory);
    let zeros = Windows::new(memory, |block| memory.likes_large_zeros(block));
    in_parallel(options.threads, zeros.count(), || fill_zeros(memory, &zeros, pace))?;
    let rest = Windows::new(memory, |_| true);
    in_parallel(options.threads, rest.count(), || fill_rest(memory, &rest, pace))?;
    let missing = fill_passed_over(memory, pace, true)?;
    memory.filled.store(true, Ordering::Release);
    Ok(missing)
}

/// Brings a working set only, and returns when it is in place or on its way. The guest
/// waits for it, so `pace` ends it but no rate holds it back.
///
/// # Errors
/// As for [`prefetch`].
pub fn preload(memory: &Arc<Memory>, working_set: &[Page], pace: &Pace) -> Result<(), MemoryError> {
    bring_set(memory, working_set, pace, false)
}

/// Brings a working set, at the pace's rate if it is `capped`. Its order is worth more than
/// a second thread: this one does it alone.
fn bring_set(
    memory: &Arc<Memory>,
    working_set: &[Page],
    pace: &Pace,
    capped: bool,
) -> Result<(), MemoryError> {
    if working_set.is_empty() {
        return Ok(());
    }
    let _filling = Filling::new(memory);
    memory.source.will_need(working_set);
    let mut filler = Filler::new(memory, pace, capped)?;
    let group = memory.source.chunk_pages() as u64;
    for page in working_set {
        if pace.is_stopped() {
            break;
        }
        let Some(block) = memory.blocks().get(page.block.index()) else { continue };
        if page.number >= block.pages() || memory.claims.is_claimed(page.block, page.number) {
            continue;
        }
        // What is stored with it comes for free.
        let group = group.max(block.pages_per_host_page());
        let first = page.number / group * group;
        let count = group.min(block.pages() - first);
        memory.pass_over(filler.fill(Run { block: page.block, first, count }))?;
    }
    Ok(())
}

/// Counts as a prefetcher at work as long as it lives.
struct Filling<'a>(&'a Memory);

impl<'a> Filling<'a> {
    fn new(memory: &'a Memory) -> Filling<'a> {
        memory.filling.fetch_add(1, Ordering::Relaxed);
        Filling(memory)
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        self.0.filling.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Does `work` on several threads, this one among them. Without pieces there is nothing to do.
fn in_parallel(
    threads: usize,
    pieces: usize,
    work: impl Fn() -> Result<(), MemoryError> + Sync,
) -> Result<(), MemoryError> {
    if pieces == 0 {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let work = &work;
        let start = |_| {
            let name = "prefetch".to_owned();
            std::thread::Builder::new().name(name).spawn_scoped(scope, work)
        };
        // A helper that can't be started leaves its share to the others.
        let helpers: Vec<_> = (1..threads.max(1).min(pieces)).flat_map(start).collect();
        let mut result = work();
        for helper in helpers {
            let helped = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(helped);
        }
        result
    })
}

/// Installs stretches of zeros, each as far as it reaches within its window.
fn fill_zeros(memory: &Memory, windows: &Windows, pace: &Pace) -> Result<(), MemoryError> {
    while let Some(window) = windows.next().filter(|_| !pace.is_stopped()) {
        let is_zero = |page: Page| memory.source.is_zero(page);
        let mut pages = window.pages().peekable();
        while let Some(page) = pages.next() {
            if !is_zero(page) {
                continue;
            }
            let mut count = 1;
            while pages.next_if(|next| is_zero(*next)).is_some() {
                count += 1;
            }
            let run = Run { count, ..Run::single(page) };
            let installed = memory.install(run, Content::Zero, || memory.stand_aside());
            memory.pass_over(installed.map(drop))?;
        }
    }
    Ok(())
}

fn fill_rest(memory: &Memory, windows: &Windows, pace: &Pace) -> Result<(), MemoryError> {
    let mut filler = Filler::new(memory, pace, true)?;
    while let Some(window) = windows.next().filter(|_| !pace.is_stopped()) {
        memory.pass_over(filler.fill(window))?;
    }
    Ok(())
}

/// Brings every page that is still absent, one by one. Returns how many can't be read; where it
/// does not `go_on`, it ends at the first of them.
pub(super) fn fill_passed_over(
    memory: &Memory,
    pace: &Pace,
    go_on: bool,
) -> Result<u64, MemoryError> {
    let mut filler = Filler::new(memory, pace, true)?;
    let windows = Windows::new(memory, |_| true);
    let mut missing = 0;
    while let Some(window) = windows.next() {
        let unit = memory.block(window.block).pages_per_host_page();
        for first in (window.first..window.end()).step_by(unit as usize) {
            if memory.claims.is_claimed(window.block, first) {
                continue;
            }
            if pace.is_stopped() || (missing > 0 && !go_on) {
                return Ok(missing);
            }
            let page = Run { first, count: unit.min(window.end() - first), ..window };
            let filled = filler.fill(page);
            if memory.listener.is_none() {
                filled?;
            } else if !memory.pass_over(filled)? {
                missing += page.count;
            }
        }
    }
    Ok(missing)
}

/// Some of the machine's memory, cut into windows that are handed out once each.
struct Windows {
    /// Each block with the number of windows before it, and its pages.
    blocks: Vec<(usize, BlockId, u64)>,
    window_pages: u64,
    count: usize,
    next: AtomicUsize,
}

impl Windows {
    fn new(memory: &Memory, wanted: impl Fn(BlockId) -> bool) -> Windows {
        let window_pages = window_pages(memory);
        let mut count = 0;
        let with_start = |(index, block): (usize, &Block)| {
            let id = BlockId(index as u16);
            let before = count;
            count += match wanted(id) {
                true => block.pages().div_ceil(window_pages) as usize,
                false => 0,
            };
            (count > before).then_some((before, id, block.pages()))
        };
        let blocks = memory.blocks().iter().enumerate().filter_map(with_start).collect();
        Windows { blocks, window_pages, count, next: AtomicUsize::new(0) }
    }

    fn count(&self) -> usize {
        self.count
    }

    fn next(&self) -> Option<Run> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        if index >= self.count {
            return None;
        }
        let at = self.blocks.partition_point(|(before, ..)| *before <= index).checked_sub(1)?;
        let (before, block, pages) = self.blocks[at];
        let first = (index - before) as u64 * self.window_pages;
        Some(Run { block, first, count: self.window_pages.min(pages - first) })
    }
}

fn window_pages(memory: &Memory) -> u64 {
    WINDOW_BYTES.max(largest_page(memory)) >> PAGE_SHIFT
}

fn part_pages(memory: &Memory) -> u64 {
    PART_BYTES.max(largest_page(memory)) >> PAGE_SHIFT
}

/// Bytes of the largest host page that backs a block.
fn largest_page(memory: &Memory) -> u64 {
    memory.blocks().iter().map(|block| block.page_size).max().unwrap_or(0)
}

/// One thread's share.
pub(super) struct Filler<'a> {
    memory: &'a Memory,
    pace: &'a Pace,
    /// Whether the pace's rate holds for it.
    capped: bool,
    reader: Box<dyn ChunkReader>,
    window: Window,
}

impl<'a> Filler<'a> {
    pub fn new(
        memory: &'a Memory,
        pace: &'a Pace,
        capped: bool,
    ) -> Result<Filler<'a>, MemoryError> {
        let reader = memory.source.reader().map_err(MemoryError::Reader)?;
        let window = Window::new(part_pages(memory) as usize);
        Ok(Filler { memory, pace, capped, reader, window })
    }

    pub fn fill(&mut self, run: Run) -> Result<(), MemoryError> {
        let mut first = run.first;
        while first < run.end() {
            let count = self.window.capacity().min(run.end() - first);
            self.fill_part(Run { first, count, ..run })?;
            first += count;
        }
        Ok(())
    }

    fn fill_part(&mut self, run: Run) -> Result<(), MemoryError> {
        let memory = self.memory;
        self.window.load(
            memory,
            &mut *self.reader,
            run,
            |page| !memory.claims.is_claimed(page.block, page.number),
            |_, _| true,
            || _ = memory.stand_aside_briefly(),
        )?;
        for (run, content) in self.window.pieces() {
            if self.pace.is_stopped() {
                return Ok(());
            }
            let installed = memory.install(run, content, || memory.stand_aside())?;
            if self.capped && matches!(content, Content::Bytes(_)) {
                self.pace.account(installed * PAGE_SIZE as u64);
            }
        }
        Ok(())
    }
}
