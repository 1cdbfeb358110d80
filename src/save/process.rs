//! What `/proc` tells of QEMU's process.

use std::fs;
use std::os::unix::fs::MetadataExt;

/// The effective user and group of a process: the owner of its directory in /proc. The
/// files in there may belong to root, for a process that has changed its user (proc(5)).
pub(super) fn owner(pid: i32) -> Option<(u32, u32)> {
    fs::metadata(format!("/proc/{pid}")).ok().map(|meta| (meta.uid(), meta.gid()))
}

/// When a process was started, in clock ticks since boot (proc_pid_stat(5), field 22).
/// Together with its id this tells it from every other process. None for a process that
/// has ended, even if its parent has not asked for its exit code yet.
pub(super) fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; field 3, the state, follows it.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ended = matches!(fields.first(), Some(&("Z" | "X")));
    fields.get(22 - 3).filter(|_| !ended)?.parse().ok()
}

/// Bytes of memory that a process uses: in RAM, in huge pages and swapped out
/// (proc_pid_status(5)). 0 where that can't be read.
pub(super) fn memory_in_use(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let counts = ["VmRSS", "VmSwap", "HugetlbPages"].contains(&name);
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok().filter(|_| counts)
    };
    status.lines().filter_map(kib).sum::<u64>() << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let us = std::process::id() as i32;
        assert!(started(us).is_some_and(|ticks| ticks > 0));
        assert_eq!((started(us), started(i32::MAX)), (started(us), None));
    }
}
