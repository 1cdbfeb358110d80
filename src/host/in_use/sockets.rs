//! Sockets that somebody listens on.

use std::fs;
use std::path::{Path, PathBuf};

use super::owner;
use super::ports::{self, Port, Protocol};
use super::table::{ReadError, read};
use crate::host::procfs;

/// An address that a socket listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket's path, as written.
    Unix(String),
    /// A Unix socket's name in the abstract namespace.
    Abstract(String),
    /// A TCP port.
    Tcp {
        /// The host's address, as written; empty for all of them.
        host: String,
        /// The port's number, as written.
        port: String,
    },
}

/// A Unix socket on which a living process listens.
#[derive(Debug)]
struct Listener {
    /// As it was bound: absolute, relative, or `@` and an abstract name.
    path: String,
    inode: u64,
}

/// Whether a living process listens at `address`. Relative paths start from `cwd`.
pub fn is_listening(address: &Address, cwd: &Path) -> Result<bool, ReadError> {
    let path = match address {
        Address::Tcp { host, port } => {
            let Ok(number) = port.parse() else { return Ok(false) };
            let port = Port { protocol: Protocol::Tcp, host: host.clone(), number };
            return Ok(ports::bound_over(&port)?.is_some());
        }
        Address::Abstract(name) => {
            return Ok(unix_listeners()?.iter().any(|l| l.path.strip_prefix('@') == Some(name)));
        }
        Address::Unix(path) => path,
    };
    let wanted = canonical(&cwd.join(path));
    for listener in unix_listeners()? {
        let bound = Path::new(&listener.path);
        let same = if bound.is_absolute() {
            canonical(bound) == wanted
        } else if bound.file_name() != wanted.file_name() {
            false
        } else {
            // A daemon has left the directory that its paths started from: then
            // only the spelling is left to compare.
            match working_directory_of_socket(listener.inode) {
                Some(directory) if directory != Path::new("/") => {
                    canonical(&directory.join(bound)) == wanted
                }
                _ => listener.path == *path,
            }
        };
        if same {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The path with links resolved as far as its directory exists; the last part may
/// be missing or a socket.
fn canonical(path: &Path) -> PathBuf {
    match (path.parent().map(fs::canonicalize), path.file_name()) {
        (Some(Ok(directory)), Some(name)) => directory.join(name),
        _ => path.to_owned(),
    }
}

/// Listening Unix sockets, from /proc/net/unix.
fn unix_listeners() -> Result<Vec<Listener>, ReadError> {
    /// `__SO_ACCEPTCON` (Linux's linux/net.h): the socket listens.
    const ACCEPTS: u64 = 1 << 16;
    let listener = |line: &str| {
        // Num RefCount Protocol Flags Type St Inode Path; a path may hold spaces.
        let mut rest = line;
        let mut fields = [""; 7];
        for field in &mut fields {
            (*field, rest) = rest.trim_start().split_once(char::is_whitespace)?;
        }
        let flags = u64::from_str_radix(fields[3], 16).ok()?;
        let inode = fields[6].parse().ok()?;
        (flags & ACCEPTS != 0).then(|| Listener { path: rest.to_owned(), inode })
    };
    Ok(read("/proc/net/unix")?.lines().skip(1).filter_map(listener).collect())
}

/// The working directory of the process that holds the socket.
fn working_directory_of_socket(inode: u64) -> Option<PathBuf> {
    fs::read_link(procfs::path(owner::of_socket(inode)?, "cwd")).ok()
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn listening_sockets_are_seen_without_touching_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a socket");
        let address = Address::Unix(path.to_str().unwrap().to_owned());
        let cwd = Path::new("/");
        assert!(!is_listening(&address, cwd).unwrap());
        let listener = UnixListener::bind(&path).unwrap();
        assert!(is_listening(&address, cwd).unwrap());
        // By a relative path and through a link, too.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(is_listening(&Address::Unix("a socket".into()), &link).unwrap());
        assert!(!is_listening(&Address::Unix("other".into()), &link).unwrap());
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // A socket file whose listener has gone is free.
        drop(listener);
        assert!(path.exists() && !is_listening(&address, cwd).unwrap());

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let tcp = |port: &str| Address::Tcp { host: String::new(), port: port.to_owned() };
        assert!(is_listening(&tcp(&port), cwd).unwrap());
        assert!(!is_listening(&tcp("name"), cwd).unwrap());
    }
}
