//! Bringing a guest's memory back: which page when, and by whom.
//!
//! [`Memory`] ties together where pages come from (a [`PageSource`]), how they travel (a
//! [`Transport`]), and who brings which page ([`claim`]). A [`FaultHandler`] takes the guest's
//! faults, a [`Pager`] brings what is asked for, [`mod@prefetch`] brings the rest. None of them
//! knows how a page travels, and nothing here knows of images or of how QEMU was started.

pub mod captured;
mod chunk_cache;
pub mod claim;
mod fault_handler;
mod fault_reader;
pub mod live;
mod pace;
pub mod pager;
pub mod prefetch;
mod probe;
mod repair;
mod spin;
mod unreadable;
mod window;
pub mod working_set;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use chunk_cache::{CacheFigures, CachedSource};
pub use claim::ClaimMap;
pub use fault_handler::FaultHandler;
pub use fault_reader::FaultReader;
pub use pace::{FillDelay, Pace};
pub use pager::{FaultReport, Pager};
pub use prefetch::{FillOptions, prefetch, preload};
pub use repair::repair;
pub use unreadable::Unreadable;
pub use working_set::{WorkingSet, WorkingSetError};

use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};
use crate::page::{Block, BlockId, PAGE_SIZE, Page, PageSource, Run, SourceError};
use crate::transport::{Transport, TransportError};
use unreadable::Listener;

/// Why memory could not be brought.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The source could not give a page.
    #[error("the memory at offset {offset:#x} of block `{block}` can't be had: {source}")]
    Source {
        /// The block's name.
        block: String,
        /// Offset in the block, in bytes.
        offset: u64,
        /// What the source said.
        source: SourceError,
    },
    /// A page could not be installed.
    #[error("installing memory at offset {offset:#x} of block `{block}` failed: {source}")]
    Install {
        /// The block's name.
        block: String,
        /// Offset in the block, in bytes.
        offset: u64,
        /// What went wrong.
        source: TransportError,
    },
    /// The source can't be read at all.
    #[error("no reader for the guest's memory: {0}")]
    Reader(SourceError),
    /// Faults can't be taken from userfaultfd.
    #[error("taking the guest's faults failed: {0}")]
    FaultHandler(TransportError),
    /// QEMU asked for memory that its machine does not have.
    #[error(
        "QEMU asked for {len} bytes at offset {offset:#x} of block `{block}`, which the image \
         does not hold: it was started as another machine than the one that was saved"
    )]
    NoSuchMemory {
        /// The block's name.
        block: String,
        /// Offset in the block, in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

impl MemoryError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            // What a source says of itself is for those to tell who know it.
            MemoryError::Source { .. } | MemoryError::Reader(_) => ErrorKind::Io,
            MemoryError::Install { source, .. } | MemoryError::FaultHandler(source) => {
                source.kind()
            }
            MemoryError::NoSuchMemory { .. } => ErrorKind::QemuFailed,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<PathBuf>, None)
    }
}

/// How much of a guest's memory is in place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that are in place.
    pub present: u64,
    /// Pages of the machine.
    pub total: u64,
    /// Requests of the guest's, including those for pages that were already being installed.
    pub requests: u64,
    /// Pages installed because of a request, including their neighbours.
    pub demanded: u64,
}

/// One guest's memory while it is brought back.
pub struct Memory {
    source: Arc<dyn PageSource>,
    transport: Box<dyn Transport>,
    claims: ClaimMap,
    /// Requests that are being answered now; prefetch stands aside while there are any.
    urgent: AtomicUsize,
    /// Prefetchers at work.
    filling: AtomicUsize,
    /// Whether prefetch has brought all that it could.
    filled: AtomicBool,
    /// Who is told of memory that can't be read; without, it is an error.
    listener: Option<Listener>,
    demanded: AtomicU64,
    /// Signalled once, when the last page is in place.
    complete: (Mutex<bool>, Condvar),
}

impl Memory {
    /// The memory that `source` holds, none of it in place yet. Pages go by `transport`.
    pub fn new(source: Arc<dyn PageSource>, transport: Box<dyn Transport>) -> Memory {
        let claims = ClaimMap::new(source.blocks());
        Memory::claimed(source, transport, claims)
    }

    /// The memory that `source` holds, in place as `claims` says, which is a map of its blocks.
    pub fn claimed(
        source: Arc<dyn PageSource>,
        transport: Box<dyn Transport>,
        claims: ClaimMap,
    ) -> Memory {
        let complete = (Mutex::new(claims.present() == claims.total()), Condvar::new());
        Memory {
            source,
            transport,
            claims,
            urgent: AtomicUsize::new(0),
            filling: AtomicUsize::new(0),
            filled: AtomicBool::new(false),
            listener: None,
            demanded: AtomicU64::new(0),
            complete,
        }
    }

    /// The same memory, where what can't be read is told and left absent. `tell` is called on the
    /// path of a fault, which waits for it.
    pub fn telling(self, tell: impl Fn(Unreadable) + Send + Sync + 'static) -> Memory {
        Memory { listener: Some(Listener::new(tell)), ..self }
    }

    /// The machine's blocks.
    pub fn blocks(&self) -> &[Block] {
        self.source.blocks()
    }

    /// The most pages that are stored together.
    pub fn chunk_pages(&self) -> usize {
        self.source.chunk_pages()
    }

    /// How much is in place.
    pub fn counts(&self) -> Counts {
        Counts {
            present: self.claims.present(),
            total: self.claims.total(),
            requests: self.claims.requests(),
            demanded: self.demanded.load(Ordering::Relaxed),
        }
    }

    /// Whether every page of this block is in place or being installed.
    pub fn is_settled(&self, block: BlockId) -> bool {
        self.claims.all_claimed(block)
    }

    /// Whether the host page that holds this page is in place.
    pub fn is_present(&self, page: Page) -> bool {
        self.claims.is_present(page.block, page.number)
    }

    /// Whether the host page that holds this page is in place or being installed.
    pub fn is_claimed(&self, page: Page) -> bool {
        self.claims.is_claimed(page.block, page.number)
    }

    /// The host pages that are claimed and not present. Asked before any thread brings memory,
    /// they are those that a predecessor did not finish; nobody else takes them.
    pub fn unfinished(&self) -> Vec<Run> {
        self.host_pages(|block, found| self.claims.unfinished(block, found))
    }

    /// The host pages that the guest waits for and that could not be read, be it by a predecessor.
    pub fn awaited(&self) -> Vec<Run> {
        self.host_pages(|block, found| self.claims.awaited(block, found))
    }

    /// The host pages of the runs that `each` finds in a block.
    fn host_pages(&self, each: impl Fn(BlockId, &mut dyn FnMut(Run))) -> Vec<Run> {
        let mut pages = Vec::new();
        for (index, block) in self.blocks().iter().enumerate() {
            let unit = block.pages_per_host_page();
            each(BlockId(index as u16), &mut |run| {
                let firsts = (run.first..run.end()).step_by(unit as usize);
                pages.extend(firsts.map(|first| Run {
                    first,
                    count: unit.min(block.pages() - first),
                    ..run
                }));
            });
        }
        pages
    }

    /// Asks again for what the guest has asked a predecessor for in vain.
    ///
    /// # Errors
    /// As for [`Pager::serve`].
    pub fn ask_again(self: &Arc<Memory>) -> Result<(), MemoryError> {
        let awaited = self.awaited();
        if awaited.is_empty() {
            return Ok(());
        }
        let mut pager = Pager::new(Arc::clone(self))?;
        let mut ask =
            |page: Run| pager.serve(page.block, page.offset(), page.bytes(), Instant::now());
        awaited.into_iter().try_for_each(&mut ask)
    }

    /// The guest waits for a page that can't be read.
    fn leave_awaited(&self, page: Run, error: MemoryError) -> Result<(), MemoryError> {
        match (&self.listener, error) {
            (Some(listener), error @ MemoryError::Source { .. }) => {
                listener.awaited(error, || self.claims.set_awaited(page));
                Ok(())
            }
            (_, error) => Err(error),
        }
    }

    /// Tells that the guest waits for nothing that can't be read, if it has.
    fn tell_if_over(&self) {
        if let Some(listener) = &self.listener {
            listener.look(|| self.awaited());
        }
    }

    /// Whether prefetch has brought all that it could.
    fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// What can't be read is passed over by whoever brings it unasked. Returns whether it was
    /// brought.
    fn pass_over(&self, brought: Result<(), MemoryError>) -> Result<bool, MemoryError> {
        match brought {
            Ok(()) => Ok(true),
            Err(error @ MemoryError::Source { .. }) => {
                match &self.listener {
                    Some(listener) => listener.passed_over(error),
                    None => tracing::warn!("passed over: {error}"),
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Takes note of pages that somebody else has installed, of whom nothing else is known. They
    /// consist of whole host pages.
    pub fn found(&self, present: Run) {
        let claimed = self.claims.claim(present, |claimed| {
            self.arrived(claimed);
            Ok::<(), std::convert::Infallible>(())
        });
        claimed.unwrap_or_else(|never| match never {});
    }

    /// The same for the pages of a block whose bits are set: bit 0 of the first byte is the
    /// block's first page.
    pub fn found_bits(&self, block: BlockId, bits: &[u8]) {
        let (pages, unit) = (self.block(block).pages(), self.block(block).pages_per_host_page());
        let is_set = |number: u64| {
            let byte = bits.get((number / 8) as usize).copied().unwrap_or(0);
            byte & (1 << (number % 8)) != 0
        };
        for first in (0..pages).step_by(unit as usize).filter(|first| is_set(*first)) {
            self.found(Run { block, first, count: unit.min(pages - first) });
        }
    }

    /// Settles one of the host pages that were [`unfinished`](Memory::unfinished). One that has
    /// not `arrived` is brought at once: the guest may wait for it, and nobody will ask again.
    ///
    /// # Errors
    /// When the page can't be brought.
    pub fn settle(self: &Arc<Memory>, page: Run, arrived: bool) -> Result<(), MemoryError> {
        if arrived {
            self.arrived(page);
            return Ok(());
        }
        self.claims.release(page);
        let mut pager = Pager::new(Arc::clone(self))?;
        pager.serve(page.block, page.offset(), page.bytes(), Instant::now())
    }

    /// Waits until every page is in place, for `timeout` at most; says whether it is so.
    pub fn wait_complete(&self, timeout: Duration) -> bool {
        let (done, signal) = &self.complete;
        let done = done.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, _) = signal
            .wait_timeout_while(done, timeout, |done| !*done)
            .unwrap_or_else(PoisonError::into_inner);
        *done
    }

    fn block(&self, id: BlockId) -> &Block {
        &self.source.blocks()[id.index()]
    }

    /// Claims the absent pages of `run` and installs them, in pieces of the transport's
    /// preferred size. Each piece is claimed just before it is installed. `pause` is called
    /// before that, while nothing is held, so that prefetch can stand aside. A whole piece of
    /// zeros is left to the kernel where the transport says that it can be.
    fn install(
        &self,
        run: Run,
        content: Content<'_>,
        pause: impl Fn(),
    ) -> Result<u64, MemoryError> {
        let unit = self.block(run.block).pages_per_host_page();
        let step = unit.max(match content {
            Content::Zero => self.transport.zero_step_pages(run.block),
            Content::Bytes(_) => self.transport.step_pages(run.block),
        });
        let may_leave = matches!(content, Content::Zero) && self.leaves_zeros(run.block);
        let mut installed = 0;
        let mut first = run.first;
        while first < run.end() {
            // Pieces begin at multiples of the step, so that huge pages stay whole.
            let end = run.end().min((first / step + 1) * step);
            pause();
            let piece = Run { block: run.block, first, count: end - first };
            self.claims.claim(piece, |claimed| {
                match may_leave && claimed.count == step {
                    true => self.leave(claimed)?,
                    false => self.install_claimed(run, claimed, content)?,
                }
                installed += claimed.count;
                Ok(())
            })?;
            first = end;
        }
        Ok(installed)
    }

    /// Installs pages that the caller has claimed.
    fn install_claimed(
        &self,
        whole: Run,
        run: Run,
        content: Content<'_>,
    ) -> Result<(), MemoryError> {
        let block = self.block(run.block);
        let placed = match content {
            Content::Zero => self.transport.zero(block, run),
            Content::Bytes(bytes) => {
                let start = (run.offset() - whole.offset()) as usize;
                self.transport.copy(block, run, &bytes[start..start + run.bytes() as usize])
            }
        };
        placed.map_err(|source| self.transport_error(run, source))?;
        self.arrived(run);
        Ok(())
    }

    /// Leaves claimed pages of zeros to the kernel. Whoever asked for one between the claim and
    /// now relies on being woken, as installing does: it then asks again, and is answered.
    fn leave(&self, run: Run) -> Result<(), MemoryError> {
        self.claims.set_left(run);
        self.arrived(run);
        self.wake(run)
    }

    /// Marks claimed pages as present; wakes [`Memory::wait_complete`] behind the last one.
    fn arrived(&self, run: Run) {
        if self.claims.mark_present(run) {
            let (done, signal) = &self.complete;
            *done.lock().unwrap_or_else(PoisonError::into_inner) = true;
            signal.notify_all();
        }
    }

    /// Wakes the threads that wait for pages which are in place.
    fn wake(&self, run: Run) -> Result<(), MemoryError> {
        let block = self.block(run.block);
        self.transport.wake(block, run).map_err(|source| self.transport_error(run, source))
    }

    /// Installs zeros that were left out and are asked for all the same. `run` must be in place
    /// but for that.
    fn make_up(&self, run: Run) -> Result<(), MemoryError> {
        let block = self.block(run.block);
        self.transport.zero(block, run).map_err(|source| self.transport_error(run, source))
    }

    fn transport_error(&self, run: Run, source: TransportError) -> MemoryError {
        let block = self.block(run.block).name.clone();
        MemoryError::Install { block, offset: run.offset(), source }
    }

    fn source_error(&self, run: Run, source: SourceError) -> MemoryError {
        MemoryError::Source {
            block: self.block(run.block).name.clone(),
            offset: run.offset(),
            source,
        }
    }

    /// Whether zeros of this block are best installed in large calls, ahead of the rest.
    fn likes_large_zeros(&self, block: BlockId) -> bool {
        // A huge page may be zero in parts, and is then not a matter of zeros.
        let small = self.block(block).page_size == PAGE_SIZE as u64;
        small && self.transport.zero_step_pages(block) > self.transport.step_pages(block)
    }

    /// Whether zeros of this block may be left out.
    fn leaves_zeros(&self, block: BlockId) -> bool {
        self.likes_large_zeros(block) && self.transport.leaves_zeros(block)
    }

    /// Whether its bytes come from afar ([`PageSource::is_far`]).
    pub fn is_far(&self) -> bool {
        self.source.is_far()
    }

    /// Whether a prefetcher is at work.
    fn is_filling(&self) -> bool {
        self.filling.load(Ordering::Relaxed) > 0
    }

    /// Stands aside for a fault that is being answered now, and returns whether it has been. An
    /// answer mostly takes some tens of microseconds, for which giving up the time slice is
    /// enough. One that waits for a disk takes longer, and would not be sooner if nobody else
    /// read meanwhile.
    fn stand_aside_briefly(&self) -> bool {
        let start = Instant::now();
        while self.urgent.load(Ordering::Acquire) > 0 {
            if start.elapsed() >= BRIEFLY {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Stands aside while faults are being answered: asleep after a while, and for a limited
    /// time, since memory would never become whole where there are always some.
    fn stand_aside(&self) {
        if self.stand_aside_briefly() {
            return;
        }
        let start = Instant::now();
        while self.urgent.load(Ordering::Acquire) > 0 && start.elapsed() < AT_MOST {
            std::thread::sleep(BRIEFLY);
        }
    }
}

/// How long prefetch gives up its time slices for faults, and then sleeps at a time: longer
/// than a fault takes on busy processors, shorter than a read from a disk.
const BRIEFLY: Duration = Duration::from_millis(1);

/// How long it stands aside in all before a piece.
const AT_MOST: Duration = Duration::from_millis(10);

/// What a run of pages holds.
#[derive(Clone, Copy)]
enum Content<'a> {
    Zero,
    /// The bytes of the whole run.
    Bytes(&'a [u8]),
}
