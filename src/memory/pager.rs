//! Demand paging: brings the pages that the guest waits for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::window::Window;
use super::{Memory, MemoryError};
use crate::page::{BlockId, ChunkReader, Location, PAGE_SHIFT, Page, Run};

/// Answers requests for pages. Each thread that does so has a pager, with buffers of its own.
///
/// An answer takes no lock but what the transport needs, and allocates nothing once the
/// source has read the part of its index that tells of the page. A request for a page that
/// somebody else has claimed needs no answer: whoever claimed it holds its bytes and installs
/// it now.
pub struct Pager {
    pub(super) memory: Arc<Memory>,
    pub(super) reader: Box<dyn ChunkReader>,
    pub(super) window: Window,
    report: FaultReport,
    /// Until when demands are recorded.
    record_until: Option<Instant>,
}

/// What a pager has answered.
#[derive(Debug, Clone)]
pub struct FaultReport {
    /// How long answers took, in nanoseconds, from reading the request to handing the page to
    /// the transport. Requests that needed no page are not counted.
    pub timings: Histogram<u64>,
    /// The pages that were requested and had to be brought, each with the time of its request,
    /// in that order.
    pub demanded: Vec<(Instant, Page)>,
}

impl FaultReport {
    /// A report of nothing.
    pub fn none() -> FaultReport {
        FaultReport::new()
    }

    fn new() -> FaultReport {
        let timings = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        let timings = timings.unwrap_or_else(|_| unreachable!("the bounds are in order"));
        FaultReport { timings, demanded: Vec::new() }
    }

    /// Both reports as one.
    pub fn merged(mut self, other: FaultReport) -> FaultReport {
        // Both histograms have the same bounds.
        let _ = self.timings.add(other.timings);
        self.demanded.extend(other.demanded);
        self.demanded.sort_by_key(|(when, _)| *when);
        self
    }
}

/// Demands that one pager records at most. They are allocated ahead, so that recording
/// allocates nothing; pages of it that are never written to take no memory.
const MAX_DEMANDS: usize = 1 << 18;

/// The longest time that the histogram distinguishes, in nanoseconds: a minute.
const LONGEST_NS: u64 = 60_000_000_000;

/// Zeros that were left out are installed so many pages at a time: 64 KiB, for a guest that
/// writes to fresh memory.
const LEFT_AT_ONCE: u64 = 16;

/// Makes prefetch stand aside as long as it lives.
struct Urgent<'a>(&'a Memory);

impl<'a> Urgent<'a> {
    fn new(memory: &'a Memory) -> Urgent<'a> {
        memory.urgent.fetch_add(1, Ordering::AcqRel);
        Urgent(memory)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.urgent.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pager {
    /// A pager for this memory.
    ///
    /// # Errors
    /// When the source can't give a reader.
    pub fn new(memory: Arc<Memory>) -> Result<Pager, MemoryError> {
        let reader = memory.source.reader().map_err(MemoryError::Reader)?;
        let largest = memory.blocks().iter().map(|block| block.pages_per_host_page()).max();
        let pages = memory.source.chunk_pages().max(largest.unwrap_or(1) as usize);
        let window = Window::new(pages);
        Ok(Pager { memory, reader, window, report: FaultReport::new(), record_until: None })
    }

    /// Records the demands of the next `window`.
    pub fn recording(mut self, window: Duration) -> Pager {
        self.report.demanded.reserve_exact(MAX_DEMANDS);
        self.record_until = Instant::now().checked_add(window);
        self
    }

    /// What it has answered.
    pub fn into_report(self) -> FaultReport {
        self.report
    }

    /// Installs the memory that was requested, with its neighbours in the same chunks.
    /// `offset` and `len` are in bytes, within the block; the answer's time counts from
    /// `heard`.
    ///
    /// What the source can't give at once, nor at a second try, is told and left absent, where
    /// somebody listens ([`Memory::telling`]): the thread that waits for it goes on waiting.
    ///
    /// # Errors
    /// When there is no such memory, when the source can't give it and nobody listens, or when it
    /// can't be installed. The thread that waits for it then waits forever: the error is fatal.
    pub fn serve(
        &mut self,
        block: BlockId,
        offset: u64,
        len: u64,
        heard: Instant,
    ) -> Result<(), MemoryError> {
        let memory = Arc::clone(&self.memory);
        memory.claims.count_request();
        let _urgent = Urgent::new(&memory);
        let end = offset.checked_add(len).filter(|end| *end <= memory.block(block).len);
        let Some(end) = end.filter(|_| len > 0) else {
            let block = memory.block(block).name.clone();
            return Err(MemoryError::NoSuchMemory { block, offset, len });
        };
        let unit = memory.block(block).pages_per_host_page();
        let mut number = (offset >> PAGE_SHIFT) & !(unit - 1);
        while number << PAGE_SHIFT < end {
            self.serve_host_page(&memory, Page { block, number }, unit, heard)?;
            number += unit;
        }
        Ok(())
    }

    /// Installs one host page, which begins at target page `page`.
    fn serve_host_page(
        &mut self,
        memory: &Memory,
        page: Page,
        unit: u64,
        heard: Instant,
    ) -> Result<(), MemoryError> {
        let host_page = cut(memory, page, unit);
        let mut mine = None;
        memory.claims.claim(host_page, |claimed| {
            mine = Some(claimed);
            Ok::<(), MemoryError>(())
        })?;
        let Some(mine) = mine else {
            // It was installed between the fault and now, or will be at once by whoever
            // has claimed it, who then wakes the waiting thread.
            return match memory.claims.is_present(page.block, page.number) {
                true => serve_again(memory, host_page),
                false => Ok(()),
            };
        };

        let brought = match self.bring(memory, page, mine, false) {
            // A disk may fail once, and a neighbour's part of the index may be what is damaged.
            Err(MemoryError::Source { .. }) => self.bring(memory, page, mine, true),
            brought => brought,
        };
        if let Err(error) = brought {
            // Who comes later must not rely on a claim that nobody fulfils.
            memory.claims.release(mine);
            return memory.leave_awaited(mine, error);
        }
        self.record(page, heard);
        let mut installed = mine.count;
        for (run, content) in self.window.pieces() {
            installed += memory.install(run, content, || {})?;
        }
        memory.demanded.fetch_add(installed, Ordering::Relaxed);
        Ok(())
    }

    /// Records that a page has been brought which was requested at `heard`.
    fn record(&mut self, page: Page, heard: Instant) {
        let report = &mut self.report;
        report.timings.saturating_record(heard.elapsed().as_nanos() as u64);
        if self.record_until.is_some_and(|until| heard < until)
            && report.demanded.len() < MAX_DEMANDS
        {
            report.demanded.push((heard, page));
        }
    }

    /// Installs the host page `mine`, which is claimed and begins with `page`, and makes
    /// its neighbours ready, unless it is to come `alone`.
    fn bring(
        &mut self,
        memory: &Memory,
        page: Page,
        mine: Run,
        alone: bool,
    ) -> Result<(), MemoryError> {
        let unit = memory.block(page.block).pages_per_host_page();
        let location = memory.source.locate(page).map_err(|e| memory.source_error(mine, e))?;
        let group = self.window.capacity().min(unit.max(memory.source.chunk_pages() as u64));
        let first = page.number / group * group;
        let around = match alone {
            true => mine,
            false => cut(memory, Page { block: page.block, number: first }, group),
        };
        let is_mine = |near: Page| (mine.first..mine.end()).contains(&near.number);
        self.window.load(
            memory,
            &mut *self.reader,
            around,
            |near| is_mine(near) || !memory.claims.is_claimed(near.block, near.number),
            |near, stored| is_mine(near) || together(stored, location),
            || {},
        )?;

        // The one that is waited for goes first; its neighbours follow.
        memory.install_claimed(mine, mine, self.window.host_page(mine))
    }
}

/// Answers a request for a host page that counts as in place: the thread is woken to look again.
/// If the page was left to the kernel it is installed now, with those like it behind it, unless it
/// would go by the socket: QEMU must not be sent what may have been installed since. And what was
/// sent by the socket may still be on its way: installed as well, it would come a second time.
fn serve_again(memory: &Memory, host_page: Run) -> Result<(), MemoryError> {
    let is_left = |number: &u64| memory.claims.is_left(host_page.block, *number);
    if !memory.leaves_zeros(host_page.block) || !is_left(&host_page.first) {
        return memory.wake(host_page);
    }
    let first = Page { block: host_page.block, number: host_page.first };
    let most = cut(memory, first, LEFT_AT_ONCE);
    let count = (most.first..most.end()).take_while(is_left).count() as u64;
    memory.make_up(Run { count, ..host_page })
}

/// `count` pages from `page` on, as far as the block reaches.
fn cut(memory: &Memory, page: Page, count: u64) -> Run {
    let pages = memory.block(page.block).pages();
    Run { block: page.block, first: page.number, count: count.min(pages - page.number) }
}

/// Whether a page comes for free with another.
fn together(a: Location, b: Location) -> bool {
    match (a, b) {
        (Location::Zero, Location::Zero) => true,
        (Location::Stored { chunk: a, .. }, Location::Stored { chunk: b, .. }) => a == b,
        _ => false,
    }
}
