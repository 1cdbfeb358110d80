//! One QEMU's control socket: commands, answers and events.
//!
//! The protocol is the QEMU Machine Protocol, QMP (QEMU's `docs/interop/qmp-spec`). Its messages
//! travel by a [`Transport`]: QEMU's control socket, or whoever holds that. An answer that arrives
//! after its time limit does no harm.

mod block;
mod commands;
mod devices;
mod ending;
mod error;
mod event;
mod inbox;
mod message;
mod snapshots;
mod socket;
#[cfg(test)]
mod tests;
mod transport;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::net::UnixStream;

pub use block::{BlockEdge, BlockNode, Job};
pub use commands::{BlockDevice, RamBlock};
pub use devices::{Chardev, CpuSlot, DeviceProperty, Network, QomChild};
pub use error::QmpError;
pub use event::{Event, Events};
pub use inbox::Inbox;
pub use transport::{Outgoing, Transport};

use crate::host::pidfd::peer_pid;
use crate::machine::QemuVersion;
use message::{Messages, ReadError};
use socket::Socket;

/// How long a command may take unless [`Qmp::with_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one QEMU. Clones share the connection, which closes when the
/// last of them is dropped.
#[derive(Debug, Clone)]
pub struct Qmp {
    connection: Arc<Connection>,
    version: Arc<QemuVersion>,
    timeout: Duration,
}

/// What the clones of a [`Qmp`] share.
#[derive(Debug)]
struct Connection {
    peer_pid: Option<i32>,
    inbox: Arc<Inbox>,
    transport: Box<dyn Transport>,
    next_id: AtomicU64,
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

        let inbox = Arc::new(Inbox::default());
        let transport = Socket::start(messages, write_half, socket, inbox.clone());
        let qmp = Qmp::start(Box::new(transport), inbox, version, peer_pid, 1);
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
        let inbox = Arc::new(Inbox::default());
        let transport = Socket::start(messages, write_half, socket, inbox.clone());
        Qmp::introduced(Box::new(transport), inbox, peer_pid, first_id).await
    }

    /// Talks over a transport that takes commands at once, with no greeting, to the QEMU of
    /// process `pid`. It delivers to `inbox`.
    ///
    /// # Errors
    /// As for [`Qmp::execute`].
    #[cfg_attr(not(feature = "libvirt"), allow(dead_code))]
    pub async fn over_transport(
        transport: Box<dyn Transport>,
        inbox: Arc<Inbox>,
        pid: i32,
    ) -> Result<Qmp, QmpError> {
        Qmp::introduced(transport, inbox, Some(pid), 1).await
    }

    /// Asks for the version, which nobody has told.
    async fn introduced(
        transport: Box<dyn Transport>,
        inbox: Arc<Inbox>,
        peer_pid: Option<i32>,
        first_id: u64,
    ) -> Result<Qmp, QmpError> {
        let unknown = QemuVersion::default();
        let qmp = Qmp::start(transport, inbox, unknown, peer_pid, first_id);
        let answer = qmp.execute("query-version", ()).await?;
        let version = version_of(&answer).ok_or_else(|| not_qmp(&answer))?;
        Ok(Qmp { version: Arc::new(version), ..qmp })
    }

    /// A connection whose first command has the number `next_id`.
    fn start(
        transport: Box<dyn Transport>,
        inbox: Arc<Inbox>,
        version: QemuVersion,
        peer_pid: Option<i32>,
        next_id: u64,
    ) -> Qmp {
        let next_id = next_id.into();
        let connection = Connection { peer_pid, inbox, transport, next_id };
        let (connection, version) = (Arc::new(connection), Arc::new(version));
        Qmp { connection, version, timeout: DEFAULT_TIMEOUT }
    }

    /// The socket, for a process that may have to go on with the connection
    /// ([`Qmp::take_over`]). None where somebody else holds it, such as libvirt.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.connection.transport.socket()
    }

    /// The same connection with another limit to how long a command may take.
    pub fn with_timeout(&self, timeout: Duration) -> Qmp {
        Qmp { timeout, ..self.clone() }
    }

    /// QEMU's version.
    pub fn version(&self) -> &QemuVersion {
        &self.version
    }

    /// QEMU's process. Over a socket it is the process that made the other end, by `SO_PEERCRED`
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

    /// A receiver of all events from now on. It holds [`EVENT_QUEUE`](event::EVENT_QUEUE) events
    /// unfetched; when more come, the loss is reported, never silent.
    pub fn events(&self) -> Events {
        self.connection.inbox.events()
    }

    /// Why the connection has ended, or `None` while it stands.
    pub fn ended(&self) -> Option<&str> {
        self.connection.inbox.ended()
    }

    async fn send(
        &self,
        command: &str,
        arguments: impl Serialize,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let Connection { inbox, transport, next_id, .. } = &*self.connection;
        let id = next_id.fetch_add(1, Ordering::Relaxed);
        let request = request(command, arguments)?;
        let (_waiter, answer) = inbox.wait_for(id)?;
        if !transport.send(Outgoing { id, request, fd }) {
            return Err(inbox.gone());
        }
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(Ok(answer))) => outcome(command, answer),
            Ok(Ok(Err(reason))) => {
                Err(QmpError::NotCarried { command: command.to_owned(), reason })
            }
            Ok(Err(_)) => Err(inbox.gone()),
            Err(_) => Err(QmpError::Timeout { command: command.to_owned(), after: self.timeout }),
        }
    }
}

/// A command as QEMU reads it, but for its number.
fn request(command: &str, arguments: impl Serialize) -> Result<Value, QmpError> {
    let arguments = serde_json::to_value(arguments)
        .map_err(|source| QmpError::Arguments { command: command.to_owned(), source })?;
    let mut request = json!({ "execute": command });
    if !arguments.is_null() {
        request["arguments"] = arguments;
    }
    Ok(request)
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
    version_of(&greeting["QMP"]["version"]).ok_or_else(|| not_qmp(&greeting))
}

/// The version that a greeting holds, and `query-version` returns.
fn version_of(version: &Value) -> Option<QemuVersion> {
    let number = |part| version["qemu"][part].as_u64().and_then(|n| u32::try_from(n).ok());
    Some(QemuVersion {
        major: number("major")?,
        minor: number("minor")?,
        micro: number("micro")?,
        package: version["package"].as_str().unwrap_or_default().to_owned(),
    })
}

fn not_qmp(got: &Value) -> QmpError {
    QmpError::NotQmp { got: got.to_string().chars().take(80).collect() }
}
