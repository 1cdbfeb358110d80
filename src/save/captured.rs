//! A guest's memory as it was at a moment, in memory of ours.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::host::shared_memory;
use crate::page::{Block, BlockId, PAGE_SIZE, Page, PageBytes, Run};

const BITS: u64 = u64::BITS as u64;

/// Pages, each put here once. Who reads one must know that it is there. Zeros take no memory.
pub(super) struct CapturedMemory {
    file: File,
    /// The number of each block's first page.
    starts: Vec<u64>,
    /// One bit for each page that is all zeros.
    zeros: Box<[AtomicU64]>,
}

impl CapturedMemory {
    /// Room for the memory of these blocks.
    ///
    /// # Errors
    /// When the kernel has no memory or no descriptor left.
    pub fn new(blocks: &[Block]) -> io::Result<CapturedMemory> {
        let mut pages = 0;
        let starts = blocks.iter().map(|block| {
            let start = pages;
            pages += block.pages();
            start
        });
        let starts = starts.collect();
        let file = shared_memory::file(c"snapback-captured")?;
        file.set_len(pages * PAGE_SIZE as u64)?;
        let zeros = (0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Ok(CapturedMemory { file, starts, zeros })
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
                false => self.file.write_all_at(bytes, self.offset(page.block, page.number))?,
            }
        }
        Ok(())
    }

    /// The same for pages that are all zeros.
    pub fn put_zeros(&self, run: Run) {
        for number in run.first..run.end() {
            let bit = self.starts[run.block.index()] + number;
            self.zeros[(bit / BITS) as usize].fetch_or(1 << (bit % BITS), Ordering::Release);
        }
    }

    /// Whether a page that is here is all zeros.
    pub fn is_zero(&self, page: Page) -> bool {
        let bit = self.starts[page.block.index()] + page.number;
        self.zeros[(bit / BITS) as usize].load(Ordering::Acquire) & 1 << (bit % BITS) != 0
    }

    /// Reads pages that are here.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&self, run: Run, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, self.offset(run.block, run.first))
    }

    fn offset(&self, block: BlockId, number: u64) -> u64 {
        (self.starts[block.index()] + number) * PAGE_SIZE as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_as_they_were_put() {
        let block = |pages: u64| Block { name: "b".into(), len: pages << 12, page_size: 4096 };
        let memory = CapturedMemory::new(&[block(70), block(3)]).unwrap();
        let run = Run { block: BlockId(1), first: 1, count: 2 };
        memory.put(run, &[[7; PAGE_SIZE], [0; PAGE_SIZE]]).unwrap();
        memory.put_zeros(Run { block: BlockId(0), first: 69, count: 1 });
        let mut bytes = [1; 2 * PAGE_SIZE];
        memory.read(run, &mut bytes).unwrap();
        assert!(bytes[..PAGE_SIZE] == [7; PAGE_SIZE] && bytes[PAGE_SIZE..] == [0; PAGE_SIZE]);
        let zero = |block, number| memory.is_zero(Page { block: BlockId(block), number });
        assert_eq!((zero(1, 1), zero(1, 2), zero(0, 69), zero(0, 0)), (false, true, true, false));
    }
}
