//! The journal: a small file beside the image that tells what to undo should the save be
//! killed. It is there from before anything is changed until nothing is left to undo.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::JournalError;
use crate::host::paths::parent_directory;
use crate::host::procfs::started;
use crate::save::copies::DiskCopy;
use crate::save::overlays::Overlay;
use crate::save::quiesce::Frozen;
use crate::save::settings::Settings;

/// The longest journal that is read, in bytes: far more than any save writes.
const MAX_BYTES: u64 = 16 << 20;

/// How often it is looked whether another has recovered a save.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What is to be undone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::save) struct Plan {
    /// QEMU's process, and when it was started: proc_pid_stat(5).
    pub qemu: Option<(i32, u64)>,
    /// The file that had the image's name before, as [`file_identity`] tells.
    pub replaces: Option<(u64, u64)>,
    /// The guest ran until we stopped it, or were about to.
    pub held: bool,
    /// The guest's agent, if its file systems may be frozen by us.
    pub frozen: Option<Frozen>,
    /// QEMU's settings as they were.
    pub settings: Settings,
    /// Overlays that may exist.
    pub overlays: Vec<Overlay>,
    /// Copies of disks that may exist. They are part of the image once that is whole.
    #[serde(default)]
    pub copies: Vec<DiskCopy>,
}

impl Plan {
    /// Whether the QEMU whose guest was being saved still lives.
    pub fn qemu_lives(&self) -> bool {
        self.qemu.is_some_and(|(pid, start)| started(pid) == Some(start))
    }
}

/// A journal of a save. Dropping it leaves the file: see [`Journal::remove`].
pub(in crate::save) struct Journal {
    path: PathBuf,
    /// Held by whoever recovers the save.
    _lock: Option<Flock<File>>,
}

impl Journal {
    /// The name of an image's journal.
    pub fn path(image: &Path) -> PathBuf {
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        image.with_file_name(format!(".{name}.journal"))
    }

    /// Refuses an image whose last save did not come to its end.
    pub fn check(image: &Path) -> Result<(), JournalError> {
        let journal = Journal::path(image);
        match fs::symlink_metadata(&journal) {
            Ok(_) => Err(JournalError::Unfinished { journal, image: image.to_owned() }),
            Err(_) => Ok(()),
        }
    }

    /// Writes a new journal, durably.
    pub fn create(image: &Path, plan: &Plan) -> Result<Journal, JournalError> {
        let journal = Journal { path: Journal::path(image), _lock: None };
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(&journal.path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                JournalError::Unfinished { journal: journal.path.clone(), image: image.to_owned() }
            }
            _ => journal.failed("create", error),
        })?;
        if let Err(error) = journal.write(file, plan) {
            // Half a journal undoes nothing, and nothing has been done yet.
            let _ = fs::remove_file(&journal.path);
            return Err(error);
        }
        Ok(journal)
    }

    fn write(&self, mut file: File, plan: &Plan) -> Result<(), JournalError> {
        let text = serde_json::to_vec(plan).map_err(|e| self.failed("write", e.into()))?;
        file.write_all(&text).map_err(|e| self.failed("write", e))?;
        file.sync_all().map_err(|e| self.failed("write", e))?;
        let directory = parent_directory(&self.path);
        File::open(directory).and_then(|f| f.sync_all()).map_err(|e| self.failed("write", e))
    }

    /// Replaces what it says. A reader finds the old or the new.
    pub fn replace(&self, plan: &Plan) -> Result<(), JournalError> {
        let new = self.path.with_extension("journal.new");
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new);
        file.map_err(|e| self.failed("replace", e)).and_then(|file| self.write(file, plan))?;
        fs::rename(&new, &self.path).map_err(|e| self.failed("replace", e))
    }

    /// Reads the journal of an image, if there is one, to recover the save by it. Waits for
    /// another that does so: nothing may be left to do then.
    pub async fn claim(image: &Path) -> Result<Option<(Journal, Plan)>, JournalError> {
        let mut lock: Option<Flock<File>> = None;
        loop {
            let Some((journal, plan)) = Journal::read(image)? else { return Ok(None) };
            let failed = |e| journal.failed("lock", e);
            // Locked, it may have been removed or replaced in between.
            match &lock {
                Some(locked) if is_named(locked, &journal.path).map_err(failed)? => {
                    return Ok(Some((Journal { _lock: lock, ..journal }, plan)));
                }
                _ => lock = None,
            }
            let file = match File::open(&journal.path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.map_err(failed)?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => lock = Some(locked),
                Err((_, Errno::EWOULDBLOCK)) => tokio::time::sleep(LOOK_EVERY).await,
                Err((_, errno)) => return Err(failed(errno.into())),
            }
        }
    }

    /// Reads the journal of an image, if there is one.
    fn read(image: &Path) -> Result<Option<(Journal, Plan)>, JournalError> {
        let journal = Journal { path: Journal::path(image), _lock: None };
        let mut text = Vec::new();
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&journal.path);
        let read = file.and_then(|file| {
            let owner = file.metadata()?.uid();
            file.take(MAX_BYTES).read_to_end(&mut text).map(|_| owner)
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(journal.failed("read", error)),
            // It names files to remove, so it must be our own.
            Ok(owner) if owner != nix::unistd::geteuid().as_raw() => {
                let problem = format!("it belongs to another user, {owner}");
                return Err(JournalError::Unreadable { journal: journal.path, problem });
            }
            Ok(_) => {}
        }
        match serde_json::from_slice(&text) {
            Ok(plan) => Ok(Some((journal, plan))),
            Err(error) => {
                Err(JournalError::Unreadable { journal: journal.path, problem: error.to_string() })
            }
        }
    }

    /// Removes it, since nothing is left to undo.
    pub fn remove(self) -> Result<(), JournalError> {
        let _ = fs::remove_file(self.path.with_extension("journal.new"));
        fs::remove_file(&self.path).map_err(|e| self.failed("remove", e))
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { doing, journal: self.path.clone(), source }
    }
}

/// Whether an open file has this name.
fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    let meta = file.metadata()?;
    Ok(file_identity(path)? == Some((meta.dev(), meta.ino())))
}

/// What tells a file from all others as long as it exists: its file system and its inode.
/// None where there is no file of that name.
pub(in crate::save) fn file_identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some((meta.dev(), meta.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_is_there_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm.snap");
        let plan = Plan {
            qemu: Some((1, 2)),
            replaces: None,
            held: true,
            frozen: None,
            settings: Settings::default(),
            overlays: Vec::new(),
            copies: Vec::new(),
        };
        assert!(Journal::check(&image).is_ok() && Journal::read(&image).unwrap().is_none());
        let journal = Journal::create(&image, &plan).unwrap();
        assert!(matches!(Journal::check(&image), Err(JournalError::Unfinished { .. })));
        assert!(matches!(Journal::create(&image, &plan), Err(JournalError::Unfinished { .. })));
        journal.replace(&Plan { held: false, ..plan }).unwrap();
        let (journal, read) = Journal::read(&image).unwrap().unwrap();
        assert_eq!((read.qemu, read.held), (Some((1, 2)), false));
        journal.remove().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);

        fs::write(directory.path().join(".vm.snap.journal"), "{").unwrap();
        assert!(matches!(Journal::read(&image), Err(JournalError::Unreadable { .. })));
    }
}
