//! What is left of a process's rights once it serves.
//!
//! Two fences of the kernel, neither of which can be taken down again, and both of which hold
//! for every thread, for every process started from inside, and for every program that such a
//! process becomes:
//!
//! - a seccomp filter ([`calls`], seccomp(2)): system calls that serving doesn't take are
//!   refused (EPERM);
//! - Landlock ([`files`], landlock(7), Linux 5.13): no file can be opened but those named, and no
//!   process outside be traced, looked into or read.
//!
//! What needs more is done before, or by a process outside.

mod calls;
mod files;
mod outside;
mod threads;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub use calls::is_inside;
pub use files::Access;
pub use outside::{open, open_here, set_opener};

/// A sandbox that has been prepared. Preparing it changes nothing.
#[derive(Debug)]
pub struct Sandbox {
    /// None where the kernel has no Landlock.
    ruleset: Option<OwnedFd>,
}

impl Sandbox {
    /// A sandbox in which these files can be opened.
    ///
    /// # Errors
    /// When something named can't be used. A kernel without Landlock is no error: files are then
    /// not fenced off ([`Sandbox::fences_files`]).
    pub fn new(access: &Access<'_>) -> io::Result<Sandbox> {
        Ok(Sandbox { ruleset: files::ruleset(access)? })
    }

    /// The sandbox of another process, which has passed on its [`Sandbox::ruleset`].
    pub fn of(ruleset: Option<OwnedFd>) -> Sandbox {
        Sandbox { ruleset }
    }

    /// What another process needs to enter the same sandbox; none where only the seccomp filter
    /// is to be had.
    pub fn ruleset(&self) -> Option<BorrowedFd<'_>> {
        self.ruleset.as_ref().map(AsFd::as_fd)
    }

    /// Whether it says which files can be opened.
    pub fn fences_files(&self) -> bool {
        self.ruleset.is_some()
    }

    /// Has all threads of this process enter it. Threads in a system call are interrupted for
    /// that by a signal, and go on (SA_RESTART, signal(7)).
    ///
    /// # Errors
    /// When the kernel refuses, or a thread doesn't answer within two seconds. What could be
    /// had holds all the same.
    pub fn enter(&self) -> io::Result<()> {
        let fenced = self.ruleset().map_or(Ok(()), threads::restrict_all);
        calls::restrict_all().and(fenced)
    }

    /// Enters it as a process with a single thread. One that was started from inside is there
    /// already, which is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter_alone(&self) -> io::Result<()> {
        let entered = match self.ruleset() {
            Some(ruleset) => threads::restrict(ruleset),
            None => Ok(()),
        };
        match entered.and_then(|()| calls::restrict_all()) {
            // The filter refuses what entering takes.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
            entered => entered,
        }
    }
}
