//! A piece of memory that is read, and taken where it was protected all the while.

use std::io;
use std::ops::Range;

use crate::failpoint::fault;
use crate::host::memory;
use crate::host::procfs::Pagemap;
use crate::page::{BlockId, PAGE_SIZE, Run};
use crate::save::error::SaveError;
use crate::save::merge::Merge;

/// Why reading has ended before all was read.
#[derive(Debug, thiserror::Error)]
pub(in crate::save) enum Ended {
    #[error("it was stopped")]
    Stopped,
    #[error("memory can't be read: {0}")]
    Memory(#[from] io::Error),
    #[error(transparent)]
    Image(Box<SaveError>),
}

impl From<SaveError> for Ended {
    fn from(error: SaveError) -> Ended {
        Ended::Image(Box::new(error))
    }
}

/// Reads what is missing of `window`, of a block that process `pid` has at `start`, and captures of
/// it what is still protected behind that: the rest QEMU has sent. `buffer` has room for the window.
pub(in crate::save) fn capture(
    pid: i32,
    pagemap: &Pagemap,
    start: u64,
    window: Run,
    merge: &Merge,
    buffer: &mut [u8],
) -> Result<(), Ended> {
    let Some(run) = merge.absent_within(window) else { return Ok(()) };
    let address = start + run.offset();
    let bytes = &mut buffer[..run.bytes() as usize];
    memory::read(pid, address, bytes)?;
    let bytes = &*bytes;
    if fault("ignores protection") {
        return Ok(merge.read(run, bytes)?);
    }
    let mut outcome = Ok(());
    pagemap.protected(address..address + run.bytes(), |found| {
        let at = (found.start - address) as usize;
        let bytes = &bytes[at..at + (found.end - found.start) as usize];
        if outcome.is_ok() {
            outcome = merge.read(run_of(run.block, start, &found), bytes);
        }
    })?;
    Ok(outcome?)
}

/// The pages at these addresses of a block that begins at `start`.
pub(super) fn run_of(block: BlockId, start: u64, addresses: &Range<u64>) -> Run {
    let page = |address: u64| (address - start) / PAGE_SIZE as u64;
    let first = page(addresses.start);
    Run { block, first, count: page(addresses.end) - first }
}
