//! Leases: they tell a prune who is at work.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::repository::error::RepositoryError;
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{MapId, ObjectId, PackId, random};
use crate::repository::reading::repository::Repository;

/// How long a lease holds that is not renewed.
pub const HOLDS: Duration = Duration::from_secs(15 * 60);
/// How often it is renewed.
const RENEWED: Duration = Duration::from_secs(3 * 60);
/// The longest lease.
pub const MAX_LEASE: u64 = 64 << 20;

/// What a lease says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who holds it: host and process.
    pub holder: String,
    /// Whether it adds to the repository. One who only reads does not find what has been marked.
    pub writes: bool,
    /// Packs that it reads.
    pub packs: Vec<PackId>,
    /// Maps that it reads.
    pub maps: Vec<MapId>,
}

/// A lease that is held, and renewed, until it is dropped.
pub struct Held<'a> {
    repository: &'a Repository,
    key: String,
    bytes: Vec<u8>,
    renewed: Mutex<Instant>,
}

impl Lease {
    /// Of this process.
    pub fn new(writes: bool) -> Lease {
        let holder = format!("{} process {}", host(), std::process::id());
        Lease { holder, writes, ..Lease::default() }
    }
}

impl<'a> Held<'a> {
    /// Puts a lease.
    pub fn put(repository: &'a Repository, lease: &Lease) -> Result<Held<'a>, RepositoryError> {
        let key = format!("leases/{}", ObjectId(random()));
        // Plain data, which always can be written.
        let body = serde_json::to_vec(lease).unwrap_or_default();
        let bytes = repository.keys.close(Kind::Lease, &key, &body, false);
        let renewed = Mutex::new(Instant::now());
        repository.remote.put(&key, bytes.clone())?;
        Ok(Held { repository, key, bytes, renewed })
    }

    /// Runs work while a thread renews the lease.
    pub fn while_held<T>(
        &self,
        work: impl FnOnce() -> Result<T, RepositoryError>,
    ) -> Result<T, RepositoryError> {
        std::thread::scope(|scope| {
            let (end, ended) = channel::<()>();
            scope.spawn(move || {
                while ended.recv_timeout(RENEWED) == Err(RecvTimeoutError::Timeout) {
                    let at = Instant::now();
                    // One that fails is tried again in time; whether it came too late is looked at.
                    if self.repository.remote.put(&self.key, self.bytes.clone()).is_ok() {
                        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = at;
                    }
                }
            });
            let done = work();
            drop(end);
            done
        })
    }

    /// Whether it surely has held without a gap.
    pub fn holds(&self) -> bool {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < HOLDS / 2
    }

    /// Its key.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // What is left of it ends by itself.
        if let Err(error) = self.repository.remote.delete(&self.key) {
            tracing::debug!("{error}");
        }
    }
}

/// The name of this host.
pub fn host() -> String {
    let name = nix::sys::utsname::uname();
    name.map(|name| name.nodename().to_string_lossy().into_owned()).unwrap_or_default()
}
