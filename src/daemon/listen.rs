//! Where a daemon listens, and who is at the other end.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use listenfd::ListenFd;
use nix::unistd::{Group, geteuid};
use tokio::net::{TcpListener, UnixListener};

use super::error::DaemonError;
use super::options::default_socket;

/// Who asks for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// The user that the daemon runs as, or root: may do everything.
    Owner,
    /// Somebody else who may reach the socket: may use pools, but not say what they are made of,
    /// which includes programs that run and files that are written.
    Member,
    /// Somebody who comes by TCP: the same, with the token.
    Remote,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Caller {
        // SO_PEERCRED (unix(7)) tells who has connected.
        let user = stream.io().peer_cred().map(|peer| peer.uid());
        match user {
            Ok(user) if user == 0 || user == geteuid().as_raw() => Caller::Owner,
            _ => Caller::Member,
        }
    }
}

impl Connected<IncomingStream<'_, TcpListener>> for Caller {
    fn connect_info(_: IncomingStream<'_, TcpListener>) -> Caller {
        Caller::Remote
    }
}

/// A Unix socket on which a daemon listens. Its file is removed when this is dropped, if we have
/// made it.
pub(super) struct Socket {
    pub path: PathBuf,
    is_ours: bool,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens on a Unix socket: one that systemd has passed on (sd_listen_fds(3)), else at this path,
/// in the place of one on which nobody listens.
pub(super) fn unix(
    path: &Path,
    group: Option<&str>,
) -> Result<(UnixListener, Socket), DaemonError> {
    let failed = |source| DaemonError::Listen { path: path.to_owned(), source };
    // What is there is looked into first: systemd's socket has its own rights.
    let passed = ListenFd::from_env().take_unix_listener(0).map_err(failed)?;
    let (listener, is_ours) = match passed {
        Some(listener) => (listener, false),
        None => (bind(path, group)?, true),
    };
    let name = listener.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
    let socket = Socket { path: name.unwrap_or_else(|| path.to_owned()), is_ours };
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((UnixListener::from_std(listener).map_err(failed)?, socket))
}

fn bind(path: &Path, group: Option<&str>) -> Result<std::os::unix::net::UnixListener, DaemonError> {
    let failed = |source| DaemonError::Listen { path: path.to_owned(), source };
    let unknown = |name: &str| DaemonError::NoSuchGroup { name: name.to_owned() };
    let group = match group {
        Some(name) => Some(Group::from_name(name).ok().flatten().ok_or_else(|| unknown(name))?),
        None => None,
    };
    if let Some(above) = path.parent() {
        make_directory(above, group.is_some()).map_err(failed)?;
    }
    if fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(DaemonError::Running { path: path.to_owned() }),
            Err(_) => fs::remove_file(path).map_err(failed)?,
        }
    }
    // To connect takes the right to write, which nobody but us has by any sensible umask(2).
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed)?;
    let mode = match &group {
        Some(group) => {
            chown(path, None, Some(group.gid.as_raw())).map_err(failed)?;
            0o660
        }
        None => 0o600,
    };
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).map_err(failed)?;
    Ok(listener)
}

/// Makes the directory of the socket, if it is not there. With a group, its members have to get
/// through it; they see nothing of what is in it. Rights of a directory that its owner has chosen
/// are left alone.
fn make_directory(path: &Path, shared: bool) -> io::Result<()> {
    let mode = if shared { 0o711 } else { 0o700 };
    if !path.is_dir() {
        fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
    }
    match shared && default_socket().parent() == Some(path) {
        true => fs::set_permissions(path, PermissionsExt::from_mode(mode)),
        false => Ok(()),
    }
}

/// Listens on a TCP port.
pub(super) async fn tcp(address: SocketAddr) -> Result<TcpListener, DaemonError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| DaemonError::ListenTcp { address, source })
}
