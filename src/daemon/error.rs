//! Why a daemon could not run.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};
use crate::pools::PoolError;

/// Why a daemon could not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// Its pools could not be started.
    #[error(transparent)]
    Pools(#[from] PoolError),
    /// It can't listen on a socket.
    #[error("listening on `{}` failed: {source}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody listens on the socket.
    #[error("a daemon listens on `{}` already; end it, or choose another `DaemonOptions::listen`", path.display())]
    Running {
        /// The socket.
        path: PathBuf,
    },
    /// There is no such group.
    #[error("there is no group {name:?} to give the socket to")]
    NoSuchGroup {
        /// Its name.
        name: String,
    },
    /// It can't listen on a TCP port.
    #[error("listening on {address} failed: {source}")]
    ListenTcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Whoever reaches the port could use the daemon.
    #[error(
        "HTTP by TCP takes a token: write one to a file of your own and give it as \
             `DaemonConfig::token_file`"
    )]
    NoToken,
}

impl DaemonError {
    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            DaemonError::Pools(error) => error.kind(),
            DaemonError::Listen { source, .. } | DaemonError::ListenTcp { source, .. } => {
                ErrorKind::of_io(source)
            }
            DaemonError::Running { .. } => ErrorKind::DaemonRunning,
            DaemonError::NoSuchGroup { .. } | DaemonError::NoToken => ErrorKind::OptionsInvalid,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            DaemonError::Pools(error) => error.details(),
            DaemonError::Listen { path, .. } | DaemonError::Running { path } => {
                Details::new(&self.to_string(), Some(path), None)
            }
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}
