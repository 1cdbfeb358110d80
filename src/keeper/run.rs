//! The keeper's process: it sleeps until its server has ended, and starts another unless the
//! server said that none is needed.
//!
//! It has one thread. What a restart takes is made ready at the start, so that nothing is
//! allocated when memory is short: that may be what the server died of.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::inheritance::{CONNECTION, number};
use super::ledger::{Ledger, monotonic_ns};
use super::process::{Program, begin};
use super::protocol::{Held, Message, Received, receive};
use super::restarts::Restarts;
use crate::host::packets;
use crate::host::pidfd::{Pidfd, wait_end};
use crate::host::sandbox::Sandbox;

/// Runs a keeper until its server needs none. Standard input is the connection with the server,
/// `arguments` are those of a new server.
///
/// # Errors
/// When the process was not started as a keeper.
pub fn run(arguments: Vec<OsString>) -> io::Result<()> {
    let server = begin()?;
    let mut keeper = Keeper {
        server: Some(server),
        held: [const { None }; Held::ALL.len()],
        ledger: None,
        command: Program::new(arguments)?,
        restarts: Restarts::default(),
    };
    keeper.keep();
    Ok(())
}

struct Keeper {
    /// The connection with the server; none once the server has closed it.
    server: Option<OwnedFd>,
    /// What it holds, each at its [`number`].
    held: [Option<OwnedFd>; Held::ALL.len()],
    ledger: Option<Ledger>,
    command: Program,
    restarts: Restarts,
}

impl Keeper {
    /// Keeps what it is given, and replaces servers, until one needs no successor.
    fn keep(&mut self) {
        loop {
            let Some(server) = &self.server else {
                // Its threads may still be at work when its descriptors are closed.
                if self.get(Held::Server).is_none_or(|server| !wait_end(server, None)) {
                    return self.end_qemu();
                }
                match self.replace() {
                    true => continue,
                    false => return,
                }
            };
            match receive(server) {
                Ok(Received::Message(Message::Ended, _)) => return,
                Ok(Received::Message(Message::Confine, ruleset)) => {
                    if let Err(error) = Sandbox::of(ruleset).enter_alone() {
                        eprintln!("snapback: the keeper can't enter its sandbox: {error}");
                    }
                }
                Ok(Received::Message(Message::Hold(held), Some(fd))) => {
                    if let Err(error) = self.hold(held, fd) {
                        eprintln!("snapback: the keeper can't hold {held:?}: {error}");
                    }
                }
                Ok(Received::Message(..) | Received::Noise) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Received::End) | Err(_) => self.server = None,
            }
        }
    }

    fn get(&self, held: Held) -> Option<BorrowedFd<'_>> {
        self.held[held as usize].as_ref().map(AsFd::as_fd)
    }

    /// Holds a descriptor, at its agreed number.
    fn hold(&mut self, held: Held, fd: OwnedFd) -> io::Result<()> {
        if held == Held::Ledger {
            self.ledger = Some(Ledger::open(fd.try_clone()?)?);
        }
        // What was there before is closed first: its number is taken again.
        self.held[held as usize] = None;
        // SAFETY: dup3(2) takes numbers. The new one is nobody's: numbers from the first agreed
        // one on are used here only, and what was held at this one has just been closed.
        let placed = unsafe { libc::dup3(fd.as_raw_fd(), number(held), libc::O_CLOEXEC) };
        if placed < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor has just been made, for us alone.
        self.held[held as usize] = Some(unsafe { OwnedFd::from_raw_fd(placed) });
        Ok(())
    }

    /// Replaces a server that has died. False where none is needed or can be had.
    fn replace(&mut self) -> bool {
        // The one that has died is our child unless it started us.
        while waitpid(None, Some(WaitPidFlag::WNOHANG))
            .is_ok_and(|ended| ended != WaitStatus::StillAlive)
        {}
        let Some(ledger) = self.ledger.as_ref().filter(|ledger| ledger.is_running()) else {
            // Nobody has seen this guest run: it is of no use without the server's plan.
            self.end_qemu();
            return false;
        };
        let Some(wait) = self.restarts.next(Instant::now()) else {
            eprintln!(
                "snapback: the page server was killed too often in a minute, and its guest was \
                 stopped: its memory is incomplete"
            );
            self.end_qemu();
            return false;
        };
        if self.get(Held::Qemu).is_none_or(|qemu| wait_end(qemu, Some(wait))) {
            return false;
        }
        ledger.count_restart(monotonic_ns());
        match self.start_server() {
            Ok((server, connection)) => {
                self.server = Some(connection);
                self.hold(Held::Server, server.into_fd()).is_ok()
            }
            Err(error) => {
                eprintln!("snapback: no new page server can be started: {error}");
                self.end_qemu();
                false
            }
        }
    }

    /// Starts a new server, which inherits what is held.
    fn start_server(&self) -> io::Result<(Pidfd, OwnedFd)> {
        let (ours, theirs) = packets::pair()?;
        // SAFETY: this process has a single thread, and what is prepared takes system calls only.
        let child = unsafe { self.command.start(|| self.hand_over(&theirs)) }?;
        Ok((child, ours))
    }

    /// In the child: has what is held inherited.
    fn hand_over(&self, connection: &OwnedFd) -> Result<(), Errno> {
        let kept_open = nix::fcntl::FdFlag::empty();
        for fd in self.held.iter().flatten() {
            fcntl(fd, FcntlArg::F_SETFD(kept_open))?;
        }
        // SAFETY: dup2(2) takes numbers; the new one is used for this alone.
        Errno::result(unsafe { libc::dup2(connection.as_raw_fd(), CONNECTION) }).map(drop)
    }

    /// Ends QEMU, if we know it: a guest whose memory nobody brings would wait for ever.
    fn end_qemu(&self) {
        if let Some(qemu) = self.get(Held::Qemu).and_then(|fd| fd.try_clone_to_owned().ok()) {
            let _ = Pidfd::from_fd(qemu).kill();
        }
    }
}
