//! Another process's memory: read, and prefaulted.

use std::io::{self, IoSliceMut};
use std::ops::Range;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::huge_pages::HUGE_PAGE;
use super::procfs::Pagemap;
use crate::cancel::Cancellation;
use crate::page::PAGE_SIZE;

/// Pages touched by one call: those of a huge page, fewer than process_vm_readv(2) takes (IOV_MAX).
const PIECES: usize = HUGE_PAGE as usize / PAGE_SIZE;

/// Reads memory of a process. Waits where a page is missing that a userfaultfd serves.
///
/// # Errors
/// When the process may not be traced (ptrace(2)), or some of the memory is not mapped.
pub fn read(pid: i32, address: u64, bytes: &mut [u8]) -> io::Result<()> {
    let remote = [RemoteIoVec { base: address as usize, len: bytes.len() }];
    let len = bytes.len();
    let read = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(bytes)], &remote)?;
    if read == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Reads one byte of every page in a range of a process's memory that is not there yet. What was
/// never used is there then: as a page of zeros, or in a file in memory as memory of its own. What
/// the process has not mapped at all is passed over. `cancel` ends it early.
///
/// # Errors
/// As for [`read`], and when the process's page map can't be read.
pub fn prefault(pid: i32, range: Range<u64>, cancel: &Cancellation) -> io::Result<()> {
    let pagemap = Pagemap::open(pid)?;
    let mut start = range.start;
    while start < range.end && !cancel.is_requested() {
        let end = range.end.min((start + 1).next_multiple_of(PREFAULTED));
        let mut missing = Vec::new();
        pagemap.missing(start..end, |found| missing.push(found))?;
        for piece in missing {
            prefault_piece(pid, &pagemap, piece, cancel)?;
        }
        start = end;
    }
    Ok(())
}

/// Bytes whose page map is looked at in one go.
const PREFAULTED: u64 = 1 << 30;

/// Prefaults memory that is missing. Reading one page of it may have brought its whole huge page.
fn prefault_piece(
    pid: i32,
    pagemap: &Pagemap,
    piece: Range<u64>,
    cancel: &Cancellation,
) -> io::Result<()> {
    let mut start = piece.start;
    while start < piece.end && !cancel.is_requested() {
        let end = piece.end.min((start + 1).next_multiple_of(HUGE_PAGE));
        touch(pid, start..start + PAGE_SIZE as u64)?;
        if !pagemap.is_present(end - PAGE_SIZE as u64) {
            touch(pid, start..end)?;
        }
        start = end;
    }
    Ok(())
}

/// Reads one byte of every page.
fn touch(pid: i32, range: Range<u64>) -> io::Result<()> {
    let mut bytes = [0; PIECES];
    let mut remote = [RemoteIoVec { base: 0, len: 1 }; PIECES];
    let mut pages = range.step_by(PAGE_SIZE).peekable();
    while pages.peek().is_some() {
        let mut count = 0;
        for (piece, address) in remote.iter_mut().zip(pages.by_ref()) {
            piece.base = address as usize;
            count += 1;
        }
        let local = &mut [IoSliceMut::new(&mut bytes[..count])];
        // A short read means that the next page is not mapped.
        if process_vm_readv(Pid::from_raw(pid), local, &remote[..count])? < count {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::procfs::Pagemap;

    #[test]
    fn memory_that_was_never_used_is_mapped_by_prefaulting() {
        let len = 8 << 20;
        let map = memmap2::MmapOptions::new().len(len).map_anon().unwrap();
        let (pid, start) = (std::process::id() as i32, map.as_ptr() as u64);
        let pagemap = Pagemap::open(pid).unwrap();
        let last = start + len as u64 - PAGE_SIZE as u64;
        assert!(!pagemap.is_present(last));
        let cancel = Cancellation::new();
        prefault(pid, start..start + len as u64, &cancel).unwrap();
        assert!(pagemap.is_present(start) && pagemap.is_present(last));
    }

    #[test]
    fn memory_is_read_as_a_whole_or_not_at_all() {
        let map = memmap2::MmapOptions::new().len(PAGE_SIZE).map_anon().unwrap();
        let (pid, start) = (std::process::id() as i32, map.as_ptr() as u64);
        let mut bytes = [1; 16];
        read(pid, start, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 16]);
        assert!(read(pid, PAGE_SIZE as u64, &mut bytes).is_err());
    }
}
