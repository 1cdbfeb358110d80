//! Errors of a QEMU's control socket.

use std::path::PathBuf;
use std::time::Duration;

use crate::kind::{Details, ErrorKind};

/// Why a QMP connection or a command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket can't be connected to.
    #[error("can't connect to the control socket {path}: {source}; is QEMU running, and was it \
             started with -qmp unix:{path},server=on,wait=off?", path = path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// The descriptor can't be used as a control socket.
    #[error("can't use the control socket: {0}")]
    Socket(std::io::Error),

    /// The socket was connected, but no greeting came in time.
    #[error(
        "the control socket did not greet within {after:?}: QEMU serves one client at a time \
             on a control socket, so another client (libvirt, a script) may hold this one; end \
             it, or give QEMU a second -qmp socket"
    )]
    NoGreeting {
        /// How long we waited.
        after: Duration,
    },

    /// The peer does not speak QMP.
    #[error(
        "the control socket answered, but not as QMP: it said {got:?}; a human monitor \
             (-monitor) or a guest agent won't do, it has to be a -qmp socket"
    )]
    NotQmp {
        /// The beginning of what it sent.
        got: String,
    },

    /// The connection ended before the greeting.
    #[error("the control socket was closed before it greeted: {reason}")]
    ClosedBeforeGreeting {
        /// The reason, as far as it is known.
        reason: String,
    },

    /// QEMU refused or failed the command.
    #[error("QEMU refused {command}: {desc}")]
    Command {
        /// The command's name.
        command: String,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        desc: String,
    },

    /// No answer in time. Whether the command was carried out is unknown.
    #[error("QEMU did not answer {command} within {after:?}; it may be busy or stuck")]
    Timeout {
        /// The command's name.
        command: String,
        /// How long we waited.
        after: Duration,
    },

    /// Whoever holds QEMU's monitor did not carry the command there, or not its answer back.
    /// Whether the command was carried out is unknown.
    #[error("{command} can't be carried to QEMU's monitor, or its answer back: {reason}")]
    NotCarried {
        /// The command's name.
        command: String,
        /// The reason, in the words of who holds the monitor.
        reason: String,
    },

    /// The connection is lost, most often because QEMU ended.
    #[error("the connection to QEMU's control socket is lost: {reason}")]
    Gone {
        /// What ended it.
        reason: String,
    },

    /// The arguments can't be serialised as JSON.
    #[error("can't write the arguments of {command} as JSON: {source}")]
    Arguments {
        /// The command's name.
        command: String,
        /// What is wrong with them.
        source: serde_json::Error,
    },

    /// The answer is not of the form that QEMU documents.
    #[error("QEMU answered {command} in an unexpected form: {problem}")]
    UnexpectedAnswer {
        /// The command's name.
        command: String,
        /// What was unexpected.
        problem: String,
    },

    /// The receiver was so slow that events fell out of its queue.
    #[error("{0} QMP events were lost because they were not fetched in time")]
    EventsLost(u64),

    /// The awaited event did not come in time.
    #[error("the awaited QMP event did not come within {after:?}")]
    EventTimeout {
        /// How long we waited.
        after: Duration,
    },
}

impl QmpError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            QmpError::Connect { source, .. } => match ErrorKind::of_io(source) {
                ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                _ => ErrorKind::QemuUnreachable,
            },
            QmpError::Socket(error) => ErrorKind::of_io(error),
            QmpError::NoGreeting { .. } => ErrorKind::QemuUnreachable,
            QmpError::NotCarried { .. } => ErrorKind::MonitorFailed,
            QmpError::NotQmp { .. } => ErrorKind::NotQemu,
            QmpError::ClosedBeforeGreeting { .. } | QmpError::Gone { .. } => ErrorKind::QemuEnded,
            QmpError::Command { .. } => ErrorKind::QemuRefused,
            QmpError::Timeout { .. } | QmpError::EventTimeout { .. } => ErrorKind::QemuTimeout,
            QmpError::Arguments { .. } => ErrorKind::Internal,
            QmpError::UnexpectedAnswer { .. } | QmpError::EventsLost(_) => ErrorKind::QemuProtocol,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            QmpError::Connect { path, .. } => Some(path.clone()),
            _ => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

impl QmpError {
    /// Whether QEMU does not know the command.
    pub fn is_command_not_found(&self) -> bool {
        matches!(self, QmpError::Command { class, .. } if class == "CommandNotFound")
    }
}
