//! Taking write protection off a guest's memory that QEMU has left there.
//!
//! QEMU before 8.1 does so when the stream of a background snapshot breaks, as it does
//! when the program that reads it is killed: the guest hangs at its next write, and
//! QEMU refuses the next snapshot. The userfaultfd by which it protected memory stays
//! open; unregistering memory from it lifts the protection and wakes who waits
//! (UFFDIO_UNREGISTER(2const)).

use std::fs;
use std::io;

use crate::host::uffd::Uffd;

/// Takes write protection off all memory of a process that has some left. How many
/// mappings had it. No snapshot may be under way.
///
/// # Errors
/// When the process can't be looked at or its userfaultfd can't be had: that takes root,
/// or the same user and the right to trace it (ptrace(2)).
pub(super) fn release_memory(pid: i32) -> io::Result<usize> {
    let protected = protected(&fs::read_to_string(format!("/proc/{pid}/smaps"))?);
    if protected.is_empty() {
        return Ok(0);
    }
    let uffds = Uffd::all_of(pid)?;
    for (start, end) in &protected {
        // One of them has it registered; the others say that they have not.
        let mut result = Err(io::Error::other("no userfaultfd is left that protects memory"));
        for uffd in &uffds {
            result = result.or_else(|_| uffd.unregister(*start, end - start));
        }
        result?;
    }
    Ok(protected.len())
}

/// The mappings in the text of /proc/PID/smaps whose VmFlags say `uw`: registered with
/// userfaultfd for writes to protected pages (proc_pid_smaps(5)).
fn protected(smaps: &str) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let is_protected = flags.split_whitespace().any(|flag| flag == "uw");
            found.extend(current.filter(|_| is_protected));
        } else if let Some((start, end)) =
            line.split_once(' ').and_then(|(range, _)| range.split_once('-'))
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            current = Some((start, end));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protected_mappings_are_found_in_smaps() {
        let smaps = "\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \nSize:  524288 kB\nVmFlags: rd wr uw \n\
7f0030000000-7f0030200000 rw-p 00000000 00:00 0 \nVmFlags: rd wr um\n";
        assert_eq!(protected(smaps), [(0x7f00_0000_0000, 0x7f00_2000_0000)]);
        assert_eq!(release_memory(std::process::id() as i32).unwrap(), 0);
    }
}
