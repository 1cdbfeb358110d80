//! Files that processes have open or mapped.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::owner;
use crate::host::procfs::{self, Mapping, processes};

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
                let holder = Holder { pid, name: owner::name(pid), writes };
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

/// Whether anybody else has this file open, which must be this user's. The kernel is asked for a
/// lease, which it grants for a file that nobody else has open (fcntl(2), `F_SETLEASE`), in
/// whatever namespace; /proc decides where the file system knows no leases. While it is not open
/// elsewhere, the file stays so until it is closed: who opens it waits for that, for
/// /proc/sys/fs/lease-break-time seconds at most.
///
/// # Errors
/// When the file is not this user's.
pub fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    // SAFETY: F_SETLEASE takes a descriptor, which is open, and a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } == 0 {
        return Ok(false);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Ok(true),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOLCK) => {
            let meta = file.metadata()?;
            let (id, us) = ((meta.dev(), meta.ino()), std::process::id() as i32);
            Ok(processes().any(|pid| pid != us && has_open(pid, id)))
        }
        _ => Err(error),
    }
}

/// The files that a process has open, and whether for writing.
fn open_files(pid: i32) -> impl Iterator<Item = (FileId, bool)> {
    owner::seen_descriptors(pid).filter_map(move |fd| {
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
    use super::*;

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
    fn a_file_is_open_elsewhere_while_another_descriptor_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = File::open(file.path()).unwrap();
        assert!(is_open_elsewhere(&other).unwrap());
        let path = file.into_temp_path();
        assert!(!is_open_elsewhere(&other).unwrap());
        drop(other);
        assert!(File::open(&path).is_ok());
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
