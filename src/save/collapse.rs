//! Making QEMU's walk over guest memory short: putting small pages together.
//!
//! In its pause QEMU write-protects all guest memory. The kernel does that page by page:
//! 1 ms a GiB where memory is mapped by huge pages, about 10 ms a GiB where it is mapped
//! by pages of 4 KiB (measured). Every background snapshot leaves it so, since each page
//! is made writable again by itself. So before a save that would pause the guest for
//! long, huge pages are put together again, while the guest runs (`MADV_COLLAPSE`,
//! madvise(2), Linux 6.1).

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::prefault::guest_memory;
use crate::cancel::Cancellation;
use crate::host::memory::{HUGE_PAGE, collapse};
use crate::host::pidfd::Pidfd;
use crate::host::procfs::{Pagemap, flags};
use crate::page::PAGE_SIZE;
use crate::qmp::RamBlock;

/// Small pages that a huge page is made of at least, of 512: what is missing is filled
/// up with new memory, which the host then has to have.
const MOSTLY: u16 = 448;

/// Small pages that are worth nothing: write-protecting them takes 5 ms.
const FEW: u64 = (512 << 20) / PAGE_SIZE as u64;

/// The longest that a save waits for this.
const LIMIT: Duration = Duration::from_secs(10);

/// Puts the small pages of a QEMU's guest memory together to huge ones, where they are so
/// many that a save would pause the guest for long because of them. The guest runs
/// meanwhile; it waits where it touches the 2 MiB that are being put together, for half a
/// millisecond.
///
/// A help, no more: where the kernel or our rights don't allow it, nothing happens. `cancel`
/// ends it early.
pub(super) fn collapse_memory(pid: i32, blocks: &[RamBlock], cancel: &Cancellation) {
    let result = (|| {
        let pagemap = Pagemap::open(pid)?;
        let mut worth = Vec::new();
        let mut small = 0;
        for range in guest_memory(pid, blocks) {
            small += find_small(&pagemap, range, &mut worth)?;
        }
        if small < FEW {
            return Ok(());
        }
        let process = Pidfd::open(pid)?;
        let begun = Instant::now();
        let mut done = 0;
        for address in &worth {
            if cancel.is_requested() || begun.elapsed() > LIMIT {
                break;
            }
            done += usize::from(collapse(&process, *address)?);
        }
        tracing::debug!("put {done} huge pages together in {:?}", begun.elapsed());
        Ok::<_, io::Error>(())
    })();
    if let Err(error) = result {
        tracing::debug!("huge pages can't be put together: {error}");
    }
}

/// Counts the pages in a range that are in memory and mapped by themselves; adds to
/// `worth` the addresses where enough of them make a huge page.
fn find_small(pagemap: &Pagemap, range: Range<u64>, worth: &mut Vec<u64>) -> io::Result<u64> {
    // The first huge page that lies in the range as a whole.
    let base = range.start.next_multiple_of(HUGE_PAGE);
    let mut counts = vec![0u16; (range.end.saturating_sub(base) / HUGE_PAGE) as usize];
    let mut total = 0;
    pagemap.scan(range, flags::PRESENT, flags::HUGE | flags::ZERO, |small| {
        total += (small.end - small.start) / PAGE_SIZE as u64;
        let mut page = small.start;
        while page < small.end {
            let next = (page + 1).next_multiple_of(HUGE_PAGE).min(small.end);
            let slot = page.checked_sub(base).map(|offset| (offset / HUGE_PAGE) as usize);
            if let Some(count) = slot.and_then(|slot| counts.get_mut(slot)) {
                *count += ((next - page) / PAGE_SIZE as u64) as u16;
            }
            page = next;
        }
    })?;
    let huge_pages = (base..).step_by(HUGE_PAGE as usize).zip(counts);
    worth.extend(huge_pages.filter(|(_, count)| *count >= MOSTLY).map(|(address, _)| address));
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pages_are_found_and_put_together() {
        const HUGE: usize = HUGE_PAGE as usize;
        let len = 16 << 20;
        let mut map = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
        // Small pages, whatever the host's settings are.
        map.advise(memmap2::Advice::NoHugePage).unwrap();
        let start = map.as_ptr() as usize;
        let first = start.next_multiple_of(HUGE) - start;
        // Two huge pages' worth, and half of a third.
        map[first..first + 5 * HUGE / 2].fill(7);
        let pid = std::process::id() as i32;
        let pagemap = Pagemap::open(pid).unwrap();
        let range = start as u64..(start + len) as u64;
        let mut worth = Vec::new();
        let Ok(small) = find_small(&pagemap, range.clone(), &mut worth) else {
            eprintln!("this kernel has no PAGEMAP_SCAN: not tested");
            return;
        };
        assert_eq!(small as usize, 5 * HUGE / 2 / PAGE_SIZE);
        assert_eq!(worth, [start + first, start + first + HUGE].map(|address| address as u64));

        map.advise(memmap2::Advice::HugePage).unwrap();
        let process = Pidfd::open(pid).unwrap();
        if worth.iter().all(|address| matches!(collapse(&process, *address), Ok(true))) {
            let mut left = Vec::new();
            let small = find_small(&pagemap, range, &mut left).unwrap();
            assert_eq!((small as usize, left), (HUGE / 2 / PAGE_SIZE, vec![]));
        }
        assert!(map[first..first + 5 * HUGE / 2].iter().all(|byte| *byte == 7));
    }
}
