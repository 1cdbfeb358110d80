//! What reverts have left whose processes are all dead.
//!
//! Overlays hold what a guest has written. They are left over only where that guest never got
//! all of its memory, and ended: nobody can have gone on with it. Anything that a process has
//! open, and anything that is not what it should be, stays.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use super::directory::{base, check_private, is_id, us};
use super::record::{FILES, NEW_FILE};
use super::run::{ids, names};
use super::{Run, RunsError, directory, list};
use crate::host::in_use::{self, Address};

/// How old a directory without a record has to be: a server makes the one and then writes the
/// other.
const SETTLED: Duration = Duration::from_secs(60);

/// The first bytes of a qcow2 file (QEMU's docs/interop/qcow2.txt).
const QCOW2: [u8; 4] = *b"QFI\xfb";

/// What kind of thing was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LeftOverKind {
    /// An overlay over a disk of a guest that ended before it had all its memory.
    Overlay,
    /// A socket on which nobody listens any more.
    Socket,
    /// The log of a server that has ended.
    Log,
    /// The record of a revert.
    Record,
}

/// Something that killed processes have left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[non_exhaustive]
pub struct LeftOver {
    /// What kind of thing it is.
    pub what: LeftOverKind,
    /// Where it is.
    pub path: PathBuf,
}

/// What killed reverts of this user have left, in an order in which it can be removed.
///
/// # Errors
/// When the user's directory is there and can't be used.
pub fn left_overs() -> Result<Vec<LeftOver>, RunsError> {
    let runs = list()?;
    let (dead, living): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.is_over());
    // A record comes behind what it leads to, and behind the logs that lie beside it.
    let mut found = logs(&living)?;
    found.extend(dead.into_iter().flat_map(of_run));
    found.extend(empty_directories(&runs)?);
    Ok(found)
}

/// What a revert leaves that is not under way any more.
pub(super) fn of_run(run: &Run) -> Vec<LeftOver> {
    let record = &run.record;
    let mut found = Vec::new();
    let mut add = |what, path: &Path| {
        let left = LeftOver { what, path: path.to_owned() };
        // Something that can't be removed would be offered again and again.
        if left.check().is_ok() {
            found.push(left);
        }
    };
    if !record.resident {
        record.overlays.iter().for_each(|path| add(LeftOverKind::Overlay, path));
    }
    record.sockets.iter().for_each(|path| add(LeftOverKind::Socket, path));
    add(LeftOverKind::Record, &run.directory());
    found
}

/// The logs beside the records, but for those of reverts that are under way.
fn logs(living: &[&Run]) -> Result<Vec<LeftOver>, RunsError> {
    let living: HashSet<&str> = living.iter().map(|run| run.id.as_str()).collect();
    let is_log = |name: &String| {
        name.strip_suffix(".log").is_some_and(|id| is_id(id) && !living.contains(id))
    };
    let logs = names()?.into_iter().filter(is_log);
    let logs = logs.map(|name| LeftOver { what: LeftOverKind::Log, path: base().join(name) });
    Ok(logs.filter(|log| log.check().is_ok()).collect())
}

/// The directories of reverts whose server was killed before it wrote a record.
fn empty_directories(runs: &[Run]) -> Result<Vec<LeftOver>, RunsError> {
    let known: HashSet<&str> = runs.iter().map(|run| run.id.as_str()).collect();
    let is_empty = |path: &Path| -> io::Result<bool> {
        check_private(path)?;
        let age = fs::metadata(path)?.modified()?.elapsed().unwrap_or_default();
        let mut entries = fs::read_dir(path)?.flatten();
        Ok(age > SETTLED && entries.all(|entry| entry.file_name() == NEW_FILE))
    };
    let unknown = ids()?.into_iter().filter(|id| !known.contains(id.as_str()));
    let empty = unknown.map(|id| directory::of(&id)).filter(|path| is_empty(path).unwrap_or(false));
    Ok(empty.map(|path| LeftOver { what: LeftOverKind::Record, path }).collect())
}

impl LeftOver {
    /// Removes it, if it still is what it was found to be and no process has it open.
    ///
    /// # Errors
    /// When it isn't, or can't be removed.
    pub fn remove(&self) -> Result<(), RunsError> {
        let removed = self.check().and_then(|_still_nobodys| match self.what {
            LeftOverKind::Record => directory::remove(&self.path, &FILES),
            _ => fs::remove_file(&self.path),
        });
        removed.map_err(|source| RunsError::Remove { path: self.path.clone(), source })
    }

    /// Fails unless it is what it should be, and nobody's. What is returned keeps others from
    /// opening a file meanwhile.
    fn check(&self) -> io::Result<Option<File>> {
        match self.what {
            LeftOverKind::Record => check_private(&self.path).map(|()| None),
            LeftOverKind::Socket => check_socket(&self.path).map(|()| None),
            LeftOverKind::Log => unused_file(&self.path).map(Some),
            LeftOverKind::Overlay => {
                let mut file = unused_file(&self.path)?;
                let mut magic = [0; QCOW2.len()];
                file.read_exact(&mut magic)?;
                match magic == QCOW2 && is_overlay_name(&self.path) {
                    true => Ok(Some(file)),
                    false => Err(io::Error::other("it is no overlay of a revert")),
                }
            }
        }
    }
}

/// Opens a regular file of this user's that nobody else has open.
fn unused_file(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    let meta = file.metadata()?;
    if !path.is_absolute() || !meta.is_file() || meta.uid() != us() || meta.nlink() != 1 {
        return Err(io::Error::other("it is not a file of your own, under this name alone"));
    }
    match in_use::is_open_elsewhere(&file)? {
        false => Ok(file),
        true => Err(io::ErrorKind::ResourceBusy.into()),
    }
}

/// Whether the file is called as overlays of reverts are: `PREFIX.DISK-RANDOM.qcow2`, with 8
/// hexadecimal digits.
fn is_overlay_name(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let random = name.and_then(|name| name.strip_suffix(".qcow2")?.rsplit_once('-'));
    random.is_some_and(|(_, random)| is_id(random))
}

/// Fails unless it is a socket of this user's on which nobody listens.
fn check_socket(path: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if !path.is_absolute() || !meta.file_type().is_socket() || meta.uid() != us() {
        return Err(io::Error::other("it is not a socket of your own"));
    }
    let address = Address::Unix(path.to_string_lossy().into_owned());
    match in_use::is_listening(&address, Path::new("/")) {
        Ok(false) => Ok(()),
        Ok(true) => Err(io::ErrorKind::ResourceBusy.into()),
        Err(error) => Err(io::Error::other(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::runs::record::FILE;

    fn left(what: LeftOverKind, path: PathBuf) -> LeftOver {
        LeftOver { what, path }
    }

    #[test]
    fn overlays_go_unless_they_are_open_or_other_files() {
        let folder = tempfile::tempdir().unwrap();
        let overlay = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            left(LeftOverKind::Overlay, path)
        };
        let one = overlay("vm.snap.disk-0123abcd.qcow2", b"QFI\xfb rest");
        let open = File::open(&one.path).unwrap();
        assert!(one.remove().is_err() && one.path.exists());
        drop(open);
        one.remove().unwrap();
        assert!(!one.path.exists() && one.remove().is_err());

        for (name, content) in [
            ("vm.snap", &b"QFI\xfb"[..]),
            ("vm.disk-0123abcd.qcow2", b"SNAP"),
            ("vm.disk-0123abcd.qcow2", b""),
            ("vm.disk-0123abc.qcow2", b"QFI\xfb"),
            ("disk.qcow2", b"QFI\xfb"),
        ] {
            let other = overlay(name, content);
            assert!(other.remove().is_err() && other.path.exists(), "{name}");
        }
        let linked = overlay("vm.disk-00000000.qcow2", b"QFI\xfb");
        let link = folder.path().join("vm.disk-11111111.qcow2");
        std::os::unix::fs::symlink(&linked.path, &link).unwrap();
        assert!(left(LeftOverKind::Overlay, link.clone()).remove().is_err());
        fs::remove_file(&link).unwrap();
        fs::hard_link(&linked.path, &link).unwrap();
        assert!(linked.remove().is_err() && left(LeftOverKind::Overlay, link).remove().is_err());
    }

    #[test]
    fn sockets_go_unless_somebody_listens() {
        let folder = tempfile::tempdir().unwrap();
        let socket = left(LeftOverKind::Socket, folder.path().join("qmp.sock"));
        let listener = UnixListener::bind(&socket.path).unwrap();
        assert!(socket.remove().is_err() && socket.path.exists());
        drop(listener);
        socket.remove().unwrap();
        fs::write(&socket.path, "a file").unwrap();
        assert!(socket.remove().is_err() && socket.path.exists());
    }

    #[test]
    fn a_directory_goes_only_with_nothing_else_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let record = left(LeftOverKind::Record, folder.path().join("snapback/1f0c92ab"));
        directory::make(&record.path).unwrap();
        fs::write(record.path.join(FILE), "x").unwrap();
        fs::write(record.path.join("stranger"), "x").unwrap();
        assert!(record.remove().is_err() && record.path.join("stranger").exists());
        fs::remove_file(record.path.join("stranger")).unwrap();
        record.remove().unwrap();
        assert!(!record.path.exists());
    }
}
