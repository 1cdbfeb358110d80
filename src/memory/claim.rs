//! The state of each page: absent, then claimed, then present.
//!
//! A page must not be installed twice: QEMU would fail the migration, or what the guest has
//! written since would be overwritten. So a thread claims a page before it installs it, and
//! only one thread gets the claim. There are two bits per host page (the unit that
//! userfaultfd installs), in words that are changed atomically; no thread ever waits. A third
//! bit marks pages that the guest waits for and that can't be read at present, a fourth those that
//! count as present and are left to the kernel.
//!
//! The words may lie in memory that outlives this process. Another process that opens the map
//! finds what its predecessor had claimed and not finished ([`ClaimMap::unfinished`]).

use self::sync::{AtomicU64, Ordering};
use crate::page::{Block, BlockId, Run};

/// The atomics: those of loom where it tries every interleaving (`make loom`).
mod sync {
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicU64, Ordering};
    #[cfg(not(loom))]
    pub use std::sync::atomic::{AtomicU64, Ordering};
}

/// The words in which a map is kept: the process's own memory, or some that it shares.
pub trait Words: Send + Sync {
    /// The words; always the same ones.
    fn words(&self) -> &[AtomicU64];
}

impl Words for Box<[AtomicU64]> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// The state of every page of a machine.
pub struct ClaimMap {
    words: Box<dyn Words>,
    blocks: Vec<BlockClaims>,
    /// Target pages of the machine.
    total: u64,
}

/// Where a block's bits lie in the words of its map.
struct BlockClaims {
    /// Target pages in the block.
    pages: u64,
    /// log2 of the target pages in one unit, which is one host page.
    unit_shift: u32,
    /// The first of the words with one bit per unit: it is claimed or present.
    claimed: usize,
    /// The first of the words with one bit per unit: it is present. A bit is never set here
    /// before its counterpart in `claimed`.
    present: usize,
    /// The first of the words with one bit per unit: it was asked for and could not be read.
    awaited: usize,
    /// The first of the words with one bit per unit: it is present, but was not installed.
    left: usize,
}

const BITS: u64 = u64::BITS as u64;

/// The word that counts the target pages that are present.
pub const PRESENT: usize = 0;

/// The word that counts requests.
pub const REQUESTS: usize = 1;

/// The number of words ahead of those of the blocks.
const COUNTERS: usize = 2;

/// Bits per unit: claimed, present, awaited, left.
const KINDS: usize = 4;

impl ClaimMap {
    /// A map in which every page of `blocks` is absent.
    pub fn new(blocks: &[Block]) -> ClaimMap {
        let words: Box<[AtomicU64]> =
            (0..ClaimMap::words_for(blocks)).map(|_| AtomicU64::new(0)).collect();
        ClaimMap::over(blocks, Box::new(words))
    }

    /// The number of words that a map of these blocks takes.
    pub fn words_for(blocks: &[Block]) -> usize {
        COUNTERS + blocks.iter().map(|block| KINDS * words_of(block)).sum::<usize>()
    }

    /// The map in these words: of a new machine where they are all zero, else the one that
    /// another process has left. That process must have ended.
    ///
    /// # Panics
    /// When there are fewer words than [`words_for`](ClaimMap::words_for) says.
    pub fn over(blocks: &[Block], words: Box<dyn Words>) -> ClaimMap {
        assert!(words.words().len() >= ClaimMap::words_for(blocks), "too few words for a map");
        let mut next = COUNTERS;
        let claims = |block: &Block| {
            let (claimed, count) = (next, words_of(block));
            next += KINDS * count;
            BlockClaims {
                pages: block.pages(),
                unit_shift: block.pages_per_host_page().trailing_zeros(),
                claimed,
                present: claimed + count,
                awaited: claimed + 2 * count,
                left: claimed + 3 * count,
            }
        };
        let blocks: Vec<BlockClaims> = blocks.iter().map(claims).collect();
        let total = blocks.iter().map(|block| block.pages).sum();
        let map = ClaimMap { words, blocks, total };
        // Whoever ended may have done so between marking pages and counting them.
        map.word(PRESENT).store(map.count_present(), Ordering::Release);
        map
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.words.words()[index]
    }

    /// Counts one request for a page.
    pub fn count_request(&self) {
        self.word(REQUESTS).fetch_add(1, Ordering::Relaxed);
    }

    /// Requests for pages so far.
    pub fn requests(&self) -> u64 {
        self.word(REQUESTS).load(Ordering::Relaxed)
    }

    /// Counts the target pages that are present by their bits.
    fn count_present(&self) -> u64 {
        let mut count = 0;
        for (id, claims) in self.blocks.iter().enumerate() {
            self.runs_where(
                BlockId(id as u16),
                |word| self.bits(claims.present, word),
                |run| {
                    count += run.count;
                },
            );
        }
        count
    }

    /// Calls `found` with each run of pages of the block that are claimed and not present.
    /// Their owner installs them now; of an owner that has ended, nobody does.
    pub fn unfinished(&self, block: BlockId, found: impl FnMut(Run)) {
        let claims = &self.blocks[block.index()];
        let unfinished = |word| self.bits(claims.claimed, word) & !self.bits(claims.present, word);
        self.runs_where(block, unfinished, found);
    }

    /// Notes that the guest waits for pages that can't be read at present.
    pub fn set_awaited(&self, run: Run) {
        self.mark(run, self.blocks[run.block.index()].awaited);
    }

    /// Calls `found` with each run of pages of the block that are
    /// [awaited](ClaimMap::set_awaited) and not present.
    pub fn awaited(&self, block: BlockId, found: impl FnMut(Run)) {
        let claims = &self.blocks[block.index()];
        let awaited = |word| self.bits(claims.awaited, word) & !self.bits(claims.present, word);
        self.runs_where(block, awaited, found);
    }

    /// Notes that pages which the caller has claimed, and is going to mark as present, are left to
    /// the kernel.
    pub fn set_left(&self, run: Run) {
        self.mark(run, self.blocks[run.block.index()].left);
    }

    /// Sets the bits of a run in the words from `first` on.
    fn mark(&self, run: Run, first: usize) {
        for (word, mask) in self.blocks[run.block.index()].words(run) {
            self.word(first + word).fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Whether the host page that holds this target page is left to the kernel.
    pub fn is_left(&self, block: BlockId, page: u64) -> bool {
        let claims = &self.blocks[block.index()];
        self.is_set(claims, claims.left, page)
    }

    fn bits(&self, first: usize, word: usize) -> u64 {
        self.word(first + word).load(Ordering::Acquire)
    }

    /// Calls `found` with each run of pages whose bit is set in the words that `bits` gives.
    fn runs_where(&self, block: BlockId, bits: impl Fn(usize) -> u64, mut found: impl FnMut(Run)) {
        let claims = &self.blocks[block.index()];
        let all = Run { block, first: 0, count: claims.pages };
        for (word, mask) in claims.words(all) {
            let mut left = bits(word) & mask;
            while left != 0 {
                let first = u64::from(left.trailing_zeros());
                let count = u64::from((left >> first).trailing_ones());
                left &= !mask_of(first, count);
                found(claims.run(block, word as u64 * BITS + first, count));
            }
        }
    }

    /// Target pages of the machine.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Target pages that are present.
    pub fn present(&self) -> u64 {
        self.word(PRESENT).load(Ordering::Acquire)
    }

    /// Whether the host page that holds this target page is claimed or present.
    pub fn is_claimed(&self, block: BlockId, page: u64) -> bool {
        let claims = &self.blocks[block.index()];
        self.is_set(claims, claims.claimed, page)
    }

    /// Whether every page of the block is claimed or present.
    pub fn all_claimed(&self, block: BlockId) -> bool {
        let claims = &self.blocks[block.index()];
        let all = Run { block, first: 0, count: claims.pages };
        let taken = |(word, mask): (usize, u64)| self.bits(claims.claimed, word) & mask == mask;
        claims.words(all).all(taken)
    }

    /// Whether the host page that holds this target page is present.
    pub fn is_present(&self, block: BlockId, page: u64) -> bool {
        let claims = &self.blocks[block.index()];
        self.is_set(claims, claims.present, page)
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
            let old = self.word(claims.claimed + word).fetch_or(mask, Ordering::AcqRel);
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
                            self.word(claims.claimed + word).fetch_and(!ungiven, Ordering::AcqRel);
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
            let old = self.word(claims.claimed + word).fetch_and(!mask, Ordering::AcqRel);
            debug_assert_eq!(old & mask, mask, "pages were released that nobody had: {run}");
        }
    }

    /// Marks pages that the caller has claimed as present. True for the one call that makes
    /// the machine's memory complete.
    pub fn mark_present(&self, run: Run) -> bool {
        let claims = &self.blocks[run.block.index()];
        for (word, mask) in claims.words(run) {
            let old = self.word(claims.present + word).fetch_or(mask, Ordering::AcqRel);
            debug_assert_eq!(old & mask, 0, "a page was installed twice: {run}");
        }
        let before = self.word(PRESENT).fetch_add(run.count, Ordering::AcqRel);
        before + run.count == self.total
    }

    fn is_set(&self, claims: &BlockClaims, first: usize, page: u64) -> bool {
        let unit = page >> claims.unit_shift;
        self.bits(first, (unit / BITS) as usize) & (1 << (unit % BITS)) != 0
    }
}

/// The number of words with one bit for each host page of the block.
fn words_of(block: &Block) -> usize {
    block.pages().div_ceil(block.pages_per_host_page()).div_ceil(BITS) as usize
}

impl BlockClaims {
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
