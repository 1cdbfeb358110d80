//! A process as a whole: its numbers, descriptors, owner and memory.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A process's file of this name in /proc.
pub fn path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// The processes that can be seen, by number.
pub fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The numbers of a process's open descriptors (proc_pid_fd(5)). Each may be closed again by
/// now.
///
/// # Errors
/// When the process has ended or is another user's.
pub fn descriptors(pid: i32) -> io::Result<Vec<i32>> {
    let entries = fs::read_dir(path(pid, "fd"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// What a process's descriptor refers to: a file's path, or a name like `socket:[INODE]`.
///
/// # Errors
/// When the descriptor has been closed or the process may not be traced (ptrace(2)).
pub fn descriptor_link(pid: i32, fd: i32) -> io::Result<PathBuf> {
    fs::read_link(path(pid, &format!("fd/{fd}")))
}

/// Whether a process has something open that it reads past the page cache (O_DIRECT, open(2)): devices
/// then write to its memory, as /proc/PID/fdinfo tells.
///
/// # Errors
/// When the process has ended or is another user's.
pub fn reads_directly(pid: i32) -> io::Result<bool> {
    let is_direct = |fd: &i32| {
        // It may have been closed meanwhile.
        let info = fs::read_to_string(path(pid, &format!("fdinfo/{fd}"))).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
    };
    Ok(descriptors(pid)?.iter().any(is_direct))
}

/// A process's arguments (proc_pid_cmdline(5)), as far as they are UTF-8; none for one that has
/// ended.
pub fn arguments(pid: i32) -> Vec<String> {
    let line = fs::read(path(pid, "cmdline")).unwrap_or_default();
    let Some(line) = line.strip_suffix(b"\0") else { return Vec::new() };
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// When a process was started, in clock ticks since boot: with its number, what tells it
/// from all others (proc_pid_stat(5), field 22). None for one that has ended, even if its
/// parent has not asked for its exit code yet.
pub fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(path(pid, "stat")).ok()?;
    // The name in parentheses may hold anything; field 3, the state, follows it.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ended = matches!(fields.first(), Some(&("Z" | "X")));
    fields.get(22 - 3).filter(|_| !ended)?.parse().ok()
}

/// A process's effective user and group, as the owner of its directory in /proc. The files in
/// it may be root's, should the process have changed its user.
pub fn owner(pid: i32) -> Option<(u32, u32)> {
    fs::metadata(path(pid, "")).ok().map(|meta| (meta.uid(), meta.gid()))
}

/// Bytes of memory that a process uses, in RAM, in huge pages and swapped out
/// (proc_pid_status(5)); 0 where that can't be read.
pub fn memory_in_use(pid: i32) -> u64 {
    let status = fs::read_to_string(path(pid, "status")).unwrap_or_default();
    let fields = ["VmRSS", "VmSwap", "HugetlbPages"].into_iter();
    fields.filter_map(|name| super::system::bytes_of(&status, name)).sum()
}

/// Bytes of memory that a process has of its own, in RAM, in huge pages and swapped out: what is no
/// part of a file, though others may map the same (proc_pid_status(5)); 0 where that can't be read.
pub fn own_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(path(pid, "status")).unwrap_or_default();
    let fields = ["RssAnon", "RssShmem", "VmSwap", "HugetlbPages"].into_iter();
    fields.filter_map(|name| super::system::bytes_of(&status, name)).sum()
}

/// A process's resident memory in bytes (proc_pid_statm(5)). Memory on hugetlbfs is not
/// counted.
///
/// # Errors
/// When the process has ended or may not be looked into.
pub fn resident_memory(pid: i32) -> io::Result<u64> {
    let statm = fs::read_to_string(path(pid, "statm"))?;
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    let page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
    Ok(pages.ok_or(io::ErrorKind::InvalidData)? * page_size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_past_the_page_cache_is_told() {
        use std::os::unix::fs::OpenOptionsExt;
        let us = std::process::id() as i32;
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut options = fs::File::options();
        // Some file systems know no such thing.
        if let Ok(_direct) = options.read(true).custom_flags(libc::O_DIRECT).open(file.path()) {
            assert!(reads_directly(us).unwrap());
        }
    }

    #[test]
    fn this_process_is_seen() {
        let us = std::process::id() as i32;
        assert!(processes().any(|pid| pid == us));
        assert!(descriptors(us).unwrap().contains(&0));
        assert!(reads_directly(i32::MAX).is_err());
        assert!(started(us).is_some_and(|ticks| ticks > 0));
        assert_eq!((started(us), started(i32::MAX)), (started(us), None));
        let ids = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        assert_eq!((owner(us), owner(i32::MAX)), (Some(ids), None));
        assert_eq!(arguments(us), std::env::args().collect::<Vec<_>>());
        assert!(memory_in_use(us) > 1 << 20 && memory_in_use(i32::MAX) == 0);
        assert!((1..=memory_in_use(us)).contains(&own_memory(us)) && own_memory(i32::MAX) == 0);
        assert!(resident_memory(us).unwrap() > 1 << 20);
    }
}
