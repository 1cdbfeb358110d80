//! What the process of any keeper begins with, and what it starts: this program again, made ready
//! ahead.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;

use nix::errno::Errno;

use crate::host::packets;
use crate::host::pidfd::Pidfd;

/// The program that runs now, even if its file has been replaced.
const THIS_PROGRAM: &std::ffi::CStr = c"/proc/self/exe";

/// Takes the connection with whoever has started this process, and leaves that one's session, so
/// that signals of its terminal don't come here. One that came before has ended this process, and
/// another is started.
///
/// # Errors
/// When this process was not started as a keeper.
pub(super) fn begin() -> io::Result<OwnedFd> {
    let connection = packets::take_stdin()?;
    nix::unistd::setsid()?;
    Ok(connection)
}

/// A program to start, made ready ahead: its arguments and environment as execve(2) takes them.
pub(super) struct Program {
    arguments: CStrings,
    environment: CStrings,
}

impl Program {
    /// This program with other arguments, and the environment as it is.
    pub fn new(arguments: Vec<OsString>) -> io::Result<Program> {
        let arguments = [OsString::from("snapback")].into_iter().chain(arguments);
        let environment = std::env::vars_os().map(|(mut variable, value)| {
            variable.push("=");
            variable.push(value);
            variable
        });
        Ok(Program {
            arguments: CStrings::new(arguments)?,
            environment: CStrings::new(environment)?,
        })
    }

    /// Starts it in a child that has first done what `prepare` does.
    ///
    /// # Errors
    /// When the child can't be had. One that can't become the program ends with the error as its
    /// exit code.
    ///
    /// # Safety
    /// This process must have a single thread, and `prepare` make system calls only.
    pub unsafe fn start(&self, prepare: impl FnOnce() -> Result<(), Errno>) -> io::Result<Pidfd> {
        // SAFETY: by the caller's promise; beside `prepare` the child makes one system call, by
        // which it becomes another program or ends.
        match unsafe { Pidfd::fork() }? {
            Some(child) => Ok(child),
            None => {
                let Err(errno) = prepare().and_then(|()| self.execute());
                // SAFETY: _exit(2) ends the process and runs nothing of its parent's.
                unsafe { libc::_exit(errno as i32) }
            }
        }
    }

    /// Becomes that command.
    fn execute(&self) -> Result<Infallible, Errno> {
        let (arguments, environment) = (&self.arguments.pointers, &self.environment.pointers);
        // SAFETY: all strings end with a NUL and both lists with a null pointer; they live as
        // long as `self`.
        unsafe {
            libc::execve(THIS_PROGRAM.as_ptr(), arguments.as_ptr(), environment.as_ptr());
        }
        Err(Errno::last())
    }
}

/// Strings as C takes a list of them.
struct CStrings {
    /// One for each string, and a null pointer.
    pointers: Vec<*const libc::c_char>,
    /// What they point to.
    _strings: Vec<CString>,
}

impl CStrings {
    fn new(strings: impl Iterator<Item = OsString>) -> io::Result<CStrings> {
        let strings: Result<Vec<CString>, _> =
            strings.map(|string| CString::new(string.into_vec())).collect();
        let strings = strings.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let pointers = strings.iter().map(|string| string.as_ptr());
        let pointers = pointers.chain([std::ptr::null()]).collect();
        Ok(CStrings { pointers, _strings: strings })
    }
}
