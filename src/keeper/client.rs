//! The server's side: a keeper is started, given what it shall hold, and started again when it
//! dies.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::protocol::{Held, Message, Received, receive, send};
use super::restarts::Restarts;
use crate::host::packets;
use crate::host::pidfd::Pidfd;
use crate::host::sandbox::Sandbox;

/// The program that becomes the keeper, and what it starts when the server has died.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Successor {
    /// The program `snapback`.
    pub program: PathBuf,
    /// Its arguments as a new server, which takes over by [`Inheritance`](super::Inheritance).
    pub arguments: Vec<OsString>,
    /// The file to which the keeper, and whatever it starts, write what they have to say; else it
    /// goes to our own output.
    log: Option<PathBuf>,
    /// Whether it cleans up behind a save.
    cleans_up: bool,
}

impl Successor {
    /// A successor that runs `program` with these arguments.
    pub fn new(program: impl Into<PathBuf>, arguments: Vec<OsString>) -> Successor {
        Successor { program: program.into(), arguments, log: None, cleans_up: false }
    }

    /// The same with its output in this file, to which it appends. A keeper outlives its server:
    /// whoever reads our output would wait for its end as well.
    pub fn logging_to(self, log: PathBuf) -> Successor {
        Successor { log: Some(log), ..self }
    }

    /// What cleans up behind a save that was killed: `program` with arguments by which it recovers
    /// that save.
    pub fn cleaning_up(program: impl Into<PathBuf>, arguments: Vec<OsString>) -> Successor {
        Successor { cleans_up: true, ..Successor::new(program, arguments) }
    }
}

/// A keeper, as its server sees it. Dropping it tells the keeper that the server ends and
/// needs no successor.
#[derive(Debug)]
pub struct Keeper {
    state: Arc<Mutex<State>>,
    /// Closed once the first keeper has been started, or can't be.
    starting: Option<Receiver<Infallible>>,
}

#[derive(Debug)]
struct State {
    /// Our end of the connection; none once there is no keeper any more.
    keeper: Option<OwnedFd>,
    held: Vec<(Held, OwnedFd)>,
    /// The sandbox that the keeper is to be in.
    sandbox: Option<Sandbox>,
    ended: bool,
    /// The latest keeper's process, once it has been started.
    process: Option<u32>,
    on_start: Option<OnStart>,
}

/// What is told the process of each keeper.
struct OnStart(Box<dyn Fn(u32) + Send>);

impl std::fmt::Debug for OnStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnStart")
    }
}

impl Keeper {
    /// Starts a keeper of this process, without waiting for it.
    ///
    /// # Errors
    /// When a descriptor or a thread can't be had. A program that can't be started is only
    /// logged: the session goes on without a keeper.
    pub fn start(successor: Successor) -> io::Result<Keeper> {
        let this = Pidfd::open(std::process::id() as i32)?;
        let (ours, theirs) = packets::pair()?;
        let watched = ours.try_clone()?;
        let (started, starting) = crossbeam_channel::bounded(0);
        let mut keeper = Keeper::over(ours, Vec::new());
        keeper.holder().hold(Held::Server, this.as_fd())?;
        keeper.starting = Some(starting);
        let state = Arc::clone(&keeper.state);
        let watch = move || {
            let spawned = spawn(&successor, theirs);
            drop(started);
            match spawned {
                Ok(child) => {
                    state_of(&state).has_started(child.id());
                    supervise(&state, &successor, watched, Some(child));
                }
                Err(error) => state_of(&state).give_up(&error),
            }
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
        state_of(&keeper.state).has_started(std::os::unix::process::parent_id());
        let state = Arc::clone(&keeper.state);
        let watch = move || supervise(&state, &successor, watched, None);
        std::thread::Builder::new().name("keeper".into()).spawn(watch)?;
        Ok(keeper)
    }

    fn over(keeper: OwnedFd, held: Vec<(Held, OwnedFd)>) -> Keeper {
        let state = State {
            keeper: Some(keeper),
            held,
            sandbox: None,
            ended: false,
            process: None,
            on_start: None,
        };
        Keeper { state: Arc::new(Mutex::new(state)), starting: None }
    }

    /// Waits until it has been started, or can't be: whoever relies on it from now on has one.
    pub fn wait_started(&mut self) {
        if let Some(starting) = self.starting.take() {
            // Nothing is ever sent: it ends when the other end is closed.
            let _ = starting.recv();
        }
    }

    /// Has `on_start` told the process of this keeper, and of each that follows it.
    pub fn on_start(&self, on_start: impl Fn(u32) + Send + 'static) {
        let mut state = state_of(&self.state);
        state.process.iter().for_each(|process| on_start(*process));
        state.on_start = Some(OnStart(Box::new(on_start)));
    }

    /// What gives it things to hold.
    pub fn holder(&self) -> Holder {
        Holder(Arc::clone(&self.state))
    }
}

/// What has been started, or nothing: whoever wants a keeper does without one that can't be had.
pub fn if_started<T>(started: io::Result<T>) -> Option<T> {
    started.inspect_err(|error| tracing::warn!("no keeper can be started: {error}")).ok()
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

    /// A keeper has been started.
    fn has_started(&mut self, process: u32) {
        self.process = Some(process);
        self.on_start.iter().for_each(|on_start| on_start.0(process));
    }

    /// Goes on without a keeper.
    fn give_up(&mut self, why: &dyn std::fmt::Display) {
        self.keeper = None;
        if !self.ended {
            tracing::warn!("no keeper: nobody goes on if this program is killed ({why})");
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
        let again = packets::pair().and_then(|(ours, theirs)| {
            let waits = ours.try_clone()?;
            Ok((spawn(successor, theirs)?, ours, waits))
        });
        let mut state = state_of(state);
        match again {
            Ok((process, ours, waits)) => {
                state.has_started(process.id());
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

/// Starts the keeper. Its end of the connection is its standard input.
///
/// It enters a session of its own by itself. Where nothing is to be done between fork and exec,
/// the child borrows our memory instead of copying our page tables (posix_spawn(3)), which would
/// hold up all our threads while a guest is brought back.
fn spawn(successor: &Successor, theirs: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(&successor.program);
    command.arg("keeper");
    if successor.cleans_up {
        command.arg("--clean-up");
    }
    command.arg("--").args(&successor.arguments).stdin(theirs);
    if let Some(log) = &successor.log {
        let mut options = File::options();
        let log = options.append(true).create(true).mode(0o600).open(log)?;
        command.stdout(log.try_clone()?).stderr(log);
    }
    command.spawn()
}
