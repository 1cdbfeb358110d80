//! Who tracks a guest's writes since the parent of its new image, and what the kernel tells of them.

use std::io;
use std::ops::Range;

use super::direct::Unchanged;
use super::event::ChangedSince;
use crate::failpoint::fault;
use crate::host::huge_pages::{HUGE_PAGE, HugePagePolicy};
use crate::host::procfs::{Mapping, Pagemap, flags, reads_directly};
use crate::page::{Block, PAGE_SIZE};
use crate::runs::Tracking;

/// Pages that the kernel has to look at one by one, up to which the pause is made longer for this:
/// 512 MiB. It walks over them twice more, once for the tracker and once for QEMU's check of whether it can
/// protect memory, at about 10 ms a GiB.
const MOST_SMALL: u64 = (512 << 20) / PAGE_SIZE as u64;

/// How it is found out what differs from the parent.
pub(super) enum Since {
    /// There is no parent.
    NoParent,
    /// All memory is compared with it, for this reason.
    Compared(String),
    /// Whoever tracks the guest's writes will tell.
    Tracked(Box<ParentTracker>),
    /// The tracker has told, and has let go.
    Told,
}

/// Who tracks the guest's writes since the parent.
pub(super) struct ParentTracker {
    pub tracking: Tracking,
    pagemap: Pagemap,
    /// The parent's blocks, and where QEMU has them.
    places: Vec<(Block, u64)>,
}

impl Since {
    /// Whether the tracker has not let go yet.
    pub fn is_tracked(&self) -> bool {
        matches!(self, Since::Tracked(_))
    }

    /// What a save tells of it, which has taken so many pages from the parent unread.
    pub fn told(self, pages: u64) -> Option<ChangedSince> {
        match self {
            Since::NoParent => None,
            Since::Compared(why) => Some(ChangedSince::Comparing { why }),
            Since::Tracked(_) | Since::Told => Some(ChangedSince::WriteProtection { pages }),
        }
    }
}

impl ParentTracker {
    /// One whose parent has these blocks, of the QEMU in process `pid`; or why it does not help.
    pub fn of(tracking: Tracking, blocks: &[Block], pid: i32) -> Result<ParentTracker, String> {
        let place = |(name, address): &(String, u64)| {
            // Of huge pages of hugetlbfs some may have been written in part.
            let is_it = |block: &&Block| block.name == *name && block.page_size == PAGE_SIZE as u64;
            let block = blocks.iter().find(is_it)?;
            address.checked_add(block.len).map(|_| (block.clone(), *address))
        };
        let places: Vec<_> = tracking.what.blocks.iter().filter_map(place).collect();
        if places.is_empty() {
            return Err("no write protection tells what the guest has written".into());
        }
        let said = |error: io::Error| format!("QEMU's page map can't be read ({error})");
        let pagemap = Pagemap::open(pid).map_err(said)?;
        if reads_directly(pid).map_err(said)? {
            return Err("QEMU reads its disks directly into the guest's memory (O_DIRECT), which \
                        write protection does not stop once it is under way"
                .into());
        }
        let tracker = ParentTracker { tracking, pagemap, places };
        match tracker.small_pages(pid).map_err(said)? {
            0..=MOST_SMALL => Ok(tracker),
            _ => Err("its memory is in small pages, for which it would stand still longer".into()),
        }
    }

    /// The pages that are still protected. The guest must stand still.
    pub fn unchanged(&self) -> io::Result<Unchanged> {
        let mut unchanged = Unchanged::default();
        for (block, start) in &self.places {
            let range = *start..start + block.len;
            let mut runs = Vec::new();
            let mut add = |found: Range<u64>| {
                runs.push(pages(&(*start..found.start))..pages(&(*start..found.end)));
            };
            match fault("takes all for unchanged") {
                true => add(range),
                false => self.pagemap.protected(range, add)?,
            }
            unchanged.blocks.push((block.name.clone(), runs));
        }
        Ok(unchanged)
    }

    /// How many pages of the guest's memory the kernel has to look at one by one: all but those in
    /// huge pages, and those that are missing where a huge page of zeros will be.
    fn small_pages(&self, pid: i32) -> io::Result<u64> {
        let policy = HugePagePolicy::read();
        let mappings = Mapping::all_of_in_detail(pid)?;
        let mut small = 0;
        for (block, start) in &self.places {
            let range = *start..start + block.len;
            let of_block = mappings.iter().find(|mapping| mapping.range().contains(start));
            let zeros_are_huge = of_block.is_some_and(|it| it.inode == 0 && policy.wants(it));
            let scanned = self.pagemap.scan(range.clone(), flags::PRESENT, flags::HUGE, |found| {
                small += pages(&found);
            });
            match scanned {
                // This kernel does not tell.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => small += pages(&range),
                scanned => {
                    scanned?;
                    self.pagemap.missing(range, |found| {
                        small += pages(&found);
                        if zeros_are_huge {
                            small -= pages(&within_huge(&found));
                        }
                    })?;
                }
            }
        }
        Ok(small)
    }
}

/// How many pages a range has.
fn pages(range: &Range<u64>) -> u64 {
    (range.end - range.start) / PAGE_SIZE as u64
}

/// The part of a range that consists of whole huge pages.
fn within_huge(range: &Range<u64>) -> Range<u64> {
    let start = range.start.next_multiple_of(HUGE_PAGE);
    start..(range.end / HUGE_PAGE * HUGE_PAGE).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_huge_pages_of_a_range_are_found() {
        let huge = |count: u64| count * HUGE_PAGE;
        for (range, whole) in [
            (huge(1)..huge(3), huge(1)..huge(3)),
            (huge(1) + 1..huge(3) + 5, huge(2)..huge(3)),
            (huge(1) + 1..huge(3) - 1, huge(2)..huge(2)),
            (5..9, huge(1)..huge(1)),
        ] {
            assert_eq!(within_huge(&range), whole);
        }
    }
}
