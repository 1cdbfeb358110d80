//! A guest's memory as it was at a moment, in memory that processes share.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::host::shared_memory::{self, SharedMemory};
use crate::page::{Block, BlockId, PAGE_SIZE, Page, PageBytes, Run};

const BITS: u64 = u64::BITS as u64;

/// Pages, each put here once. Zeros take no memory.
///
/// Whoever has the two descriptors, be it another process, sees which pages are here, and reads
/// them, also once the one that put them here has ended.
pub struct CapturedMemory {
    /// The pages, one behind the other.
    pages: File,
    /// Two words for each 64 pages: which of them are here, and which of these are all zeros.
    states: SharedMemory,
    /// The number of each block's first page.
    starts: Vec<u64>,
}

impl CapturedMemory {
    /// Room for the memory of these blocks.
    ///
    /// # Errors
    /// When the kernel has no memory or no descriptor left.
    pub fn new(blocks: &[Block]) -> io::Result<CapturedMemory> {
        let (starts, total) = starts(blocks);
        let pages = shared_memory::sealed_file(c"snapback-captured", total * PAGE_SIZE as u64)?;
        let states = SharedMemory::create(c"snapback-captured-pages", bytes_of_states(total))?;
        Ok(CapturedMemory { pages, states, starts })
    }

    /// The memory of these blocks that somebody else makes: its
    /// [descriptors](CapturedMemory::descriptors).
    ///
    /// # Errors
    /// When they are of something else.
    pub fn open(blocks: &[Block], pages: OwnedFd, states: OwnedFd) -> io::Result<CapturedMemory> {
        let (starts, total) = starts(blocks);
        let (pages, states) = (File::from(pages), SharedMemory::open(states)?);
        let fits = pages.metadata()?.len() == total * PAGE_SIZE as u64
            && states.words().len() as u64 * 8 == bytes_of_states(total);
        match fits {
            true => Ok(CapturedMemory { pages, states, starts }),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "memory of another size")),
        }
    }

    /// What another process [opens](CapturedMemory::open) it by.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.pages.as_fd(), self.states.as_fd()]
    }

    /// Puts pages here, which have not been before.
    ///
    /// # Errors
    /// When memory is short.
    pub fn put(&self, run: Run, pages: &[PageBytes]) -> io::Result<()> {
        const ZEROS: PageBytes = [0; PAGE_SIZE];
        for (page, bytes) in run.pages().zip(pages) {
            match *bytes == ZEROS {
                true => self.put_zeros(Run::single(page)),
                false => {
                    self.pages.write_all_at(bytes, self.offset(page.block, page.number))?;
                    self.mark(Run::single(page), HERE);
                }
            }
        }
        Ok(())
    }

    /// The same for pages that are all zeros.
    pub fn put_zeros(&self, run: Run) {
        // In this order: a page that is here is known to be zeros or not.
        self.mark(run, ZERO);
        self.mark(run, HERE);
    }

    /// Whether pages are here.
    pub fn has(&self, run: Run) -> bool {
        self.is_marked(run, HERE)
    }

    /// Whether a page that is here is all zeros.
    pub fn is_zero(&self, page: Page) -> bool {
        self.is_marked(Run::single(page), ZERO)
    }

    /// Reads pages that are here.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, run: Run, bytes: &mut [u8]) -> io::Result<()> {
        self.pages.read_exact_at(bytes, self.offset(run.block, run.first))
    }

    fn offset(&self, block: BlockId, number: u64) -> u64 {
        (self.starts[block.index()] + number) * PAGE_SIZE as u64
    }

    /// The states of a run, of one kind: each word, and the run's bits in it.
    fn words(&self, run: Run, kind: usize) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let start = self.starts[run.block.index()];
        let (first, end) = (start + run.first, start + run.end());
        let words = first / BITS..if first < end { end.div_ceil(BITS) } else { 0 };
        words.map(move |word| {
            let (from, to) = (first.max(word * BITS), end.min((word + 1) * BITS));
            let mask = u64::MAX >> (BITS - (to - from)) << (from % BITS);
            (&self.states.words()[word as usize * KINDS + kind], mask)
        })
    }

    fn mark(&self, run: Run, kind: usize) {
        for (word, mask) in self.words(run, kind) {
            word.fetch_or(mask, Ordering::Release);
        }
    }

    fn is_marked(&self, run: Run, kind: usize) -> bool {
        self.words(run, kind).all(|(word, mask)| word.load(Ordering::Acquire) & mask == mask)
    }
}

/// The words of 64 pages: which of them are here.
const HERE: usize = 0;
/// Which of them are all zeros.
const ZERO: usize = 1;
const KINDS: usize = 2;

/// The number of each block's first page, and how many there are in all.
fn starts(blocks: &[Block]) -> (Vec<u64>, u64) {
    let mut pages = 0;
    let starts = blocks.iter().map(|block| {
        let start = pages;
        pages += block.pages();
        start
    });
    (starts.collect(), pages)
}

fn bytes_of_states(pages: u64) -> u64 {
    pages.div_ceil(BITS).max(1) * (KINDS * size_of::<u64>()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pages: u64) -> Block {
        Block { name: "b".into(), len: pages << 12, page_size: 4096 }
    }

    #[test]
    fn pages_come_back_as_they_were_put_in_another_process_too() {
        let blocks = [block(70), block(3)];
        let ours = CapturedMemory::new(&blocks).unwrap();
        let [pages, states] = ours.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
        let theirs = CapturedMemory::open(&blocks, pages, states).unwrap();
        let run = Run { block: BlockId(1), first: 1, count: 2 };
        assert!(!theirs.has(run));
        ours.put(run, &[[7; PAGE_SIZE], [0; PAGE_SIZE]]).unwrap();
        ours.put_zeros(Run { block: BlockId(0), first: 69, count: 1 });
        for memory in [ours, theirs] {
            let mut bytes = [1; 2 * PAGE_SIZE];
            memory.read(run, &mut bytes).unwrap();
            assert!(bytes[..PAGE_SIZE] == [7; PAGE_SIZE] && bytes[PAGE_SIZE..] == [0; PAGE_SIZE]);
            let zero = |block, number| memory.is_zero(Page { block: BlockId(block), number });
            assert_eq!(
                (zero(1, 1), zero(1, 2), zero(0, 69), zero(0, 0)),
                (false, true, true, false)
            );
            assert!(memory.has(run) && !memory.has(Run { first: 0, ..run }));
        }
    }

    #[test]
    fn runs_of_any_length_at_any_place_are_marked_and_no_other_page() {
        for (first, count) in [(0, 200), (63, 2), (64, 64), (1, 63), (10, 150), (199, 1), (70, 0)] {
            let memory = CapturedMemory::new(&[block(200), block(1)]).unwrap();
            let run = Run { block: BlockId(0), first, count };
            memory.put_zeros(run);
            for page in (Run { first: 0, count: 200, ..run }).pages() {
                let inside = (first..first + count).contains(&page.number);
                assert_eq!(memory.has(Run::single(page)), inside, "{run}, {page:?}");
                assert_eq!(memory.is_zero(page), inside, "{run}, {page:?}");
            }
            assert!(memory.has(run) && !memory.has(Run { block: BlockId(1), first: 0, count: 1 }));
        }
    }

    #[test]
    fn memory_of_another_machine_is_refused() {
        let ours = CapturedMemory::new(&[block(70)]).unwrap();
        for blocks in [&[block(71)][..], &[block(70), block(70)], &[]] {
            let [pages, states] = ours.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
            assert!(CapturedMemory::open(blocks, pages, states).is_err());
        }
    }
}
