//! Huge pages for a guest that has been brought back, whose memory came in small ones.
//!
//! UFFDIO_COPY(2const) installs pages of 4 KiB. With them the guest is slower than it was, and
//! the next save pauses it for longer. So they are collapsed into huge pages again, from
//! outside, while the guest runs.
//!
//! This begins behind `resident`. As long as memory is registered with a userfaultfd for missing
//! pages, the kernel collapses nothing with a page in it that is missing or zero; and until
//! then the host has better things to do.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::event::RevertEvent;
use crate::cancel::Cancellation;
use crate::host::huge_pages::{self, HugePagePolicy, find_small, huge_bytes};
use crate::host::pidfd::Pidfd;
use crate::host::procfs::{AddressSpace, MemInfo, Pagemap};
use crate::rate::RateLimit;

/// A call in which the guest may wait for the kernel is followed by a rest of this share of the
/// time that it took.
const REST: f64 = 0.25;

/// The share of the host's memory that stays available: one part of so many.
const SPARED: u64 = 16;

/// Calls in a row that can collapse nothing before it is given up: the host's memory is
/// fragmented then, and looking for huge pages is expensive.
const REFUSED: usize = 8;

/// The longest sleep that doesn't look for a cancellation.
const NAP: Duration = Duration::from_millis(5);

/// Collapses a stretch of a process's memory, [`huge_pages::collapse`].
///
/// # Errors
/// As there, and ENOMEM where the host is short of memory: a stretch may take as much as it is
/// large, if most of it are zeros.
pub(super) fn collapse(process: &Pidfd, stretch: Range<u64>) -> io::Result<u64> {
    let memory = MemInfo::read()?;
    if memory.available < memory.total / SPARED {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    huge_pages::collapse(process, stretch)
}

/// Memory of a QEMU that is to be in huge pages.
#[derive(Debug)]
pub(super) struct Collapsing {
    /// QEMU's process.
    pub pid: i32,
    /// The same as /proc shows it, where this process may not open that any more.
    pub space: Option<Arc<AddressSpace>>,
    /// Where its guest's memory lies, as far as that is proven.
    pub memory: Vec<Range<u64>>,
    /// The most bytes a second that are collapsed.
    pub rate: Option<u64>,
}

impl Collapsing {
    /// Collapses what is worth it, stretch by stretch, by `collapse`. Returns the event that tells
    /// what came of it; none where QEMU has ended. It blocks; `cancel` ends it within some
    /// milliseconds.
    pub fn run(
        &self,
        collapse: impl FnMut(Range<u64>) -> io::Result<u64>,
        cancel: &Cancellation,
    ) -> Option<RevertEvent> {
        let start = Instant::now();
        let mut collapsed = Collapsed::default();
        let done = self.collapse(collapse, cancel, &mut collapsed);
        if let Err(error) = &done
            && matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
        {
            return None;
        }
        Some(RevertEvent::Collapsed {
            before_bytes: collapsed.before,
            after_bytes: collapsed.after,
            took_ms: start.elapsed().as_secs_f64() * 1e3,
            stopped: done.err().map(|error| explained(&error)).or(collapsed.stopped),
        })
    }

    /// As [`run`](Collapsing::run): ESRCH where QEMU has ended.
    fn collapse(
        &self,
        collapse: impl FnMut(Range<u64>) -> io::Result<u64>,
        cancel: &Cancellation,
        collapsed: &mut Collapsed,
    ) -> io::Result<()> {
        let space = match &self.space {
            Some(space) => Arc::clone(space),
            None => Arc::new(AddressSpace::open(self.pid)?),
        };
        let done = self.collapse_in(&space, collapse, cancel, collapsed);
        match space.has_ended() {
            // Its memory went with it, and what was seen of it last means nothing.
            true => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            false => done,
        }
    }

    fn collapse_in(
        &self,
        space: &AddressSpace,
        collapse: impl FnMut(Range<u64>) -> io::Result<u64>,
        cancel: &Cancellation,
        collapsed: &mut Collapsed,
    ) -> io::Result<()> {
        let pagemap = space.pagemap();
        let policy = HugePagePolicy::read();
        let ranges = self.wanted(space, policy)?;
        if ranges.is_empty() {
            let why = "the host wants none for this guest (/sys/kernel/mm/transparent_hugepage)";
            collapsed.stopped = Some(why.into());
        }
        collapsed.before = huge_bytes_in(pagemap, &ranges)?;
        collapsed.after = collapsed.before;
        let mut worth = Vec::new();
        for range in &ranges {
            find_small(pagemap, range.clone(), policy.least, &mut worth)?;
        }
        let stopped = self.collapse_all(collapse, &worth, cancel);
        collapsed.after = huge_bytes_in(pagemap, &ranges)?;
        if let Some(why) = stopped? {
            collapsed.stopped = Some(why.into());
        }
        Ok(())
    }

    /// The guest's memory that is wanted in huge pages.
    fn wanted(&self, space: &AddressSpace, policy: HugePagePolicy) -> io::Result<Vec<Range<u64>>> {
        let mut mappings = space.mappings()?;
        mappings.retain(|mapping| policy.wants(mapping));
        let pairs = self.memory.iter().flat_map(|memory| {
            mappings
                .iter()
                .map(move |mapping| memory.start.max(mapping.start)..memory.end.min(mapping.end))
        });
        Ok(pairs.filter(|range| !range.is_empty()).collect())
    }

    /// Collapses each of these stretches of memory, with a rest behind each. Returns why it has
    /// stopped early, if it has.
    fn collapse_all(
        &self,
        mut collapse: impl FnMut(Range<u64>) -> io::Result<u64>,
        stretches: &[Range<u64>],
        cancel: &Cancellation,
    ) -> io::Result<Option<&'static str>> {
        let mut rate = self.rate.map(|rate| RateLimit::new(rate, Instant::now()));
        let mut refused = 0;
        for stretch in stretches {
            if cancel.is_requested() {
                return Ok(Some("interrupted"));
            }
            let start = Instant::now();
            refused = match collapse(stretch.clone()) {
                Ok(0) => refused + 1,
                Ok(_) => 0,
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                    return Ok(Some("the host is short of memory"));
                }
                Err(error) => return Err(error),
            };
            if refused == REFUSED {
                return Ok(Some("the host finds no memory for huge pages"));
            }
            let now = Instant::now();
            let rested = now + (now - start).mul_f64(REST);
            let due = rate.as_mut().map(|rate| rate.count(now, stretch.end - stretch.start));
            rest(rested.max(due.unwrap_or(now)), cancel);
        }
        Ok(None)
    }
}

/// What came of collapsing.
#[derive(Debug, Default)]
struct Collapsed {
    /// Bytes in huge pages.
    before: u64,
    after: u64,
    /// Why it ended before all that is worth it was collapsed.
    stopped: Option<String>,
}

fn huge_bytes_in(pagemap: &Pagemap, ranges: &[Range<u64>]) -> io::Result<u64> {
    ranges.iter().map(|range| huge_bytes(pagemap, range.clone())).sum()
}

/// Sleeps until then.
fn rest(until: Instant, cancel: &Cancellation) {
    while !cancel.is_requested() {
        match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => return,
            left => sleep(left.min(NAP)),
        }
    }
}

/// An error, with what it takes.
fn explained(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => format!(
            "{error}: collapsing memory of another process takes root, or CAP_SYS_NICE and the \
             right to trace it (process_madvise(2))"
        ),
        Some(libc::ENOSYS | libc::ENOTTY) => format!("{error}: it takes Linux 6.7"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of one range are meant
mod tests {
    use super::*;
    use crate::host::huge_pages::HUGE_PAGE;

    /// Memory of this process in small pages, as a revert leaves it: `filled` MiB of 16.
    fn small_memory(filled: usize) -> memmap2::MmapMut {
        let mut map = memmap2::MmapOptions::new().len(16 << 20).map_anon().unwrap();
        map.advise(memmap2::Advice::NoHugePage).unwrap();
        let first = (map.as_ptr() as usize).next_multiple_of(2 << 20) - map.as_ptr() as usize;
        map[first..first + (filled << 20)].fill(7);
        map.advise(memmap2::Advice::HugePage).unwrap();
        map
    }

    fn collapsing(map: &memmap2::MmapMut, rate: Option<u64>) -> Collapsing {
        let start = map.as_ptr() as u64;
        let memory = vec![start..start + map.len() as u64];
        Collapsing { pid: std::process::id() as i32, space: None, memory, rate }
    }

    fn run(collapsing: &Collapsing, cancel: &Cancellation) -> Option<RevertEvent> {
        let process = Pidfd::open(collapsing.pid).unwrap();
        collapsing.run(|stretch| collapse(&process, stretch), cancel)
    }

    /// Bytes in huge pages at the end, and why it stopped. The kernel collapses memory by itself
    /// too, so that nothing can be said of what was in huge pages before.
    fn told(event: Option<RevertEvent>) -> (u64, Option<String>) {
        match event {
            Some(RevertEvent::Collapsed { after_bytes, stopped, .. }) => (after_bytes, stopped),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn small_pages_become_huge_ones() {
        let map = small_memory(12);
        let (after, stopped) = told(run(&collapsing(&map, None), &Cancellation::new()));
        // Where this process may not, or the host wants no huge pages, it says so.
        assert!(after == 12 << 20 || stopped.is_some(), "{after} {stopped:?}");
    }

    #[test]
    fn what_is_cancelled_already_begins_nothing() {
        let map = small_memory(12);
        let cancel = Cancellation::new();
        cancel.request();
        let (_, stopped) = told(run(&collapsing(&map, None), &cancel));
        assert!(stopped.is_some());
    }

    #[test]
    fn a_rest_ends_with_a_cancellation() {
        let map = small_memory(12);
        let cancel = Cancellation::new();
        let after = cancel.clone();
        let start = Instant::now();
        std::thread::spawn(move || {
            sleep(Duration::from_millis(50));
            after.request();
        });
        // One byte a second.
        told(run(&collapsing(&map, Some(1)), &cancel));
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_process_that_has_ended_is_no_error() {
        let mut other = std::process::Command::new("true").spawn().unwrap();
        let pid = other.id() as i32;
        other.wait().unwrap();
        let memory = vec![0..HUGE_PAGE];
        let collapsing = Collapsing { pid, space: None, memory, rate: None };
        assert_eq!(collapsing.run(|_| panic!("there is no memory"), &Cancellation::new()), None);
    }
}
