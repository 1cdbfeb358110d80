//! What a process has in memory, page by page: /proc/PID/pagemap (Linux's
//! Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{page_region, pm_scan_arg};

use crate::page::PAGE_SIZE;

/// What pages can be told apart by: the kernel's `PAGE_IS_*` (Linux 6.7).
pub mod flags {
    use linux_raw_sys::general as sys;

    /// In memory.
    pub const PRESENT: u64 = sys::PAGE_IS_PRESENT as u64;
    /// Swapped out.
    pub const SWAPPED: u64 = sys::PAGE_IS_SWAPPED as u64;
    /// Mapped by a huge page.
    pub const HUGE: u64 = sys::PAGE_IS_HUGE as u64;
    /// Mapped to the kernel's page of zeros.
    pub const ZERO: u64 = sys::PAGE_IS_PFNZERO as u64;
    /// Not write-protected by a userfaultfd. Memory that was never mapped lacks it too.
    pub const WRITTEN: u64 = sys::PAGE_IS_WRITTEN as u64;
    /// A part of a file, or of memory that is shared.
    pub const FILE: u64 = sys::PAGE_IS_FILE as u64;
}

nix::ioctl_readwrite!(
    /// `PAGEMAP_SCAN` (Linux 6.7).
    pagemap_scan,
    b'f',
    16,
    pm_scan_arg
);

/// The number of that request.
pub const PAGEMAP_SCAN: u64 = nix::request_code_readwrite!(b'f', 16, size_of::<pm_scan_arg>());

/// Ranges that one call of `PAGEMAP_SCAN` tells at most.
const REGIONS: usize = 1024;

/// Bytes of a page map that are read at once.
const PIECE_BYTES: usize = 64 << 10;

/// Whether an entry of 8 bytes is that of a page in memory or swapped out.
fn is_present(entry: &[u8]) -> bool {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    entry.first_chunk().is_some_and(|e| u64::from_ne_bytes(*e) & PRESENT_OR_SWAPPED != 0)
}

/// Whether an entry is that of a page in memory that a userfaultfd write-protects.
fn is_protected(entry: &[u8]) -> bool {
    const PRESENT_AND_PROTECTED: u64 = 1 << 63 | 1 << 57;
    entry
        .first_chunk()
        .is_some_and(|e| u64::from_ne_bytes(*e) & PRESENT_AND_PROTECTED == PRESENT_AND_PROTECTED)
}

/// Whether an entry of 8 bytes is that of a page in memory or swapped out that is no part of a file.
fn is_private(entry: &[u8]) -> bool {
    const FILE: u64 = 1 << 61;
    is_present(entry) && entry.first_chunk().is_some_and(|e| u64::from_ne_bytes(*e) & FILE == 0)
}

/// The page map of a process.
#[derive(Debug)]
pub struct Pagemap(File);

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Pagemap {
    /// Opens the page map of a process.
    ///
    /// # Errors
    /// When the process has ended or may not be traced (ptrace(2)).
    pub fn open(pid: i32) -> io::Result<Pagemap> {
        Ok(Pagemap(File::open(super::path(pid, "pagemap"))?))
    }

    /// The page map that another process has opened.
    pub(super) fn of(fd: OwnedFd) -> Pagemap {
        Pagemap(fd.into())
    }

    /// Whether the process has memory at this address, be it swapped out. Asking touches
    /// nothing, unlike reading, which would wait for a page that is missing.
    pub fn is_present(&self, address: u64) -> bool {
        let mut entry = [0; 8];
        let at = address / PAGE_SIZE as u64 * 8;
        self.0.read_exact_at(&mut entry, at).is_ok() && is_present(&entry)
    }

    /// How many pages from this address on the process has in memory, be it swapped out, one
    /// behind the other: `count` at most, and no more than 64. It allocates nothing.
    pub fn present_from(&self, address: u64, count: u64) -> u64 {
        let mut entries = [0; 64 * 8];
        let entries = &mut entries[..count.min(64) as usize * 8];
        let at = address / PAGE_SIZE as u64 * 8;
        match self.0.read_exact_at(entries, at) {
            Ok(()) => entries.chunks_exact(8).take_while(|entry| is_present(entry)).count() as u64,
            Err(_) => 0,
        }
    }

    /// Calls `found` with each run of pages of `range` that the process has in memory, be it
    /// swapped out: the number of its first page, counted from the range's start, and how many
    /// they are. Of a host page of `page_size` bytes it has all or nothing.
    ///
    /// # Errors
    /// When the page map can't be read.
    pub fn present(
        &self,
        range: Range<u64>,
        page_size: u64,
        found: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        self.runs(range, page_size / PAGE_SIZE as u64, is_present, found)
    }

    /// Calls `found` with every range of addresses within `range` that is neither in memory nor
    /// swapped out, in order.
    ///
    /// # Errors
    /// When the page map can't be read.
    pub fn missing(&self, range: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        match self.scan(range.clone(), 0, flags::PRESENT | flags::SWAPPED, &mut found) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.by_entries(range, |entry| !is_present(entry), found)
            }
            scanned => scanned,
        }
    }

    /// Calls `found` with every range of addresses within `range` that is in memory and that a
    /// userfaultfd write-protects, in order.
    ///
    /// # Errors
    /// When the page map can't be read.
    pub fn protected(
        &self,
        range: Range<u64>,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        match self.scan(range.clone(), flags::PRESENT, flags::WRITTEN, &mut found) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.by_entries(range, is_protected, found)
            }
            scanned => scanned,
        }
    }

    /// Calls `found` with each run of pages of `range` whose entries are `like` that: the number
    /// of its first page, counted from the range's start, and how many they are. Only the first of
    /// each `unit` pages is looked at.
    fn runs(
        &self,
        range: Range<u64>,
        unit: u64,
        like: impl Fn(&[u8]) -> bool,
        mut found: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let (first, end) = (range.start / PAGE_SIZE as u64, range.end / PAGE_SIZE as u64);
        let mut entries = vec![0; PIECE_BYTES];
        let mut run: Option<(u64, u64)> = None;
        let mut at = first;
        while at < end {
            let count = (PIECE_BYTES as u64 / 8).min(end - at);
            let entries = &mut entries[..count as usize * 8];
            self.0.read_exact_at(entries, at * 8)?;
            for (entry, number) in entries.chunks_exact(8).zip(at - first..) {
                if number % unit != 0 || !like(entry) {
                    continue;
                }
                run = match run {
                    Some((start, count)) if start + count == number => Some((start, count + unit)),
                    other => {
                        other.into_iter().for_each(|(start, count)| found(start, count));
                        Some((number, unit))
                    }
                };
            }
            at += count;
        }
        run.into_iter().for_each(|(start, count)| found(start, count));
        Ok(())
    }

    /// Calls `found` with each run of pages of `range`, which is a private mapping of a file, that are
    /// the process's own: those that it has written. Some may be told that are not: to it the
    /// kernel's page of zeros is its own.
    ///
    /// # Errors
    /// When the page map can't be read.
    pub fn private(&self, range: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        match self.scan(range.clone(), flags::PRESENT, flags::FILE, &mut found) {
            Ok(()) => self.scan(range, flags::SWAPPED, flags::PRESENT | flags::FILE, found),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.by_entries(range, is_private, found)
            }
            Err(error) => Err(error),
        }
    }

    /// Calls `found` with every range of addresses within `range` whose pages' entries are `like`
    /// that, in order: what [`scan`](Pagemap::scan) does, before Linux 6.7.
    fn by_entries(
        &self,
        range: Range<u64>,
        like: impl Fn(&[u8]) -> bool,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let address = |page: u64| range.start + page * PAGE_SIZE as u64;
        self.runs(range.clone(), 1, like, |first, count| {
            found(address(first)..address(first + count));
        })
    }

    /// Calls `found` with every range of addresses within `range` whose pages have all of
    /// the [`flags`] `with` and none of `without`, in order.
    ///
    /// # Errors
    /// ENOTTY before Linux 6.7.
    pub fn scan(
        &self,
        range: Range<u64>,
        with: u64,
        without: u64,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        const NONE: page_region = page_region { start: 0, end: 0, categories: 0 };
        let mut regions = [NONE; REGIONS];
        let mut at = range.start;
        while at < range.end {
            let mut scan = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: 0,
                start: at,
                end: range.end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: without,
                category_mask: with | without,
                category_anyof_mask: 0,
                return_mask: with,
            };
            // SAFETY: reads and writes one `pm_scan_arg`, and writes at most `vec_len`
            // regions at `vec`, which is an array of that many that outlives the call.
            let count = unsafe { pagemap_scan(self.0.as_raw_fd(), &raw mut scan) }?;
            for region in &regions[..count as usize] {
                found(region.start..region.end);
            }
            if scan.walk_end <= at {
                break;
            }
            at = scan.walk_end;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of one range are meant
mod tests {
    use super::*;

    #[test]
    fn memory_is_there_once_it_is_written_to() {
        let mut map = memmap2::MmapOptions::new().len(8 << 20).map_anon().unwrap();
        map.advise(memmap2::Advice::NoHugePage).unwrap();
        map[5 * PAGE_SIZE] = 1;
        let start = map.as_ptr() as u64;
        let address = |page: u64| start + page * PAGE_SIZE as u64;
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let mut missing = Vec::new();
        pagemap.missing(start..address(9), |range| missing.push(range)).unwrap();
        assert_eq!(missing, [start..address(5), address(6)..address(9)]);
        assert!(pagemap.is_present(address(5)) && !pagemap.is_present(address(6)));
        assert_eq!(
            (pagemap.present_from(address(5), 9), pagemap.present_from(address(6), 9)),
            (1, 0)
        );
        let mut runs = Vec::new();
        let range = start..start + (8 << 20);
        pagemap.present(range.clone(), 4096, |first, count| runs.push((first, count))).unwrap();
        assert_eq!(runs, [(5, 1)]);
        let mut present = Vec::new();
        let scanned = pagemap.scan(range, flags::PRESENT, flags::HUGE, |range| {
            present.push(range);
        });
        match scanned {
            Ok(()) => assert_eq!(present, [address(5)..address(6)]),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "{error}"),
        }
    }

    #[test]
    fn pages_of_a_private_mapping_that_were_written_are_told() {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 64 * PAGE_SIZE]).unwrap();
        // SAFETY: nobody but this test has the file, which stays as it is.
        let mut map = unsafe { memmap2::MmapOptions::new().map_copy(&file) }.unwrap();
        let read: u64 = map.iter().map(|byte| u64::from(*byte)).sum();
        assert_eq!(read, 7 * 64 * PAGE_SIZE as u64);
        for page in [3, 4, 40] {
            map[page * PAGE_SIZE] = 8;
        }
        let start = map.as_ptr() as u64;
        let address = |page: u64| start + page * PAGE_SIZE as u64;
        let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
        let (mut scanned, mut read) = (Vec::new(), Vec::new());
        let range = start..address(64);
        pagemap.private(range.clone(), |range| scanned.push(range)).unwrap();
        pagemap.by_entries(range, is_private, |range| read.push(range)).unwrap();
        assert_eq!(scanned, [address(3)..address(5), address(40)..address(41)]);
        assert_eq!(read, scanned);
    }
}
