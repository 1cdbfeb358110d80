//! Touching what a pause would otherwise wait for, while the guest still runs.

use std::fs;
use std::io::{self, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::cancel::Cancellation;
use crate::page::PAGE_SIZE;
use crate::qmp::RamBlock;

/// Blocks below this many bytes are not worth looking for: QEMU walks them in no time.
const WORTH: u64 = 1 << 20;

/// Pages read by one call: as many pieces as process_vm_readv(2) takes (IOV_MAX).
const AT_ONCE: usize = 1024;

/// Reads one byte of every page of a QEMU's guest memory. What was never used is then
/// mapped (to a page of zeros, or in memory files to memory of its own), as QEMU would
/// do by itself at the start of a background snapshot, but the guest standing still.
///
/// A help, no more: what can't be read QEMU reads itself. `cancel` ends it early.
pub(super) fn read_memory(pid: i32, blocks: &[RamBlock], cancel: &Cancellation) {
    for (start, len) in mappings(pid, blocks) {
        if let Err(error) = read_range(pid, start, len, cancel) {
            tracing::debug!("touching memory at {start:#x} ahead failed: {error}");
        }
    }
}

/// Where a process has memory that is as long as one of these blocks: QEMU maps each by
/// itself, with a gap behind it. Something else of that length is read in vain.
pub(super) fn mappings(pid: i32, blocks: &[RamBlock]) -> Vec<(usize, usize)> {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mapping = |line: &str| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) =
            (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let len = end.checked_sub(start)?;
        let is_block = |block: &RamBlock| block.total_len == len as u64 && block.total_len >= WORTH;
        (fields.next()?.starts_with("rw") && blocks.iter().any(is_block)).then_some((start, len))
    };
    String::from_utf8_lossy(&maps).lines().filter_map(mapping).collect()
}

fn read_range(pid: i32, start: usize, len: usize, cancel: &Cancellation) -> io::Result<()> {
    let mut bytes = [0; AT_ONCE];
    let mut done = 0;
    while done < len && !cancel.is_requested() {
        let pages = ((len - done) / PAGE_SIZE).min(AT_ONCE);
        let page = |n| RemoteIoVec { base: start + done + n * PAGE_SIZE, len: 1 };
        let remote: Vec<RemoteIoVec> = (0..pages).map(page).collect();
        let read = process_vm_readv(
            Pid::from_raw(pid),
            &mut [IoSliceMut::new(&mut bytes[..pages])],
            &remote,
        )?;
        if read == 0 {
            break;
        }
        done += read * PAGE_SIZE;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_process_is_found_and_read() {
        let len = 8 << 20;
        // Longer than what allocators keep: a mapping of its own, of an odd length.
        let map = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
        let pid = std::process::id() as i32;
        let cancel = Cancellation::new();
        read_range(pid, map.as_ptr() as usize, len, &cancel).unwrap();
        assert!(read_range(pid, 4096, len, &cancel).is_err());
        let block =
            RamBlock { name: "ram".into(), page_size: 4096, used_len: 1, total_len: 12345 << 12 };
        assert_eq!(mappings(pid, &[block]), []);
    }
}
