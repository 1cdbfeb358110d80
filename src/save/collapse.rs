//! Making QEMU's walk over guest memory short: putting small pages together.
//!
//! In its pause QEMU write-protects all guest memory. The kernel does that page by page:
//! 1 ms a GiB where memory is mapped by huge pages, about 10 ms a GiB where it is mapped
//! by pages of 4 KiB (measured). Every background snapshot leaves it so, since each page
//! is made writable again by itself. So before a save that would pause the guest for
//! long, huge pages are put together again, while the guest runs (`MADV_COLLAPSE`,
//! madvise(2), Linux 6.1).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use linux_raw_sys::general::{
    PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, page_region, pm_scan_arg,
};

use super::touch::mappings;
use crate::cancel::Cancellation;
use crate::host::uffd::pidfd_open;
use crate::page::PAGE_SIZE;
use crate::qmp::RamBlock;

/// Bytes in a huge page.
const HUGE: usize = 2 << 20;

/// Small pages that a huge page is made of at least, of 512: what is missing is filled
/// up with new memory, which the host then has to have.
const MOSTLY: u16 = 448;

/// Small pages that are worth nothing: write-protecting them takes 5 ms.
const FEW: usize = (512 << 20) / PAGE_SIZE;

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
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut worth = Vec::new();
        let mut small = 0;
        for (start, len) in mappings(pid, blocks) {
            small += find_small(&pagemap, start, len, &mut worth)?;
        }
        if small < FEW {
            return Ok(());
        }
        let process = pidfd_open(pid)?;
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

nix::ioctl_readwrite!(
    /// `PAGEMAP_SCAN` (Linux's Documentation/admin-guide/mm/pagemap.rst, Linux 6.7).
    pagemap_scan,
    b'f',
    16,
    pm_scan_arg
);

/// Counts the pages in a range that are in memory and mapped by themselves; adds to
/// `worth` where enough of them make a huge page.
fn find_small(
    pagemap: &File,
    start: usize,
    len: usize,
    worth: &mut Vec<usize>,
) -> io::Result<usize> {
    const NONE: page_region = page_region { start: 0, end: 0, categories: 0 };
    let present = u64::from(PAGE_IS_PRESENT);
    let neither = u64::from(PAGE_IS_HUGE | PAGE_IS_PFNZERO);
    // The first huge page that lies in the range as a whole.
    let base = start.next_multiple_of(HUGE);
    let mut counts = vec![0u16; (start + len).saturating_sub(base) / HUGE];
    let mut regions = [NONE; 1024];
    let mut total = 0;
    let mut at = start as u64;
    while at < (start + len) as u64 {
        let mut scan = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: 0,
            start: at,
            end: (start + len) as u64,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: neither,
            category_mask: present | neither,
            category_anyof_mask: 0,
            return_mask: present,
        };
        // SAFETY: `scan` is what the call takes, and names room for as many regions as it
        // says, which lives as long as the call.
        let found = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) }?;
        for region in &regions[..found as usize] {
            let (mut page, end) = (region.start as usize, region.end as usize);
            total += (end - page) / PAGE_SIZE;
            while page < end {
                let next = (page + 1).next_multiple_of(HUGE).min(end);
                let slot = page.checked_sub(base).map(|offset| offset / HUGE);
                if let Some(count) = slot.and_then(|slot| counts.get_mut(slot)) {
                    *count += ((next - page) / PAGE_SIZE) as u16;
                }
                page = next;
            }
        }
        if scan.walk_end <= at {
            break;
        }
        at = scan.walk_end;
    }
    let slots = counts.iter().enumerate().filter(|(_, count)| **count >= MOSTLY);
    worth.extend(slots.map(|(slot, _)| base + slot * HUGE));
    Ok(total)
}

/// Makes one huge page. False where that can't be done just there, or just now.
fn collapse(process: &OwnedFd, address: usize) -> io::Result<bool> {
    let range = libc::iovec { iov_base: address as *mut _, iov_len: HUGE };
    // SAFETY: process_madvise(2) reads the one range it is given. MADV_COLLAPSE changes how
    // that process's memory is mapped, not what it holds.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_raw_fd(),
            &raw const range,
            1,
            libc::MADV_COLLAPSE,
            0,
        )
    };
    if done >= 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOSYS | libc::ESRCH) => Err(error),
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pages_are_found_and_put_together() {
        let len = 16 << 20;
        let mut map = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
        // Small pages, whatever the host's settings are.
        map.advise(memmap2::Advice::NoHugePage).unwrap();
        let start = map.as_ptr() as usize;
        let first = start.next_multiple_of(HUGE) - start;
        // Two huge pages' worth, and half of a third.
        map[first..first + 5 * HUGE / 2].fill(7);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut worth = Vec::new();
        let Ok(small) = find_small(&pagemap, start, len, &mut worth) else {
            eprintln!("this kernel has no PAGEMAP_SCAN: not tested");
            return;
        };
        assert_eq!(small, 5 * HUGE / 2 / PAGE_SIZE);
        assert_eq!(worth, [start + first, start + first + HUGE]);

        map.advise(memmap2::Advice::HugePage).unwrap();
        let process = pidfd_open(std::process::id() as i32).unwrap();
        if worth.iter().all(|address| matches!(collapse(&process, *address), Ok(true))) {
            let mut left = Vec::new();
            let small = find_small(&pagemap, start, len, &mut left).unwrap();
            assert_eq!((small, left), (HUGE / 2 / PAGE_SIZE, vec![]));
        }
        assert!(map[first..first + 5 * HUGE / 2].iter().all(|byte| *byte == 7));
    }
}
