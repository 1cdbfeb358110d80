//! What is written down of pools and guests, for the daemon that comes after this one.
//!
//! ```text
//! STATE/
//!     lock              held by the daemon that uses the directory
//!     pools.json        the pools that were created by request
//!     numbers.json      the number of each pool's next guest
//!     guests/1f0c92ab   a guest, from before its QEMU is started until it is gone
//!     pools/NAME/       the directories of a pool's guests
//!     flat/IDENTITY     a flat copy of an image, for pools that share memory
//! ```
//!
//! A file takes its place by rename(2): whoever is killed leaves the old one or the new one.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::config::PoolSettings;
use super::error::PoolError;
use super::event::SetupView;
use crate::runs::ProcessId;

/// A guest, as it is written down.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SavedGuest {
    pub id: String,
    pub pool: String,
    /// Its number in the pool.
    pub number: u32,
    /// Its name: that of the template, or the one that it was taken by.
    pub name: String,
    pub directory: PathBuf,
    pub qmp: PathBuf,
    pub ports: BTreeMap<u16, u16>,
    /// Its QEMU; none before that has been started.
    pub qemu: Option<ProcessId>,
    /// Whether it was taken.
    pub taken: bool,
    /// When, in milliseconds since 1970.
    pub taken_unix_ms: u64,
    pub resets: u64,
    #[serde(default)]
    pub setup: Option<SetupView>,
    /// Whether it is going back to its image: what there is of it belongs to two moments.
    #[serde(default)]
    pub resetting: bool,
}

/// The number of each pool's next guest. Numbers are not used again, so that nobody takes a guest for
/// one that was there before.
#[derive(Debug)]
pub(super) struct Numbers {
    state: Arc<StateDirectory>,
    next: Mutex<BTreeMap<String, u32>>,
}

impl Numbers {
    /// Those that are written down.
    pub fn read(state: Arc<StateDirectory>) -> Result<Numbers, PoolError> {
        Ok(Numbers { next: Mutex::new(state.numbers()?), state })
    }

    /// The number of a pool's next guest.
    pub fn take(&self, pool: &str) -> u32 {
        let mut all = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let next = all.entry(pool.to_owned()).or_insert(1);
        let number = *next;
        *next += 1;
        if let Err(error) = self.state.set_numbers(&all) {
            tracing::warn!("a daemon after this one may use a guest's number again: {error}");
        }
        number
    }
}

/// The directory of all that outlives a daemon.
#[derive(Debug)]
pub(super) struct StateDirectory {
    path: PathBuf,
    /// Held as long as this lives.
    _lock: Flock<File>,
}

impl StateDirectory {
    /// Takes it, making it for this user alone if it is not there.
    pub fn take(path: &Path) -> Result<StateDirectory, PoolError> {
        let failed = |doing: &'static str| {
            let path = path.to_owned();
            move |source| PoolError::State { doing, path, source }
        };
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        for part in ["guests", "pools", "flat"] {
            make(&path.join(part)).map_err(failed("making"))?;
        }
        let mut options = File::options();
        options.create(true).write(true).truncate(false).mode(0o600);
        let lock = options.open(path.join("lock")).map_err(failed("locking"))?;
        match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(StateDirectory { path: path.to_owned(), _lock: lock }),
            Err((_, Errno::EWOULDBLOCK)) => Err(PoolError::DaemonRunning { path: path.to_owned() }),
            Err((_, error)) => Err(failed("locking")(error.into())),
        }
    }

    /// The directory of a pool's guests.
    pub fn of_pool(&self, pool: &str) -> PathBuf {
        self.path.join("pools").join(pool)
    }

    /// Where the flat copy of an image is.
    pub fn flat(&self, identity: &str) -> PathBuf {
        self.path.join("flat").join(identity)
    }

    /// The pools that were created by request.
    pub fn pools(&self) -> Result<BTreeMap<String, PoolSettings>, PoolError> {
        Ok(self.read(&self.path.join("pools.json"))?.unwrap_or_default())
    }

    pub fn set_pools(&self, pools: &BTreeMap<String, PoolSettings>) -> Result<(), PoolError> {
        self.write(&self.path.join("pools.json"), pools)
    }

    fn numbers(&self) -> Result<BTreeMap<String, u32>, PoolError> {
        Ok(self.read(&self.path.join("numbers.json"))?.unwrap_or_default())
    }

    fn set_numbers(&self, numbers: &BTreeMap<String, u32>) -> Result<(), PoolError> {
        self.write(&self.path.join("numbers.json"), numbers)
    }

    /// All guests that a daemon before this one had. What can't be read is left, with a warning.
    pub fn guests(&self) -> Result<Vec<SavedGuest>, PoolError> {
        let path = self.path.join("guests");
        let entries = fs::read_dir(&path).map_err(|source| PoolError::State {
            doing: "reading",
            path,
            source,
        })?;
        let mut guests = Vec::new();
        for entry in entries.flatten() {
            match self.read::<SavedGuest>(&entry.path()) {
                Ok(guest) => guests.extend(guest),
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(guests)
    }

    pub fn set_guest(&self, guest: &SavedGuest) -> Result<(), PoolError> {
        self.write(&self.of_guest(&guest.id), guest)
    }

    /// Forgets a guest that is no more.
    pub fn forget(&self, id: &str) {
        if let Err(error) = fs::remove_file(self.of_guest(id)) {
            tracing::debug!("guest {id}: {error}");
        }
    }

    fn of_guest(&self, id: &str) -> PathBuf {
        self.path.join("guests").join(id)
    }

    fn read<T: DeserializeOwned>(&self, path: &Path) -> Result<Option<T>, PoolError> {
        let read = match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.and_then(|text| Ok(serde_json::from_slice(&text)?)),
        };
        read.map(Some).map_err(|source| PoolError::State {
            doing: "reading",
            path: path.to_owned(),
            source,
        })
    }

    fn write<T: Serialize>(&self, path: &Path, value: &T) -> Result<(), PoolError> {
        // Not in `guests`, all of which are guests.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let new = self.path.join(format!("{name}.new"));
        let written = (|| {
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&new)?.write_all(&serde_json::to_vec(value)?)?;
            fs::rename(&new, path)
        })();
        written.map_err(|source: io::Error| {
            let _ = fs::remove_file(&new);
            PoolError::State { doing: "writing", path: path.to_owned(), source }
        })
    }
}
