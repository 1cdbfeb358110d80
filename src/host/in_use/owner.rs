//! The process behind a descriptor.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::procfs::{self, descriptor_link, descriptors, processes};

/// A process that uses something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its number.
    pub pid: i32,
    /// Its name (`comm`).
    pub name: String,
}

impl Owner {
    /// This process, with its name.
    pub fn of(pid: i32) -> Owner {
        Owner { pid, name: name(pid) }
    }
}

/// The numbers of a process's descriptors; none when it may not be looked into.
pub(super) fn seen_descriptors(pid: i32) -> impl Iterator<Item = i32> {
    descriptors(pid).unwrap_or_default().into_iter()
}

/// The process that holds the socket of this inode, where it can be seen.
pub(super) fn of_socket(inode: u64) -> Option<i32> {
    let link = PathBuf::from(format!("socket:[{inode}]"));
    processes().find(|pid| seen_descriptors(*pid).any(|fd| refers_to(*pid, fd, &link)))
}

/// Whether a process's descriptor refers to this file or `socket:[INODE]`.
pub(super) fn refers_to(pid: i32, fd: i32, link: &Path) -> bool {
    descriptor_link(pid, fd).is_ok_and(|to| to == link)
}

/// A process's name (`comm` in proc(5)); empty for one that has ended.
pub(super) fn name(pid: i32) -> String {
    let name = fs::read_to_string(procfs::path(pid, "comm")).unwrap_or_default();
    name.trim_end().to_owned()
}
