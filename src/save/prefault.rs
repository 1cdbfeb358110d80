//! Prefaulting guest memory, so that QEMU doesn't do it in the pause.

use std::ops::Range;

use crate::cancel::Cancellation;
use crate::host::memory;
use crate::host::procfs::{Mapping, ranges_of_len};
use crate::qmp::RamBlock;

/// Blocks below this many bytes are not worth looking for: QEMU walks them in no time.
const WORTH: u64 = 1 << 20;

/// Reads one byte of every page of a QEMU's guest memory. What was never used is then
/// mapped (to a page of zeros, or in memory files to memory of its own), as QEMU would
/// do by itself at the start of a background snapshot, but with the guest standing still.
///
/// A help, no more: what can't be read QEMU reads itself. `cancel` ends it early.
pub(super) fn prefault(pid: i32, blocks: &[RamBlock], cancel: &Cancellation) {
    for range in guest_memory(pid, blocks) {
        let start = range.start;
        if let Err(error) = memory::prefault(pid, range, cancel) {
            tracing::debug!("prefaulting memory at {start:#x} failed: {error}");
        }
    }
}

/// Where a process may have these blocks: all writable memory of their lengths, in the order
/// of their addresses. Something else that is as long is treated as guest memory in vain.
pub(super) fn guest_memory(pid: i32, blocks: &[RamBlock]) -> Vec<Range<u64>> {
    let mut mappings = Mapping::all_of(pid).unwrap_or_default();
    mappings.retain(|mapping| mapping.readable && mapping.writable);
    let mut lengths: Vec<u64> = blocks.iter().map(|block| block.total_len).collect();
    lengths.retain(|len| *len >= WORTH);
    lengths.sort_unstable();
    lengths.dedup();
    let ranges = lengths.into_iter().flat_map(|len| ranges_of_len(&mappings, len));
    without_overlaps(ranges.collect())
}

/// The same addresses in ranges that don't overlap, in their order.
fn without_overlaps(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(total_len: u64) -> RamBlock {
        RamBlock { name: "ram".into(), page_size: 4096, used_len: 1, total_len, address: None }
    }

    #[test]
    fn memory_as_long_as_a_block_is_found() {
        // Longer than what allocators keep, so a mapping of its own, and of an odd length.
        let len = 8_675_309u64.next_multiple_of(4096);
        let map = memmap2::MmapOptions::new().len(len as usize).map_anon().unwrap();
        let start = map.as_ptr() as u64;
        let pid = std::process::id() as i32;
        let found = guest_memory(pid, &[block(len), block(4096)]);
        let contains = |range: &Range<u64>| range.start <= start && start + len <= range.end;
        assert!(found.iter().any(contains), "{found:?}");
        assert_eq!(guest_memory(pid, &[block(12345 << 32)]), []);
        assert_eq!(guest_memory(pid, &[block(4096)]), []);
    }

    #[test]
    fn ranges_are_walked_once() {
        let merged = without_overlaps(vec![5..9, 0..4, 8..12, 20..21, 4..5]);
        assert_eq!(merged, [0..12, 20..21]);
    }
}
