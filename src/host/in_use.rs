//! What is in use on this host right now, read from /proc (proc(5)). Nothing is
//! connected to or opened for that, which could disturb what we only ask about.
//!
//! Processes of other users can't be looked into without root; what only they
//! use is not seen.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::kind::{Details, ErrorKind};

use super::procfs::{self, Mapping, descriptor_link, descriptors, processes};

/// Something of /proc could not be read.
#[derive(Debug, thiserror::Error)]
#[error("can't read {path}: {source}", path = path.display())]
pub struct ReadError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl ReadError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::of_io(&self.source)
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), Some(&self.path), None)
    }
}

/// An address that a socket listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket's path, as written.
    Unix(String),
    /// A Unix socket's name in the abstract namespace.
    Abstract(String),
    /// A TCP port, as written.
    Tcp(String),
}

/// A file's identity: device and inode number.
pub type FileId = (u64, u64);

/// A process that has a file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: i32,
    /// Its name (`comm`).
    pub name: String,
    /// Whether it can write through the descriptor or mapping.
    pub writes: bool,
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
        Address::Tcp(port) => return tcp_port_listens(port),
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

fn read(path: &str) -> Result<String, ReadError> {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .map_err(|source| ReadError { path: path.into(), source })
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

/// Whether anybody listens on the TCP port, on whichever of the host's addresses.
fn tcp_port_listens(port: &str) -> Result<bool, ReadError> {
    /// The state LISTEN (Linux's net/tcp_states.h).
    const LISTEN: &str = "0A";
    let Ok(port) = port.parse::<u16>() else { return Ok(false) };
    let local_port = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next()?.rsplit(':').next()?;
        let state = fields.nth(1)?;
        (state == LISTEN).then(|| u16::from_str_radix(local, 16).ok()).flatten()
    };
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let lines = match read(table) {
            // A host without IPv6 has no such table.
            Err(ReadError { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                continue;
            }
            lines => lines?,
        };
        if lines.lines().skip(1).any(|line| local_port(line) == Some(port)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The working directory of the process that holds the socket.
fn working_directory_of_socket(inode: u64) -> Option<PathBuf> {
    let link = PathBuf::from(format!("socket:[{inode}]"));
    let is_socket = |pid, fd| descriptor_link(pid, fd).is_ok_and(|to| to == link);
    let pid = processes().find(|pid| seen_descriptors(*pid).any(|fd| is_socket(*pid, fd)))?;
    fs::read_link(procfs::path(pid, "cwd")).ok()
}

/// The numbers of a process's descriptors; none when it may not be looked into.
fn seen_descriptors(pid: i32) -> impl Iterator<Item = i32> {
    descriptors(pid).unwrap_or_default().into_iter()
}

/// Who has which of these files open or mapped; files that don't exist, or are
/// not regular files, are held by nobody.
pub fn holders(files: &[PathBuf]) -> HashMap<PathBuf, Vec<Holder>> {
    let mut wanted: HashMap<FileId, Vec<&PathBuf>> = HashMap::new();
    for file in files {
        if let Some(meta) = fs::metadata(file).ok().filter(fs::Metadata::is_file) {
            wanted.entry((meta.dev(), meta.ino())).or_default().push(file);
        }
    }
    let mut found: HashMap<PathBuf, Vec<Holder>> = HashMap::new();
    if wanted.is_empty() {
        return found;
    }
    for pid in processes() {
        for (id, writes) in open_files(pid).chain(mapped_files(pid, &wanted)) {
            for file in wanted.get(&id).into_iter().flatten() {
                let name = fs::read_to_string(procfs::path(pid, "comm")).unwrap_or_default();
                let holder = Holder { pid, name: name.trim_end().to_owned(), writes };
                found.entry((*file).clone()).or_default().push(holder);
            }
        }
    }
    found
}

/// Whether a process has a file open.
pub fn has_open(pid: i32, file: FileId) -> bool {
    open_files(pid).any(|(id, _)| id == file)
}

/// The files that a process has open, and whether for writing.
fn open_files(pid: i32) -> impl Iterator<Item = (FileId, bool)> {
    seen_descriptors(pid).filter_map(move |fd| {
        let meta = fs::metadata(procfs::path(pid, &format!("fd/{fd}"))).ok()?;
        if !meta.is_file() {
            return None;
        }
        let info = fs::read_to_string(procfs::path(pid, &format!("fdinfo/{fd}"))).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
        Some(((meta.dev(), meta.ino()), flags & libc::O_ACCMODE != libc::O_RDONLY))
    })
}

/// Which of the wanted files a process has mapped *shared*. A private mapping
/// writes nothing to the file.
fn mapped_files(pid: i32, wanted: &HashMap<FileId, Vec<&PathBuf>>) -> Vec<(FileId, bool)> {
    let mapped = |mapping: Mapping| {
        let path = mapping.path.filter(|_| mapping.shared && mapping.inode != 0)?;
        // The device shown in maps differs from stat(2)'s on some file systems, so the path
        // confirms the inode instead.
        let same = |id: &FileId, file: &Path| {
            id.1 == mapping.inode && fs::canonicalize(file).is_ok_and(|full| full == path)
        };
        let (id, _) = wanted.iter().find(|(id, files)| files.iter().any(|file| same(id, file)))?;
        Some((*id, mapping.writable))
    };
    Mapping::all_of(pid).unwrap_or_default().into_iter().filter_map(mapped).collect()
}

#[cfg(test)]
mod tests {
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
        assert!(is_listening(&Address::Tcp(port), cwd).unwrap());
        assert!(!is_listening(&Address::Tcp("name".into()), cwd).unwrap());
    }

    #[test]
    fn holders_of_files_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> =
            ["r", "w", "none", "missing"].map(|n| folder.path().join(n)).into();
        paths[..3].iter().for_each(|path| fs::write(path, "x").unwrap());
        let _reader = fs::File::open(&paths[0]).unwrap();
        let _writer = fs::OpenOptions::new().write(true).open(&paths[1]).unwrap();
        let found = holders(&paths);
        let us = std::process::id() as i32;
        let by = |path: &PathBuf| found.get(path).map(|list| (list[0].pid, list[0].writes));
        assert_eq!(by(&paths[0]), Some((us, false)));
        assert_eq!(by(&paths[1]), Some((us, true)));
        assert_eq!((by(&paths[2]), by(&paths[3])), (None, None));
    }

    #[test]
    fn shared_mappings_hold_a_file_whose_descriptor_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        // Private mappings don't hold the file, shared ones do.
        let path = file.path().to_owned();
        // SAFETY: nobody else changes the file while it is mapped, and the
        // mapping is never read.
        let map = unsafe { memmap2::MmapOptions::new().len(4096).map_mut(file.as_file()) }.unwrap();
        let (opened, path_guard) = file.into_parts();
        drop(opened);
        let found = holders(std::slice::from_ref(&path));
        assert!(found[&path].iter().all(|holder| holder.writes));
        drop(map);
        assert!(holders(&[path]).is_empty());
        drop(path_guard);
    }
}
