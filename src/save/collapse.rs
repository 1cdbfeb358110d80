//! Making QEMU's walk over guest memory short: small pages are collapsed into huge ones.
//!
//! In its pause QEMU write-protects all guest memory. The kernel does that page by page:
//! 1 ms a GiB where memory is mapped by huge pages, about 10 ms a GiB where it is mapped
//! by pages of 4 KiB (measured). Every background snapshot leaves it so, since each page
//! is made writable again by itself. So before a save that would pause the guest for
//! long, they are collapsed into huge pages again, while the guest runs (`MADV_COLLAPSE`,
//! madvise(2), Linux 6.1).

use std::io;
use std::time::{Duration, Instant};

use super::prefault::guest_memory;
use crate::cancel::Cancellation;
use crate::host::huge_pages::{HUGE_PAGE, collapse, find_small};
use crate::host::pidfd::Pidfd;
use crate::host::procfs::Pagemap;
use crate::page::PAGE_SIZE;
use crate::qmp::RamBlock;

/// Small pages that a huge page is made of at least, of 512: what is missing is filled
/// up with new memory, which the host then has to have.
const MOSTLY: u16 = 448;

/// Small pages that are worth nothing: write-protecting them takes 5 ms.
const FEW: u64 = (512 << 20) / PAGE_SIZE as u64;

/// The longest that a save waits for this.
const LIMIT: Duration = Duration::from_secs(10);

/// Collapses the small pages of a QEMU's guest memory into huge ones, where they are so many that
/// a save would pause the guest for long because of them. The guest runs meanwhile; it waits
/// where it touches the 2 MiB that are being collapsed, for half a millisecond.
///
/// A help, no more: where the kernel or our rights don't allow it, nothing happens. `cancel`
/// ends it early.
pub(super) fn collapse_memory(pid: i32, blocks: &[RamBlock], cancel: &Cancellation) {
    let result = (|| {
        let pagemap = Pagemap::open(pid)?;
        let mut worth = Vec::new();
        let mut small = 0;
        for range in guest_memory(pid, blocks) {
            small += find_small(&pagemap, range, MOSTLY, &mut worth)?;
        }
        if small < FEW {
            return Ok(());
        }
        let process = Pidfd::open(pid)?;
        let begun = Instant::now();
        let mut done = 0;
        for range in worth {
            if cancel.is_requested() || begun.elapsed() > LIMIT {
                break;
            }
            done += collapse(&process, range)? / HUGE_PAGE;
        }
        tracing::debug!("collapsed small pages into {done} huge ones in {:?}", begun.elapsed());
        Ok::<_, io::Error>(())
    })();
    if let Err(error) = result {
        tracing::debug!("guest memory can't be collapsed: {error}");
    }
}
