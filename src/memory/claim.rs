//! The state of each page: absent, then claimed, then present.
//!
//! A page must not be installed twice: QEMU would fail the migration, or what the guest has
//! written since would be overwritten. So a thread claims a page before it installs it, and
//! only one thread gets the claim. There are two bits per host page (the unit that
//! userfaultfd installs), in words that are changed atomically; no thread ever waits.

use self::sync::{AtomicU64, Ordering};
use crate::page::{Block, BlockId, Run};

/// The atomics: those of loom where it tries every interleaving (`make loom`).
mod sync {
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicU64, Ordering};
    #[cfg(not(loom))]
    pub use std::sync::atomic::{AtomicU64, Ordering};
}

/// The state of every page of a machine.
pub struct ClaimMap {
    blocks: Vec<BlockClaims>,
    /// Target pages that are present.
    present: AtomicU64,
    /// Target pages of the machine.
    total: u64,
}

struct BlockClaims {
    /// Target pages in the block.
    pages: u64,
    /// log2 of the target pages in one unit, which is one host page.
    unit_shift: u32,
    /// One bit per unit: it is claimed or present.
    claimed: Box<[AtomicU64]>,
    /// One bit per unit: it is present. Never set before its bit in `claimed`.
    present: Box<[AtomicU64]>,
}

const BITS: u64 = u64::BITS as u64;

impl ClaimMap {
    /// A map in which every page of `blocks` is absent.
    pub fn new(blocks: &[Block]) -> ClaimMap {
        let words = |units: u64| (0..units.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        let claims = |block: &Block| {
            let units = block.pages().div_ceil(block.pages_per_host_page());
            BlockClaims {
                pages: block.pages(),
                unit_shift: block.pages_per_host_page().trailing_zeros(),
                claimed: words(units),
                present: words(units),
            }
        };
        ClaimMap {
            blocks: blocks.iter().map(claims).collect(),
            present: AtomicU64::new(0),
            total: blocks.iter().map(Block::pages).sum(),
        }
    }

    /// Target pages of the machine.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Target pages that are present.
    pub fn present(&self) -> u64 {
        self.present.load(Ordering::Acquire)
    }

    /// Whether the host page that holds this target page is claimed or present.
    pub fn is_claimed(&self, block: BlockId, page: u64) -> bool {
        let claims = &self.blocks[block.index()];
        claims.is_set(&claims.claimed, page)
    }

    /// Whether every page of the block is claimed or present.
    pub fn all_claimed(&self, block: BlockId) -> bool {
        let claims = &self.blocks[block.index()];
        let all = Run { block, first: 0, count: claims.pages };
        let taken = |(word, mask): (usize, u64)| {
            claims.claimed[word].load(Ordering::Acquire) & mask == mask
        };
        claims.words(all).all(taken)
    }

    /// Whether the host page that holds this target page is present.
    pub fn is_present(&self, block: BlockId, page: u64) -> bool {
        let claims = &self.blocks[block.index()];
        claims.is_set(&claims.present, page)
    }

    /// Claims what is absent in `run` and calls `got` with each piece of it, in order. The
    /// caller must install a piece, then call [`mark_present`](ClaimMap::mark_present); or else
    /// [`release`](ClaimMap::release) it. `run` must consist of whole host pages.
    ///
    /// # Errors
    /// The first error of `got`. The piece for which it was called, and all behind it, are
    /// absent again.
    pub fn claim<E>(&self, run: Run, mut got: impl FnMut(Run) -> Result<(), E>) -> Result<(), E> {
        let claims = &self.blocks[run.block.index()];
        let mut pending: Option<Run> = None;
        let mut give = |run| got(run).inspect_err(|_| self.release(run));
        for (word, mask) in claims.words(run) {
            // Acquire/release: what the claim's owner does comes after the claim.
            let old = claims.claimed[word].fetch_or(mask, Ordering::AcqRel);
            let mut new = mask & !old;
            while new != 0 {
                let first = u64::from(new.trailing_zeros());
                let count = u64::from((new >> first).trailing_ones());
                new &= !mask_of(first, count);
                let piece = claims.run(run.block, word as u64 * BITS + first, count);
                pending = match pending {
                    Some(last) if last.end() == piece.first => {
                        Some(Run { count: last.count + piece.count, ..last })
                    }
                    Some(last) => {
                        if let Err(error) = give(last) {
                            let ungiven = mask_of(first, count) | new;
                            claims.claimed[word].fetch_and(!ungiven, Ordering::AcqRel);
                            return Err(error);
                        }
                        Some(piece)
                    }
                    None => Some(piece),
                };
            }
        }
        pending.map_or(Ok(()), give)
    }

    /// Makes pages absent again that the caller has claimed but could not install.
    pub fn release(&self, run: Run) {
        let claims = &self.blocks[run.block.index()];
        for (word, mask) in claims.words(run) {
            let old = claims.claimed[word].fetch_and(!mask, Ordering::AcqRel);
            debug_assert_eq!(old & mask, mask, "pages were released that nobody had: {run}");
        }
    }

    /// Marks pages that the caller has claimed as present. True for the one call that makes
    /// the machine's memory complete.
    pub fn mark_present(&self, run: Run) -> bool {
        let claims = &self.blocks[run.block.index()];
        for (word, mask) in claims.words(run) {
            let old = claims.present[word].fetch_or(mask, Ordering::AcqRel);
            debug_assert_eq!(old & mask, 0, "a page was installed twice: {run}");
        }
        self.present.fetch_add(run.count, Ordering::AcqRel) + run.count == self.total
    }
}

impl BlockClaims {
    fn is_set(&self, words: &[AtomicU64], page: u64) -> bool {
        let unit = page >> self.unit_shift;
        words[(unit / BITS) as usize].load(Ordering::Acquire) & (1 << (unit % BITS)) != 0
    }

    /// The words that hold the run's units, each with the mask of the units in it.
    fn words(&self, run: Run) -> impl Iterator<Item = (usize, u64)> + use<> {
        debug_assert!(run.end() <= self.pages, "{run} is outside its block");
        debug_assert!(self.is_whole(run), "{run} cuts a host page");
        let first = run.first >> self.unit_shift;
        let end = run.end().div_ceil(1 << self.unit_shift);
        (first / BITS..end.div_ceil(BITS)).map(move |word| {
            let low = first.max(word * BITS) - word * BITS;
            let high = end.min((word + 1) * BITS) - word * BITS;
            (word as usize, mask_of(low, high - low))
        })
    }

    /// Whether the run consists of whole host pages.
    fn is_whole(&self, run: Run) -> bool {
        let in_unit = (1 << self.unit_shift) - 1;
        run.first & in_unit == 0 && (run.end() & in_unit == 0 || run.end() == self.pages)
    }

    /// The target pages of some units; the block's last unit may be cut short.
    fn run(&self, block: BlockId, first_unit: u64, units: u64) -> Run {
        let first = first_unit << self.unit_shift;
        let end = ((first_unit + units) << self.unit_shift).min(self.pages);
        Run { block, first, count: end - first }
    }
}

/// `count` ones from bit `first` on.
fn mask_of(first: u64, count: u64) -> u64 {
    debug_assert!(count >= 1 && first + count <= BITS);
    (u64::MAX >> (BITS - count)) << first
}
