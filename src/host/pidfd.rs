//! Processes by descriptor (pidfd_open(2)).
//!
//! A process number may belong to another process by the time it is used; a pidfd never
//! does.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use super::procfs;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A process. The descriptor is close-on-exec and becomes readable when the process ends.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens the process that has this number now.
    ///
    /// # Errors
    /// ESRCH when there is none (pidfd_open(2)).
    pub fn open(pid: i32) -> io::Result<Pidfd> {
        // SAFETY: pidfd_open(2) takes numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        new_descriptor(fd).map(Pidfd)
    }

    /// Forks this process. Returns the child; nothing in the child itself. Unlike opening the
    /// child by its number, it can't miss one that ends at once.
    ///
    /// # Errors
    /// As for fork(2).
    ///
    /// # Safety
    /// As for fork(2), and the C library does not hear of it: in a process with one thread, the
    /// child may make system calls only before it becomes another program or ends.
    pub unsafe fn fork() -> io::Result<Option<Pidfd>> {
        let mut pidfd: libc::c_int = -1;
        let flags = libc::CLONE_PIDFD | libc::SIGCHLD;
        // SAFETY: without CLONE_VM the child has a copy of all memory, stack included. The
        // kernel writes the pidfd to the third argument, in the parent (clone(2)).
        let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
        match child {
            0 => Ok(None),
            1.. => new_descriptor(pidfd.into()).map(|fd| Some(Pidfd(fd))),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Adopts a descriptor that pidfd_open(2) has made, as another process passes it on.
    pub fn from_fd(fd: OwnedFd) -> Pidfd {
        Pidfd(fd)
    }

    /// The descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Another process that holds both a pidfd of process `pid` and this file, if there is one that
    /// can be looked into.
    pub fn held_with(pid: i32, file: &Path) -> Option<i32> {
        let us = std::process::id() as i32;
        procfs::processes().filter(|other| *other != us).find(|other| {
            let descriptors = procfs::descriptors(*other).unwrap_or_default();
            let link = |fd: &i32| procfs::descriptor_link(*other, *fd).ok();
            descriptors.iter().any(|fd| link(fd).is_some_and(|link| link == file))
                && descriptors.iter().any(|fd| {
                    link(fd).is_some_and(|link| link == Path::new("anon_inode:[pidfd]"))
                        && pid_in(&procfs::path(*other, &format!("fdinfo/{fd}"))) == Some(pid)
                })
        })
    }

    /// Copies one of the process's descriptors (pidfd_getfd(2)).
    ///
    /// # Errors
    /// EPERM when we may not trace the process (ptrace(2)), EBADF when it has no such
    /// descriptor, ESRCH when it has ended.
    pub fn copy_descriptor(&self, fd: i32) -> io::Result<OwnedFd> {
        // SAFETY: pidfd_getfd(2) takes numbers only.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), fd, 0) };
        new_descriptor(copy)
    }

    /// Waits until the process has ended; false if it still runs after `timeout`. The longest
    /// wait is some 24 days (poll(2)).
    pub fn wait_end(&self, timeout: Duration) -> bool {
        wait_end(self.as_fd(), Some(timeout))
    }

    /// Waits until the process has ended. Safe to cancel.
    pub async fn ended(&self) {
        // Readable once it has (pidfd_open(2)).
        // SAFETY: the descriptor is borrowed from `self`, which outlives this future, and with it
        // what is registered here: nobody closes it, or opens another of its number, before.
        let readable = unsafe { AsyncFd::register_with_interest(self.as_fd(), Interest::READABLE) };
        match readable {
            Ok(readable) => _ = readable.readable().await,
            Err(error) => {
                tracing::warn!("the end of a process won't be noticed: {error}");
                std::future::pending().await
            }
        }
    }

    /// Sends SIGKILL (pidfd_send_signal(2)).
    ///
    /// # Errors
    /// ESRCH when the process has ended, EPERM when it is not ours to kill.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// Sends SIGTERM, as [`kill`](Pidfd::kill) sends SIGKILL.
    ///
    /// # Errors
    /// As [`kill`](Pidfd::kill).
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(libc::SIGTERM)
    }

    fn signal(&self, signal: i32) -> io::Result<()> {
        let no_info: *const libc::siginfo_t = std::ptr::null();
        // SAFETY: the call takes numbers and a pointer that may be null.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                no_info,
                0 as libc::c_uint,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until the process of this pidfd has ended, all its threads included, for so long at most;
/// says whether it has. Allocates nothing.
pub fn wait_end(pidfd: BorrowedFd<'_>, within: Option<Duration>) -> bool {
    let within = match within {
        Some(time) => PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    loop {
        match poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], within) {
            Err(Errno::EINTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

/// The process at the other end of a connected Unix socket (`SO_PEERCRED`, unix(7)): for a
/// listening socket the one that called listen(2), for a pair the one that called
/// socketpair(2). Nothing when it lives in a PID namespace that is not visible from here.
pub fn peer_pid(socket: &impl AsFd) -> Option<i32> {
    let credentials = getsockopt(socket, PeerCredentials).ok()?;
    Some(credentials.pid()).filter(|pid| *pid > 0)
}

/// The process that a pidfd's file in fdinfo tells (proc_pid_fdinfo(5)).
fn pid_in(info: &Path) -> Option<i32> {
    let info = std::fs::read_to_string(info).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}

/// Owns the descriptor that a system call returned, or takes its error from errno.
fn new_descriptor(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us: it is open, and nothing else
    // in this process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_of_another_process_is_copied() {
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = Pidfd::open(other.id() as i32).unwrap();
        assert!(pidfd.copy_descriptor(0).is_ok());
        let error = pidfd.copy_descriptor(999).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        pidfd.kill().unwrap();
        assert!(!other.wait().unwrap().success());
        assert_eq!(pidfd.kill().unwrap_err().raw_os_error(), Some(libc::ESRCH));
        let error = Pidfd::open(i32::MAX).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)), "{error}");
    }

    #[test]
    fn the_peer_of_a_pair_is_who_made_it() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(peer_pid(&one), Some(std::process::id() as i32));
    }
}
