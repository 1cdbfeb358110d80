//! The keeper of a save: it sleeps until the save has ended, and cleans up behind one that was
//! killed.
//!
//! It holds the end of the migration stream from which the save read. QEMU before 8.1 leaves a
//! guest's memory write-protected when that breaks, and the guest hangs; so the keeper reads on,
//! and throws away what comes, until QEMU has sent everything.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::read;

use super::process::{Program, begin};
use super::protocol::{Held, Message, Received, receive};
use crate::host::pidfd::wait_end;

/// Bytes that are read at once.
const PIECE_BYTES: usize = 256 << 10;

/// Waits for the end of a save. Standard input is the connection with it; `arguments` are those
/// of the program that cleans up.
///
/// # Errors
/// When the process was not started as a keeper, or cleaning up can't be started.
pub fn clean_up(arguments: Vec<OsString>) -> io::Result<()> {
    let save = begin()?;
    let cleaner = Program::new(arguments)?;
    let mut buffer = vec![0; PIECE_BYTES];
    let (mut process, mut stream) = (None, None);
    loop {
        match receive(&save) {
            Ok(Received::Message(Message::Ended, _)) => return Ok(()),
            Ok(Received::Message(Message::Hold(Held::Server), fd)) => process = fd,
            Ok(Received::Message(Message::Hold(Held::Stream), fd)) => stream = fd,
            Ok(Received::Message(..) | Received::Noise) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Received::End) | Err(_) => break,
        }
    }
    // Its threads may still be at work when its descriptors are closed.
    if process.is_none_or(|process: OwnedFd| !wait_end(process.as_fd(), None)) {
        return Ok(());
    }
    // SAFETY: this process has a single thread, and nothing is to be prepared.
    let child = unsafe { cleaner.start(|| Ok(())) }?;
    // At the same time: the guest may have been stopped, and waits for the cleaner; or it waits
    // for QEMU, and QEMU for us.
    if let Some(stream) = stream {
        drain(&stream, child.as_fd(), &mut buffer);
    }
    // It is the only child.
    while waitpid(None, None) == Err(Errno::EINTR) {}
    Ok(())
}

/// Reads until the stream ends, or until the cleaner has: a stream that QEMU was given and never
/// used does not end.
fn drain(stream: &OwnedFd, cleaner: BorrowedFd<'_>, buffer: &mut [u8]) {
    loop {
        let mut fds = [
            PollFd::new(stream.as_fd(), PollFlags::POLLIN),
            PollFd::new(cleaner, PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(_) => return,
            Ok(_) if fds[1].any() == Some(true) => return,
            Ok(_) => {}
        }
        match read(stream, buffer) {
            Ok(0) => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
