//! Which process is a domain's QEMU: libvirt doesn't tell.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::stat::fstat;
use serde_json::json;

use super::error::LibvirtError;
use super::link::Link;
use crate::host::procfs::{arguments, descriptor_link, descriptors, processes};

/// The name under which QEMU is given a descriptor to be recognised by.
const MARK: &str = "snapback-mark";

/// The process of the domain's QEMU. Two libvirts of one host may have domains of the same UUID,
/// so QEMU is given a descriptor, and the process is taken that holds it. Where nothing can be
/// seen of it, it has to be the only one that was started for this UUID.
pub(super) fn find(link: &Link) -> Result<i32, LibvirtError> {
    let started: Vec<i32> = processes().filter(|pid| is_of(*pid, link.uuid())).collect();
    let thread = |error: std::io::Error| LibvirtError::Thread(error.to_string());
    let (_ours, mark) = UnixStream::pair().map_err(thread)?;
    let inode = fstat(&mark).map_err(|errno| thread(errno.into()))?.st_ino;
    let tell = |name: &str, fd| {
        let command = json!({ "execute": name, "arguments": { "fdname": MARK } });
        link.monitor_command(name, &command.to_string(), fd)
    };
    tell("getfd", Some(mark.as_fd()))?;
    let socket = PathBuf::from(format!("socket:[{inode}]"));
    let found = started.iter().copied().find(|pid| holds(*pid, &socket));
    tell("closefd", None)?;
    let only = match started[..] {
        [pid] if descriptors(pid).is_err() => Some(pid),
        _ => None,
    };
    found.or(only).ok_or_else(|| LibvirtError::NoProcess { domain: link.name().to_owned() })
}

/// Whether a process was started with `-uuid UUID`.
fn is_of(pid: i32, uuid: &str) -> bool {
    let arguments = arguments(pid);
    arguments.windows(2).any(|pair| pair[0] == "-uuid" && pair[1].eq_ignore_ascii_case(uuid))
}

fn holds(pid: i32, socket: &Path) -> bool {
    let open = descriptors(pid).unwrap_or_default();
    open.into_iter().any(|fd| descriptor_link(pid, fd).is_ok_and(|link| link == socket))
}
