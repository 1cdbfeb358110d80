//! What the process of any keeper does: it waits for another process's end, and becomes another
//! program.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The program that runs now, even if its file has been replaced.
const THIS_PROGRAM: &std::ffi::CStr = c"/proc/self/exe";

/// Waits until the process of this pidfd has ended, all its threads included; for so long at
/// most.
pub(super) fn has_ended(pidfd: BorrowedFd<'_>, within: Option<Duration>) -> bool {
    let within = match within {
        Some(time) => PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    loop {
        let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
        match poll(&mut fds, within) {
            Err(Errno::EINTR) => {}
            Ok(ready) => return ready > 0,
            Err(_) => return false,
        }
    }
}

/// A program to become, made ready ahead: its arguments and environment as execve(2) takes them.
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

    /// Becomes that command.
    pub fn execute(&self) -> Result<Infallible, Errno> {
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
