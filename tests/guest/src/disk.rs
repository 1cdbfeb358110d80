//! A disk filled with content that can be computed anew.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::content::{Generation, PAGE_WORDS, Recipe, Words};

const PAGE_BYTES: usize = size_of::<Words>();

/// The first pages of a block device, and what they should hold. The seed comes
/// from whoever asks, so that another boot can tell what an earlier one wrote.
pub struct Disk<'a> {
    pub path: &'a str,
    pub pages: u64,
    pub seed: [u64; 2],
}

impl Disk<'_> {
    /// Writes the pages, through to the device.
    pub fn write(&self) -> io::Result<()> {
        let device = self.open(OpenOptions::new().write(true))?;
        let mut buffer = Aligned::new();
        for page in 0..self.pages {
            let mut words = [0; PAGE_WORDS];
            self.recipe().fill(page, Generation::default(), &mut words);
            for (bytes, word) in buffer.bytes().chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            device.write_all_at(buffer.bytes(), page * PAGE_BYTES as u64)?;
        }
        device.sync_all()
    }

    /// Reads the pages from the device and returns the first that is wrong.
    pub fn check(&self) -> io::Result<Option<u64>> {
        let device = self.open(OpenOptions::new().read(true))?;
        let mut buffer = Aligned::new();
        for page in 0..self.pages {
            device.read_exact_at(buffer.bytes(), page * PAGE_BYTES as u64)?;
            let mut words = [0; PAGE_WORDS];
            for (bytes, word) in buffer.bytes().chunks_exact(8).zip(&mut words) {
                *word = bytes.iter().rev().fold(0, |w, &byte| w << 8 | u64::from(byte));
            }
            if self.recipe().difference(page, Generation::default(), &words).is_some() {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    fn recipe(&self) -> Recipe {
        Recipe { nonce: self.seed, random_percent: 50, zero_percent: 0 }
    }

    /// Around the guest's page cache: what counts is what the device holds.
    fn open(&self, options: &mut OpenOptions) -> io::Result<File> {
        options.custom_flags(libc::O_DIRECT).open(self.path)
    }
}

/// One page at a page's alignment, as O_DIRECT wants it.
pub struct Aligned(*mut u8);

impl Aligned {
    const LAYOUT: Layout = match Layout::from_size_align(PAGE_BYTES, PAGE_BYTES) {
        Ok(layout) => layout,
        Err(_) => panic!("a page's size is a power of two"),
    };

    pub fn new() -> Aligned {
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc_zeroed(Aligned::LAYOUT) };
        assert!(!start.is_null(), "no memory for a page");
        Aligned(start)
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the allocation is that long, initialised, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.0, PAGE_BYTES) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed once.
        unsafe { dealloc(self.0, Aligned::LAYOUT) }
    }
}
