//! Taking write protection off a guest's memory that QEMU has left there.
//!
//! QEMU before 8.1 leaves it there when the stream of a background snapshot breaks, as it
//! does when the program that reads it is killed: the guest hangs at its next write, and
//! QEMU refuses the next snapshot. The userfaultfd by which it protected memory stays
//! open; unregistering memory from it lifts the protection and wakes who waits
//! (UFFDIO_UNREGISTER(2const)).

use std::future::Future;
use std::io;
use std::time::Duration;

use crate::host::procfs::Mapping;
use crate::host::uffd::Uffd;

/// Takes write protection off all memory of a process that has some left. How many
/// mappings had it. No snapshot may be under way.
///
/// # Errors
/// When the process can't be looked at or its userfaultfd can't be had: that takes root,
/// or the same user and the right to trace it (ptrace(2)).
pub(super) fn release_memory(pid: i32) -> io::Result<usize> {
    let protected = protected(pid)?;
    match unregister(pid, &protected) {
        // QEMU from 8.1 on may have closed its userfaultfd since they were found.
        Err(error) => match self::protected(pid)?.is_empty() {
            true => Ok(protected.len()),
            false => Err(error),
        },
        Ok(()) => Ok(protected.len()),
    }
}

/// Lets all memory of a process be written to that is write-protected, and wakes who waits. A
/// snapshot that is under way goes on, though what it sends then is not what was there before.
///
/// # Errors
/// As for [`release_memory`].
pub(super) fn unprotect_memory(pid: i32) -> io::Result<()> {
    each(pid, &protected(pid)?, |uffd, mapping| {
        uffd.unprotect(mapping.start, mapping.size()).map_err(io::Error::other)
    })
}

/// The mappings that QEMU has registered with userfaultfd for writes to protected pages. Where it has
/// no userfaultfd, they are somebody else's, such as a tracker's for resets, who looks after them.
fn protected(pid: i32) -> io::Result<Vec<Mapping>> {
    let mut protected = Mapping::all_of_in_detail(pid)?;
    protected.retain(|mapping| mapping.has_flag(*b"uw"));
    if !protected.is_empty() && Uffd::number_of(pid)? == 0 {
        protected.clear();
    }
    Ok(protected)
}

fn unregister(pid: i32, protected: &[Mapping]) -> io::Result<()> {
    each(pid, protected, |uffd, mapping| uffd.unregister(mapping.start, mapping.size()))
}

/// Does something to each mapping by that userfaultfd of the process with which it is registered.
fn each(
    pid: i32,
    mappings: &[Mapping],
    work: impl Fn(&Uffd, &Mapping) -> io::Result<()>,
) -> io::Result<()> {
    if mappings.is_empty() {
        return Ok(());
    }
    let uffds = Uffd::all_of(pid)?;
    for mapping in mappings {
        // One of them has it registered; the others say that they have not.
        let mut result = Err(io::Error::other("no userfaultfd is left that protects memory"));
        for uffd in &uffds {
            result = result.or_else(|_| work(uffd, mapping));
        }
        result?;
    }
    Ok(())
}

/// How often write protection is taken off while QEMU is waited for.
const EVERY: Duration = Duration::from_millis(100);

/// Does `work`, which talks to the QEMU in process `pid`, whose snapshot was broken off. A guest
/// that waits for a write-protected page may block all of QEMU, so write protection is taken off
/// until the work is done, and once more then: a snapshot that is still being set up may yet turn
/// it on.
///
/// # Errors
/// As for [`release_memory`].
pub(super) async fn while_releasing<T>(
    pid: Option<i32>,
    work: impl Future<Output = T>,
) -> io::Result<T> {
    tokio::pin!(work);
    let release = || pid.map_or(Ok(0), release_memory);
    loop {
        tokio::select! {
            done = &mut work => {
                release()?;
                return Ok(done);
            }
            () = tokio::time::sleep(EVERY) => {
                release()?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_protected_memory_is_left_alone() {
        assert_eq!(release_memory(std::process::id() as i32).unwrap(), 0);
    }
}
