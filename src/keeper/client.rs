//! The server's side: a keeper is started, given what it shall hold, and started again when it
//! dies.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::protocol::{Held, Message, Received, receive, send, socket_pair};
use super::restarts::Restarts;
use crate::host::sandbox::Sandbox;

/// The program that becomes the keeper, and what it starts when the server has died.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Successor {
    /// The program `snapback`.
    pub program: PathBuf,
    /// Its arguments as a new server, which takes over by [`Inheritance`](super::Inheritance).
    pub arguments: Vec<OsString>,
}

impl Successor {
    /// A successor that runs `program` with these arguments.
    pub fn new(program: impl Into<PathBuf>, arguments: Vec<OsString>) -> Successor {
        Successor { program: program.into(), arguments }
    }
}

/// A keeper, as its server sees it. Dropping it tells the keeper that the server ends and
/// needs no successor.
#[derive(Debug)]
pub struct Keeper {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    /// Our end of the connection; none once there is no keeper any more.
    keeper: Option<OwnedFd>,
    held: Vec<(Held, OwnedFd)>,
    /// The sandbox that the keeper is to be in.
    sandbox: Option<Sandbox>,
    ended: bool,
}

impl Keeper {
    /// Starts a keeper, without waiting for it.
    ///
    /// # Errors
    /// When a descriptor or a thread can't be had. A program that can't be started is only
    /// logged: the session goes on without a keeper.
    pub fn start(successor: Successor) -> io::Result<Keeper> {
        let (ours, theirs) = socket_pair()?;
        let watched = ours.try_clone()?;
        let keeper = Keeper::over(ours, Vec::new());
        let state = Arc::clone(&keeper.state);
        let watch = move || match spawn(&successor, theirs) {
            Ok(child) => supervise(&state, &successor, watched, Some(child)),
            Err(error) => state_of(&state).give_up(&error),
        };
        std::thread::Builder::new().name("keeper".into()).spawn(watch)?;
        Ok(keeper)
    }

    /// Goes on with the keeper that has started this process, and holds `held` already.
    pub(super) fn inherited(
        keeper: OwnedFd,
        held: Vec<(Held, OwnedFd)>,
        successor: Successor,
    ) -> io::Result<Keeper> {
        let watched = keeper.try_clone()?;
        let keeper = Keeper::over(keeper, held);
        let state = Arc::clone(&keeper.state);
        let watch = move || supervise(&state, &successor, watched, None);
        std::thread::Builder::new().name("keeper".into()).spawn(watch)?;
        Ok(keeper)
    }

    fn over(keeper: OwnedFd, held: Vec<(Held, OwnedFd)>) -> Keeper {
        let state = State { keeper: Some(keeper), held, sandbox: None, ended: false };
        Keeper { state: Arc::new(Mutex::new(state)) }
    }

    /// What gives it things to hold.
    pub fn holder(&self) -> Holder {
        Holder(Arc::clone(&self.state))
    }
}

/// Gives a keeper things to hold. Once its [`Keeper`] has been dropped it does nothing.
#[derive(Debug, Clone)]
pub struct Holder(Arc<Mutex<State>>);

impl Holder {
    /// Has the keeper hold a copy of this descriptor.
    ///
    /// # Errors
    /// When the descriptor can't be duplicated.
    pub fn hold(&self, held: Held, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        let mut state = state_of(&self.0);
        if !state.ended {
            state.tell(Message::Hold(held), Some(fd.as_fd()));
            state.held.retain(|(other, _)| *other != held);
            state.held.push((held, fd));
        }
        Ok(())
    }

    /// Has the keeper enter this sandbox, with all servers that it starts from now on.
    pub fn confine(&self, sandbox: Sandbox) {
        let mut state = state_of(&self.0);
        state.tell(Message::Confine, sandbox.ruleset());
        state.sandbox = Some(sandbox);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut state = state_of(&self.state);
        state.ended = true;
        state.tell(Message::Ended, None);
        state.held.clear();
        state.keeper = None;
    }
}

impl State {
    /// Tells the keeper something. One that has died is replaced by the thread that watches it,
    /// which tells the new one everything.
    fn tell(&self, message: Message, fd: Option<BorrowedFd<'_>>) {
        // It never waits: the queue takes more messages than there are kinds.
        if let Some(Err(error)) =
            self.keeper.as_ref().map(|keeper| send(keeper.as_fd(), message, fd))
        {
            tracing::debug!("the keeper was not told {message:?}: {error}");
        }
    }

    /// Goes on without a keeper.
    fn give_up(&mut self, why: &dyn std::fmt::Display) {
        self.keeper = None;
        if !self.ended {
            tracing::warn!("no keeper: if this program is killed, the guest stops ({why})");
        }
    }
}

fn state_of(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // What is under the lock is whole whatever became of who held it.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until the keeper has ended, and starts another unless the session is over.
fn supervise(
    state: &Mutex<State>,
    successor: &Successor,
    mut watched: OwnedFd,
    mut child: Option<Child>,
) {
    let mut restarts = Restarts::default();
    loop {
        // A keeper says nothing: all that can be received is its end.
        while !matches!(receive(&watched), Ok(Received::End)) {
            if state_of(state).ended {
                break;
            }
        }
        if let Some(child) = &mut child {
            let _ = child.wait();
        }
        if state_of(state).ended {
            return;
        }
        let Some(wait) = restarts.next(Instant::now()) else {
            return state_of(state).give_up(&"it died too often");
        };
        std::thread::sleep(wait);
        let again = socket_pair().and_then(|(ours, theirs)| {
            let waits = ours.try_clone()?;
            Ok((spawn(successor, theirs)?, ours, waits))
        });
        let mut state = state_of(state);
        match again {
            Ok((process, ours, waits)) => {
                (child, watched) = (Some(process), waits);
                state.keeper = Some(ours);
                for (held, fd) in &state.held {
                    state.tell(Message::Hold(*held), Some(fd.as_fd()));
                }
                // One that was started from inside is in it already.
                if let Some(sandbox) = &state.sandbox {
                    state.tell(Message::Confine, sandbox.ruleset());
                }
                if state.ended {
                    state.tell(Message::Ended, None);
                    state.keeper = None;
                }
            }
            Err(error) => return state.give_up(&error),
        }
    }
}

/// Starts the keeper in a session of its own, so that signals of our terminal don't reach it.
/// Its end of the connection is its standard input.
fn spawn(successor: &Successor, theirs: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(&successor.program);
    command.arg("keeper").arg("--").args(&successor.arguments).stdin(theirs);
    // SAFETY: setsid(2) is async-signal-safe and touches no memory; it is all that runs between
    // fork and exec.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn()
}
