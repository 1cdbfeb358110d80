//! The spool: where a save lies on its way into a repository.
//!
//! Each save has a directory of its own there, locked for as long as somebody works on it. It is removed
//! once it has been pushed. What can't be pushed stays, for a later push.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use uuid::Uuid;

use super::error::BackupError;
use crate::memory::working_set;
use crate::repository::{
    Access, Address, Moved, PushOptions, Pushed, Repository, RepositoryError, check_words, push,
};

/// What the names of images end with.
const ENDING: &str = "snap";

/// A save on its way into a repository.
#[derive(Debug)]
pub struct Spool {
    machine: String,
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Spool {
    /// Makes a directory for a save of this machine below `spool`, which is made as well. The save
    /// itself looks whether there is room.
    ///
    /// # Errors
    /// When the machine can't be called so, or the directory can't be made.
    pub fn make(spool: &Path, machine: &str) -> Result<Spool, BackupError> {
        check_words(machine, &Default::default())?;
        let mut unique = Uuid::new_v4().simple().to_string();
        unique.truncate(8);
        let directory = spool.join(format!("{machine}@{unique}"));
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        made.map_err(|e| io("making", &directory, e))?;
        // QEMU's process and ours may have other working directories.
        let absolute = std::path::absolute(&directory);
        let directory = absolute.map_err(|e| io("finding", &directory, e))?;
        let lock = match lock(&directory)? {
            Some(lock) => lock,
            // Somebody takes it for a save that was left, and will see that nothing is in it.
            None => return Err(io("locking", &directory, Errno::EAGAIN.into())),
        };
        Ok(Spool { machine: machine.to_owned(), directory, _lock: lock })
    }

    /// Saves of this machine that lie below `spool`, whole, and that nobody works on: what could not be
    /// pushed before. Directories of saves that came to nothing are removed.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn left(spool: &Path, machine: &str) -> Result<Vec<Spool>, BackupError> {
        let entries = match fs::read_dir(spool) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| io("reading", spool, e))?,
        };
        let mut left = Vec::new();
        for entry in entries {
            let directory = entry.map_err(|e| io("reading", spool, e))?.path();
            let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.rsplit_once('@').is_none_or(|(of, _)| of != machine) {
                continue;
            }
            // It is at work, or has gone meanwhile.
            let Ok(Some(lock)) = lock(&directory) else { continue };
            let found = Spool { machine: machine.to_owned(), directory, _lock: lock };
            if found.image().exists() {
                left.push(found);
            }
        }
        // The oldest first.
        left.sort_by_key(|spool| fs::metadata(spool.image()).and_then(|meta| meta.modified()).ok());
        Ok(left)
    }

    /// The image that a save is to write.
    pub fn image(&self) -> PathBuf {
        self.directory.join(format!("{}.{ENDING}", self.machine))
    }

    /// Pushes the save, and removes it. `options` say how; its image and machine are the spool's. Blocks.
    ///
    /// # Errors
    /// [`BackupError::NotPushed`]: it stays where it is.
    pub fn push(
        self,
        repository: &Repository,
        options: &PushOptions,
        on_progress: impl FnMut(Moved),
    ) -> Result<Pushed, BackupError> {
        let mut options = options.clone();
        (options.image, options.machine) = (self.image(), Some(self.machine.clone()));
        match push(repository, &options, on_progress) {
            Ok(pushed) => {
                self.remove(&pushed);
                Ok(pushed)
            }
            Err(source) => Err(self.not_pushed(source)),
        }
    }

    /// As [`push`](Spool::push), to a repository that has to be opened first.
    ///
    /// # Errors
    /// The same.
    pub fn push_to(
        self,
        address: &Address,
        access: &Access,
        options: &PushOptions,
        on_progress: impl FnMut(Moved),
    ) -> Result<Pushed, BackupError> {
        match Repository::open(address, access) {
            Ok(repository) => self.push(&repository, options, on_progress),
            Err(source) => Err(self.not_pushed(source)),
        }
    }

    fn not_pushed(&self, source: RepositoryError) -> BackupError {
        let (machine, image) = (self.machine.clone(), self.image());
        BackupError::NotPushed { machine, image, source: Box::new(source) }
    }

    /// Removes what was pushed, and nothing else: overlays that a guest lives in may lie beside it.
    fn remove(&self, pushed: &Pushed) {
        let image = self.image();
        let pushed = pushed.manifest.files.iter().map(|file| PathBuf::from(&file.path));
        let own = pushed.filter(|path| path.starts_with(&self.directory));
        for path in own.chain([working_set::path_for(&image), image.clone()]) {
            let _ = fs::remove_file(&path);
            // Copies of disks may have a directory of their own.
            let _ = path.parent().filter(|parent| *parent != self.directory).map(fs::remove_dir);
        }
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        // Whatever is in it keeps it.
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Takes a directory for this process, unless somebody has it.
fn lock(directory: &Path) -> Result<Option<Flock<File>>, BackupError> {
    let opened = File::open(directory).map_err(|e| io("opening", directory, e))?;
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(io("locking", directory, errno.into())),
    }
}

pub(super) fn io(doing: &'static str, path: &Path, source: std::io::Error) -> BackupError {
    BackupError::Io { doing, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_that_was_left_is_found_and_one_at_work_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let spool = directory.path().join("spool");
        assert!(Spool::left(&spool, "web1").unwrap().is_empty());
        // Nothing came of it: nothing stays.
        drop(Spool::make(&spool, "web1").unwrap());
        assert_eq!(fs::read_dir(&spool).unwrap().count(), 0);

        let at_work = Spool::make(&spool, "web1").unwrap();
        fs::write(at_work.image(), "whole").unwrap();
        assert!(Spool::left(&spool, "web1").unwrap().is_empty());
        drop(at_work);
        let left = Spool::left(&spool, "web1").unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(fs::read(left[0].image()).unwrap(), b"whole");
        assert!(Spool::left(&spool, "web").unwrap().is_empty());
        assert!(Spool::make(&spool, "a/b").is_err() && Spool::make(&spool, "").is_err());
    }
}
