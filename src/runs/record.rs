//! What is recorded of a revert.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::directory;
use crate::host::procfs;
use crate::keeper::Ledger;
use crate::reset::SOCKET;

/// The file of a record, and its name while it is written.
pub(super) const FILE: &str = "state.json";
pub(super) const NEW_FILE: &str = "state.json.new";

/// All that a server makes in its directory.
pub(super) const FILES: [&str; 3] = [FILE, NEW_FILE, SOCKET];

/// The longest record that is read, in bytes: far more than any is.
const MAX_BYTES: u64 = 1 << 20;

/// A process: its number, and what tells it from others that have the number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pid: i32,
    /// When it was started, in clock ticks since boot (proc_pid_stat(5), field 22). None of a
    /// server or a keeper whose record is written in the sandbox, where that can't be seen.
    started: Option<u64>,
    /// The ledger that a server or a keeper holds, [`Ledger::mark`].
    #[serde(default)]
    ledger: Option<u64>,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<ProcessId> {
        Some(ProcessId { pid, started: Some(procfs::started(pid)?), ledger: None })
    }

    /// The server or keeper that has this number now, and holds this ledger.
    pub fn serving(pid: i32, ledger: &Ledger) -> ProcessId {
        ProcessId { pid, started: procfs::started(pid), ledger: Ledger::mark(ledger).ok() }
    }

    /// This process.
    pub fn this() -> Option<ProcessId> {
        ProcessId::of(std::process::id() as i32)
    }

    /// Its number, whoever has it now.
    pub fn number(self) -> i32 {
        self.pid
    }

    /// Its number, while it lives.
    pub fn living(self) -> Option<i32> {
        let holds =
            |mark| Ledger::of_process(self.pid).any(|held| Ledger::mark(held).ok() == Some(mark));
        let lives = match self.started {
            None => self.ledger.is_some_and(holds),
            started => procfs::started(self.pid) == started,
        };
        lives.then_some(self.pid)
    }

    /// Whether it may live: a process in its sandbox sees only whether there is one of its number.
    pub fn may_live(self) -> bool {
        match File::open(procfs::path(self.pid, "stat")) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => true,
            _ => self.living().is_some(),
        }
    }
}

/// How a revert is done again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Again {
    /// The arguments of the program `snapback`, with which it returns once the guest runs.
    pub arguments: Vec<String>,
    /// The working directory.
    pub directory: PathBuf,
}

/// That a guest belongs to a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfPool {
    /// The pool's name.
    pub name: String,
    /// Where the daemon of the pool listens.
    pub daemon: PathBuf,
    /// The daemon, which serves other guests as well.
    process: Option<ProcessId>,
}

impl OfPool {
    /// That a guest belongs to this pool of a daemon that is this process, and listens there.
    pub fn of_this_process(name: String, daemon: PathBuf) -> OfPool {
        OfPool { name, daemon, process: ProcessId::this() }
    }
}

/// What is recorded of a revert.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub image: PathBuf,
    /// When it began, in milliseconds since 1970.
    pub begun_unix_ms: u64,
    /// Pages of 4096 bytes of its machine.
    pub pages: u64,
    pub server: Option<ProcessId>,
    pub qemu: Option<ProcessId>,
    pub keeper: Option<ProcessId>,
    /// By which transport its memory comes, once that is known.
    pub way: Option<String>,
    /// All its memory is in place: the guest needs no server, and is its owner's with all that
    /// it has written.
    pub resident: bool,
    /// The overlays of its disks that have a name.
    pub overlays: Vec<PathBuf>,
    /// The sockets on which QEMU listens.
    pub sockets: Vec<PathBuf>,
    /// The log of its server.
    pub log: Option<PathBuf>,
    /// How it is done again, where that was told.
    #[serde(default)]
    pub again: Option<Again>,
    /// The pool that it belongs to.
    #[serde(default)]
    pub pool: Option<OfPool>,
    /// What its guest waits for: `store`.
    #[serde(default)]
    pub waits_for: Option<String>,
}

impl Record {
    /// Its server, where that serves nobody else.
    pub fn server_alone(&self) -> Option<ProcessId> {
        let daemon = self.pool.as_ref().and_then(|pool| pool.process);
        self.server.filter(|server| Some(*server) != daemon)
    }

    /// That of a revert of this image, with so many pages, which begins now.
    pub fn new(image: PathBuf, pages: u64) -> Record {
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Record {
            image,
            begun_unix_ms: now.as_millis() as u64,
            pages,
            server: None,
            qemu: None,
            keeper: None,
            way: None,
            resident: false,
            overlays: Vec::new(),
            sockets: Vec::new(),
            log: None,
            again: None,
            pool: None,
            waits_for: None,
        }
    }

    /// Writes it to its directory. A reader finds this one or the one before.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let new = directory.join(NEW_FILE);
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&new)?.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&new, directory.join(FILE))
    }

    /// Reads that of a directory. Only a regular file of this user's is read.
    pub fn read(directory: &Path) -> io::Result<Record> {
        let mut options = File::options();
        // A pipe would be waited for.
        options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = options.open(directory.join(FILE))?;
        let meta = file.metadata()?;
        if !meta.is_file() || meta.uid() != directory::us() {
            return Err(io::Error::other("it is not a file of your own"));
        }
        let mut text = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut text)?;
        Ok(serde_json::from_slice(&text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_as_well() {
        let us = ProcessId::this().unwrap();
        assert_eq!(us.living(), Some(std::process::id() as i32));
        let later = us.started.map(|started| started + 1);
        assert_eq!(ProcessId { started: later, ..us }.living(), None);
        assert_eq!(ProcessId::of(i32::MAX), None);
    }

    #[test]
    fn where_its_start_was_not_seen_it_is_known_by_its_ledger() {
        let ledger = Ledger::create(1, 1, b"").unwrap();
        let pid = std::process::id() as i32;
        let us = ProcessId { started: None, ..ProcessId::serving(pid, &ledger) };
        assert_eq!(us.living(), Some(pid));
        let stranger = us.ledger.map(|mark| mark + 1000);
        assert_eq!(ProcessId { ledger: stranger, ..us }.living(), None);
        assert_eq!(ProcessId { ledger: None, ..us }.living(), None);
        let parent = std::os::unix::process::parent_id() as i32;
        assert_eq!(ProcessId { pid: parent, ..us }.living(), None);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record { server: ProcessId::this(), ..Record::new("/vm.snap".into(), 7) };
        record.write(folder.path()).unwrap();
        let read = Record::read(folder.path()).unwrap();
        assert_eq!(format!("{read:?}"), format!("{record:?}"));
        let names = fs::read_dir(folder.path()).unwrap();
        assert_eq!(names.map(|name| name.unwrap().file_name()).collect::<Vec<_>>(), [FILE]);
    }

    #[test]
    fn other_files_are_no_records() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join(FILE);
        for text in ["", "{}", "[1]", "\0\0", "{\"image\":1}"] {
            fs::write(&state, text).unwrap();
            assert!(Record::read(folder.path()).is_err(), "{text}");
        }
        fs::write(&state, vec![b'['; 2 << 20]).unwrap();
        assert!(Record::read(folder.path()).is_err());
        fs::remove_file(&state).unwrap();
        nix::unistd::mkfifo(&state, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(Record::read(folder.path()).is_err());
        fs::remove_file(&state).unwrap();
        std::os::unix::fs::symlink("/proc/self/stat", &state).unwrap();
        assert!(Record::read(folder.path()).is_err());
    }
}
