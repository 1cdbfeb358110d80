//! Transparent huge pages in another process's memory (the kernel's
//! Documentation/admin-guide/mm/transhuge.rst): where they are wanted, where memory is in
//! small pages, and collapsing these.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use super::pidfd::Pidfd;
use super::procfs::{Mapping, Pagemap, flags};
use crate::page::PAGE_SIZE;

/// Bytes in a huge page of the usual size.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Bytes that are collapsed in one call at most. The kernel waits once in each for the other
/// processors (`lru_add_drain_all`), which takes longer than to collapse one huge page; between
/// two huge pages it lets go of the process's memory.
pub const COLLAPSED_AT_ONCE: u64 = 8 * HUGE_PAGE;

/// The directory of the kernel's settings of huge pages.
pub const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// The setting that says who gets transparent huge pages
/// (`Documentation/admin-guide/mm/transhuge.rst`).
pub const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// What [`ENABLED`] is set to, such as `madvise`; none where the kernel has no huge pages of
/// this kind.
pub fn mode() -> Option<String> {
    let setting = fs::read_to_string(ENABLED).ok()?;
    Some(marked(&setting).unwrap_or("unknown").to_owned())
}

/// Small pages in a huge page.
const SMALL_PAGES: u16 = (HUGE_PAGE / PAGE_SIZE as u64) as u16;

/// Which memory the host wants in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePagePolicy {
    anonymous: Wanted,
    shared: Wanted,
    /// Small pages from which on a huge page is worth it, of 512: the others, which are missing
    /// or zeros and take no memory, will take some then.
    pub least: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Always,
    /// Where the process has asked for them (`MADV_HUGEPAGE`).
    Advised,
    Never,
}

impl HugePagePolicy {
    /// The host's. A kernel that doesn't tell wants none.
    pub fn read() -> HugePagePolicy {
        let setting = |name| fs::read_to_string(format!("{SETTINGS}/{name}")).unwrap_or_default();
        HugePagePolicy {
            anonymous: wanted(&setting("enabled")),
            shared: wanted(&setting("shmem_enabled")),
            least: least(&setting("khugepaged/max_ptes_none")),
        }
    }

    /// Whether this mapping's memory is wanted in huge pages, and can be in them: it is
    /// anonymous, or a shared file in memory. `mapping` must have been read in detail.
    pub fn wants(&self, mapping: &Mapping) -> bool {
        let wanted = match (mapping.inode, mapping.shared) {
            (0, _) => self.anonymous,
            (_, true) => self.shared,
            // What is written to a private mapping of a file can't be collapsed.
            (_, false) => Wanted::Never,
        };
        let advised = match wanted {
            Wanted::Always => !mapping.has_flag(*b"nh"),
            Wanted::Advised => mapping.has_flag(*b"hg"),
            Wanted::Never => false,
        };
        // Pages of hugetlbfs are huge in any case.
        advised && mapping.page_size == Some(PAGE_SIZE as u64)
    }
}

/// The setting that is marked in a line like `always [madvise] never`.
fn marked(setting: &str) -> Option<&str> {
    let (_, rest) = setting.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

/// Which memory a setting wants in huge pages.
fn wanted(setting: &str) -> Wanted {
    match marked(setting) {
        Some("always" | "within_size" | "force") => Wanted::Always,
        Some("madvise" | "advise") => Wanted::Advised,
        _ => Wanted::Never,
    }
}

/// The fewest small pages that the kernel itself collapses in time (`khugepaged`), by its setting
/// of how many may be missing: by default any but none.
fn least(max_missing: &str) -> u16 {
    let missing = max_missing.trim().parse().unwrap_or(SMALL_PAGES);
    SMALL_PAGES.saturating_sub(missing).max(1)
}

/// Bytes of a range that are mapped by huge pages.
///
/// # Errors
/// As for [`Pagemap::scan`].
pub fn huge_bytes(pagemap: &Pagemap, range: Range<u64>) -> io::Result<u64> {
    let mut bytes = 0;
    pagemap.scan(range, flags::PRESENT | flags::HUGE, flags::ZERO, |huge| {
        bytes += huge.end - huge.start;
    })?;
    Ok(bytes)
}

/// Counts the small pages in a range that are in memory, other than the kernel's page of
/// zeros. Adds to `worth` the stretches of whole huge pages that at least so many small ones,
/// `least`, would each make, of [`COLLAPSED_AT_ONCE`] bytes at most.
///
/// # Errors
/// As for [`Pagemap::scan`].
pub fn find_small(
    pagemap: &Pagemap,
    range: Range<u64>,
    least: u16,
    worth: &mut Vec<Range<u64>>,
) -> io::Result<u64> {
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
    for (address, _) in huge_pages.filter(|(_, count)| *count >= least) {
        match worth.last_mut() {
            Some(last) if last.end == address && last.end - last.start < COLLAPSED_AT_ONCE => {
                last.end += HUGE_PAGE;
            }
            _ => worth.push(address..address + HUGE_PAGE),
        }
    }
    Ok(total)
}

/// Collapses the small pages in a range of a process's memory, which consists of whole huge
/// pages, into these (`MADV_COLLAPSE` of madvise(2), Linux 6.1). What the memory holds stays the
/// same. Pages of zeros, and pages that are missing, become memory of their own. Returns how many
/// bytes lie in huge pages now; less than all where it can't be done just there, or just now.
///
/// # Errors
/// When it can't be done anywhere: the kernel is too old, the process has ended, or we have
/// no right to it (process_madvise(2): CAP_SYS_NICE, and the right to read the process's memory).
pub fn collapse(process: &Pidfd, range: Range<u64>) -> io::Result<u64> {
    let len = range.end - range.start;
    if collapse_in_one(process, range.clone())? {
        return Ok(len);
    }
    // The kernel doesn't tell which part was refused.
    let mut collapsed = 0;
    for address in range.step_by(HUGE_PAGE as usize).take_while(|_| len > HUGE_PAGE) {
        if collapse_in_one(process, address..address + HUGE_PAGE)? {
            collapsed += HUGE_PAGE;
        }
    }
    Ok(collapsed)
}

/// Collapses a range by one call; false where a part of it was refused.
fn collapse_in_one(process: &Pidfd, range: Range<u64>) -> io::Result<bool> {
    let len = (range.end - range.start) as usize;
    let range = libc::iovec { iov_base: range.start as *mut _, iov_len: len };
    // SAFETY: process_madvise(2) reads the one `iovec` that it is given. MADV_COLLAPSE
    // changes how that process's memory is mapped, not what it holds.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            process.as_fd().as_raw_fd(),
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
#[allow(clippy::single_range_in_vec_init)] // lists of one range are meant
mod tests {
    use super::*;

    #[test]
    fn small_pages_are_found_and_collapsed() {
        const HUGE: usize = HUGE_PAGE as usize;
        const LEAST: u16 = 448;
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
        let Ok(small) = find_small(&pagemap, range.clone(), LEAST, &mut worth) else {
            eprintln!("this kernel has no PAGEMAP_SCAN: not tested");
            return;
        };
        assert_eq!(small as usize, 5 * HUGE / 2 / PAGE_SIZE);
        let expected = start + first..start + first + 2 * HUGE;
        assert_eq!(worth, [expected.start as u64..expected.end as u64]);
        assert_eq!(huge_bytes(&pagemap, range.clone()).unwrap(), 0);

        map.advise(memmap2::Advice::HugePage).unwrap();
        let process = Pidfd::open(pid).unwrap();
        if matches!(collapse(&process, worth[0].clone()), Ok(collapsed) if collapsed == 2 * HUGE_PAGE)
        {
            let mut left = Vec::new();
            let small = find_small(&pagemap, range.clone(), LEAST, &mut left).unwrap();
            assert_eq!((small as usize, left), (HUGE / 2 / PAGE_SIZE, vec![]));
            assert_eq!(huge_bytes(&pagemap, range).unwrap(), 2 * HUGE_PAGE);
        }
        assert!(map[first..first + 5 * HUGE / 2].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn settings_are_read_as_the_kernel_marks_them() {
        for (setting, expected) in [
            ("[always] madvise never\n", Wanted::Always),
            ("always [madvise] never\n", Wanted::Advised),
            ("always madvise [never]\n", Wanted::Never),
            ("always within_size [advise] never deny force\n", Wanted::Advised),
            ("always within_size advise never [deny] force\n", Wanted::Never),
            ("", Wanted::Never),
        ] {
            assert_eq!(wanted(setting), expected, "{setting}");
        }
        let values = ["511\n", "0\n", "64", "512", "70000", ""].map(least);
        assert_eq!(values, [1, 512, 448, 1, 1, 1]);
    }

    #[test]
    fn memory_is_wanted_in_huge_pages_where_the_host_and_its_process_agree() {
        let mapping = |inode, shared, flags: &[[u8; 2]]| Mapping {
            start: 0,
            end: HUGE_PAGE,
            readable: true,
            writable: true,
            executable: false,
            shared,
            offset: 0,
            device: (0, 0),
            inode,
            path: None,
            page_size: Some(PAGE_SIZE as u64),
            flags: flags.to_vec(),
        };
        let policy = |anonymous, shared| HugePagePolicy { anonymous, shared, least: 1 };
        let advised = policy(Wanted::Advised, Wanted::Never);
        assert!(advised.wants(&mapping(0, false, &[*b"hg"])));
        assert!(!advised.wants(&mapping(0, false, &[])));
        assert!(!advised.wants(&mapping(7, true, &[*b"hg"])));
        let hugetlb =
            Mapping { page_size: Some(HUGE_PAGE), ..mapping(0, false, &[*b"hg", *b"ht"]) };
        assert!(!advised.wants(&hugetlb));
        let always = policy(Wanted::Always, Wanted::Advised);
        assert!(always.wants(&mapping(0, false, &[])));
        assert!(!always.wants(&mapping(0, false, &[*b"nh"])));
        assert!(always.wants(&mapping(7, true, &[*b"hg"])));
        assert!(!always.wants(&mapping(7, false, &[*b"hg"])));
    }
}
