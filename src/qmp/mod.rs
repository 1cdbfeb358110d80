//! One QEMU's control socket: commands, answers and events.
//!
//! The protocol is the QEMU Machine Protocol, QMP (QEMU's `docs/interop/qmp-spec`). A task of
//! its own always reads the socket, so that events are never stuck behind an unawaited answer,
//! and an answer that arrives after its time limit does no harm.

mod block;
mod commands;
mod devices;
mod error;
mod event;
mod message;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;

pub use block::{BlockEdge, BlockNode};
pub use commands::{BlockDevice, RamBlock};
pub use devices::{Chardev, CpuSlot, DeviceProperty, Network, QomChild};
pub use error::QmpError;
pub use event::{EVENT_QUEUE, Event, Events};

use crate::host::pidfd::peer_pid;
use crate::machine::QemuVersion;
use message::{Messages, ReadError};

/// How long a command may take unless [`Qmp::with_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one QEMU. Clones share the connection, which closes when the
/// last of them is dropped.
#[derive(Debug, Clone)]
pub struct Qmp {
    connection: Arc<Connection>,
    timeout: Duration,
}

/// What the clones of a [`Qmp`] share.
#[derive(Debug)]
struct Connection {
    version: QemuVersion,
    peer_pid: Option<i32>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    state: Arc<State>,
    next_id: AtomicU64,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    socket: OwnedFd,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Each task owns its half of the socket: it closes with them.
        self.reader.abort();
        self.writer.abort();
    }
}

/// A message on its way to QEMU, and the descriptor that goes with it.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// Why a connection ended, once it has.
#[derive(Debug, Clone, Default)]
struct Ending(Arc<OnceLock<String>>);

impl Ending {
    fn gone(&self) -> QmpError {
        let reason = self.0.get().map_or("it was closed by us", String::as_str);
        QmpError::Gone { reason: reason.to_owned() }
    }
}

/// What the reader task shares with the callers.
#[derive(Debug)]
struct State {
    ending: Ending,
    live: Mutex<Live>,
}

#[derive(Debug)]
struct Live {
    /// The callers that wait, by the id of their command.
    waiting: HashMap<u64, oneshot::Sender<Value>>,
    /// `None` once the connection has ended, so that receivers see the end.
    events: Option<broadcast::Sender<Event>>,
}

impl State {
    fn live(&self) -> MutexGuard<'_, Live> {
        // Nothing under this lock can leave it half changed.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers a message to its receiver.
    fn dispatch(&self, mut message: Value) {
        let mut live = self.live();
        if let Some(event) = Event::from_message(&mut message) {
            if let Some(events) = &live.events {
                // Fails when there is no receiver, which is no error.
                let _ = events.send(event);
            }
            return;
        }
        let waiting =
            message.get("id").and_then(Value::as_u64).and_then(|id| live.waiting.remove(&id));
        match waiting {
            // Fails when the caller has stopped waiting.
            Some(waiting) => drop(waiting.send(message)),
            None => tracing::debug!("a QMP answer that nobody waits for"),
        }
    }

    /// Ends the connection for all callers. The first reason stays.
    fn end(&self, reason: String) {
        let _ = self.ending.0.set(reason);
        let mut live = self.live();
        live.waiting.clear();
        live.events = None;
    }
}

/// Removes a caller's entry when it stops waiting, so that entries don't pile up.
struct Waiter<'a> {
    state: &'a State,
    id: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.state.live().waiting.remove(&self.id);
    }
}

impl Qmp {
    /// Connects to the control socket at `path` and greets. `timeout` is for the
    /// connection and the greeting together; commands have [`DEFAULT_TIMEOUT`].
    ///
    /// # Errors
    /// [`QmpError::Connect`] when no process listens, [`QmpError::NoGreeting`] when
    /// the socket's only place is taken, [`QmpError::NotQmp`] when it is another
    /// kind of socket, and as [`Qmp::execute`] for `qmp_capabilities`.
    pub async fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Qmp, QmpError> {
        let path = path.as_ref();
        let start = tokio::time::Instant::now();
        let connected = tokio::time::timeout(timeout, UnixStream::connect(path)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut)))
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        Qmp::over(stream, timeout.saturating_sub(start.elapsed())).await
    }

    /// Greets over a connected socket, such as one end of a socket pair.
    /// `timeout` is for the greeting.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub async fn over(stream: UnixStream, timeout: Duration) -> Result<Qmp, QmpError> {
        let socket = stream.as_fd().try_clone_to_owned().map_err(QmpError::Socket)?;
        let peer_pid = peer_pid(&stream);
        let (read_half, write_half) = stream.into_split();
        let mut messages = Messages::new(read_half);
        let version = match tokio::time::timeout(timeout, messages.next()).await {
            Ok(greeting) => greeted(greeting)?,
            Err(_) => {
                let got = messages.start();
                return Err(match got.is_empty() {
                    true => QmpError::NoGreeting { after: timeout },
                    false => QmpError::NotQmp { got },
                });
            }
        };

        let ends = (messages, write_half, socket);
        let qmp = Qmp::start(ends, version, peer_pid, 1);
        qmp.execute("qmp_capabilities", ()).await?;
        Ok(qmp)
    }

    /// Goes on with a connection of a process that has ended. What it left unread is read and
    /// dropped, with the rest of an answer that it had begun to read.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    pub async fn take_over(stream: UnixStream) -> Result<Qmp, QmpError> {
        let socket = stream.as_fd().try_clone_to_owned().map_err(QmpError::Socket)?;
        let peer_pid = peer_pid(&stream);
        let (read_half, write_half) = stream.into_split();
        let messages = Messages::continued(read_half);
        // Its answers may still come: none has one of our numbers.
        let first_id = u64::from(std::process::id()) << 32;
        let ends = (messages, write_half, socket);
        let unknown = QemuVersion { major: 0, minor: 0, micro: 0, package: String::new() };
        let mut qmp = Qmp::start(ends, unknown, peer_pid, first_id);
        let version = qmp.execute("query-version", ()).await?;
        let version = greeted(Ok(json!({ "QMP": { "version": version } })))?;
        if let Some(connection) = Arc::get_mut(&mut qmp.connection) {
            connection.version = version;
        }
        Ok(qmp)
    }

    /// Starts the tasks of a connection, whose first command has the number `next_id`.
    fn start(
        (messages, write_half, socket): (Messages<OwnedReadHalf>, OwnedWriteHalf, OwnedFd),
        version: QemuVersion,
        peer_pid: Option<i32>,
        next_id: u64,
    ) -> Qmp {
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let live = Live { waiting: HashMap::new(), events: Some(events) };
        let state = Arc::new(State { ending: Ending::default(), live: Mutex::new(live) });
        let (outgoing, queue) = mpsc::unbounded_channel();
        let reader = tokio::spawn(read_messages(messages, state.clone()));
        let writer = tokio::spawn(write_messages(write_half, queue, state.clone()));
        let next_id = next_id.into();
        let connection =
            Connection { version, peer_pid, outgoing, state, next_id, reader, writer, socket };
        Qmp { connection: Arc::new(connection), timeout: DEFAULT_TIMEOUT }
    }

    /// The socket, for a process that may have to go on with the connection
    /// ([`Qmp::take_over`]).
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.connection.socket.as_fd()
    }

    /// The same connection with another limit to how long a command may take.
    pub fn with_timeout(&self, timeout: Duration) -> Qmp {
        Qmp { connection: self.connection.clone(), timeout }
    }

    /// QEMU's version, from its greeting.
    pub fn version(&self) -> &QemuVersion {
        &self.connection.version
    }

    /// The process that made the other end of the socket, by `SO_PEERCRED`
    /// (unix(7)): for a listening socket who called listen(2), for a socket pair
    /// who called socketpair(2), which then is *not* QEMU. `None` when it lives
    /// in a PID namespace that is not visible from here.
    pub fn peer_pid(&self) -> Option<i32> {
        self.connection.peer_pid
    }

    /// Executes a command and returns its result. Arguments that serialise to JSON `null`, such
    /// as `()`, are omitted. Cancel-safe: the command is sent completely or not at all.
    ///
    /// # Errors
    /// [`QmpError::Command`] with QEMU's own words, [`QmpError::Timeout`],
    /// [`QmpError::Gone`].
    pub async fn execute(
        &self,
        command: &str,
        arguments: impl Serialize,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, None).await
    }

    /// As [`Qmp::execute`], passing a copy of a descriptor with the command
    /// (`SCM_RIGHTS`, unix(7)), as `getfd` and `add-fd` want it.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and [`QmpError::Socket`] when the descriptor can't be
    /// duplicated.
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: impl Serialize,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let fd = fd.try_clone_to_owned().map_err(QmpError::Socket)?;
        self.send(command, arguments, Some(fd)).await
    }

    /// A receiver of all events from now on. It holds [`EVENT_QUEUE`] events
    /// unfetched; when more come, the loss is reported, never silent.
    pub fn events(&self) -> Events {
        let ending = self.connection.state.ending.clone();
        let queue = match &self.connection.state.live().events {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        };
        Events { queue, ending }
    }

    /// Why the connection has ended, or `None` while it stands.
    pub fn ended(&self) -> Option<&str> {
        self.connection.state.ending.0.get().map(String::as_str)
    }

    async fn send(
        &self,
        command: &str,
        arguments: impl Serialize,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let state = &*self.connection.state;
        let id = self.connection.next_id.fetch_add(1, Ordering::Relaxed);
        let bytes = request(command, arguments, id)?;
        let (sender, answer) = oneshot::channel();
        {
            let mut live = state.live();
            if live.events.is_none() {
                return Err(state.ending.gone());
            }
            live.waiting.insert(id, sender);
        }
        let _waiter = Waiter { state, id };
        if self.connection.outgoing.send(Outgoing { bytes, fd }).is_err() {
            return Err(state.ending.gone());
        }
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(answer)) => outcome(command, answer),
            Ok(Err(_)) => Err(state.ending.gone()),
            Err(_) => Err(QmpError::Timeout { command: command.to_owned(), after: self.timeout }),
        }
    }
}

/// A command as QEMU reads it.
fn request(command: &str, arguments: impl Serialize, id: u64) -> Result<Vec<u8>, QmpError> {
    let arguments = serde_json::to_value(arguments)
        .map_err(|source| QmpError::Arguments { command: command.to_owned(), source })?;
    let mut request = json!({ "execute": command, "id": id });
    if !arguments.is_null() {
        request["arguments"] = arguments;
    }
    let mut bytes = request.to_string().into_bytes();
    bytes.push(b'\n');
    Ok(bytes)
}

/// The result or the error in an answer.
fn outcome(command: &str, mut answer: Value) -> Result<Value, QmpError> {
    if let Some(value) = answer.get_mut("return") {
        return Ok(value.take());
    }
    let error = &answer["error"];
    match (error["class"].as_str(), error["desc"].as_str()) {
        (Some(class), Some(desc)) => Err(QmpError::Command {
            command: command.to_owned(),
            class: class.to_owned(),
            desc: desc.to_owned(),
        }),
        _ => Err(QmpError::UnexpectedAnswer {
            command: command.to_owned(),
            problem: "it holds neither a result nor an error".to_owned(),
        }),
    }
}

/// The version in a greeting.
fn greeted(greeting: Result<Value, ReadError>) -> Result<QemuVersion, QmpError> {
    let greeting = match greeting {
        Ok(greeting) => greeting,
        Err(ReadError::NotJson { start, .. }) => return Err(QmpError::NotQmp { got: start }),
        Err(reason) => {
            return Err(QmpError::ClosedBeforeGreeting { reason: reason.to_string() });
        }
    };
    let version = &greeting["QMP"]["version"];
    let number = |part| version["qemu"][part].as_u64().and_then(|n| u32::try_from(n).ok());
    match (number("major"), number("minor"), number("micro")) {
        (Some(major), Some(minor), Some(micro)) => Ok(QemuVersion {
            major,
            minor,
            micro,
            package: version["package"].as_str().unwrap_or_default().to_owned(),
        }),
        _ => Err(QmpError::NotQmp { got: greeting.to_string().chars().take(80).collect() }),
    }
}

/// The reader task: delivers messages until the connection ends.
async fn read_messages(mut messages: Messages<OwnedReadHalf>, state: Arc<State>) {
    loop {
        match messages.next().await {
            Ok(message) => state.dispatch(message),
            Err(reason) => return state.end(reason.to_string()),
        }
    }
}

/// The writer task. As a task of its own it completes a message even if its caller has stopped
/// waiting.
async fn write_messages(
    socket: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    state: Arc<State>,
) {
    while let Some(Outgoing { bytes, mut fd }) = queue.recv().await {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let stream: &UnixStream = socket.as_ref();
            let sent = stream.async_io(Interest::WRITABLE, || send_part(stream, rest, fd.as_ref()));
            match sent.await {
                Ok(sent) => rest = &rest[sent..],
                Err(error) => return state.end(format!("writing failed: {error}")),
            }
            // The descriptor has gone with the message's first byte.
            fd = None;
        }
    }
}

/// Sends what the socket takes at once; a descriptor goes with its first byte.
fn send_part(socket: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(bytes)],
        rights.as_slice(),
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map_err(io::Error::from)
}
