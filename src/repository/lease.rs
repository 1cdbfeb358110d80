//! Leases: they tell a prune who is at work.

use std::collections::HashMap;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::repository::error::{RepositoryError, StoreFailure};
use crate::repository::format::envelope::Kind;
use crate::repository::format::ids::{MapId, ObjectId, PackId, random};
use crate::repository::format::manifest::SnapshotManifest;
use crate::repository::reading::repository::Repository;

/// How long a lease holds that is not renewed.
pub const HOLDS: Duration = Duration::from_secs(15 * 60);
/// How often it is renewed.
const RENEWED: Duration = Duration::from_secs(3 * 60);
/// For how long it surely holds: clocks and requests take their time.
const SURE: Duration = Duration::from_secs(10 * 60);
/// The longest lease.
pub const MAX_LEASE: u64 = 64 << 20;

/// What a lease says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Who holds it: host and process.
    pub holder: String,
    /// Since when, in milliseconds since 1970 by the store's clock; 0 where it was put just now.
    #[serde(default)]
    pub since_ms: i64,
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
    since_ms: i64,
    /// When it was renewed, and how often that came too late.
    renewed: Mutex<(Instant, u64)>,
}

impl Lease {
    /// Of this process.
    pub fn new(writes: bool) -> Lease {
        let holder = format!("{} process {}", host(), std::process::id());
        Lease { holder, writes, ..Lease::default() }
    }

    /// Of this process, which reads a snapshot.
    pub fn reading(manifest: &SnapshotManifest) -> Lease {
        let packs = manifest.packs.iter().copied().collect();
        Lease { packs, maps: manifest.maps().collect(), ..Lease::new(false) }
    }
}

impl<'a> Held<'a> {
    /// Puts a lease.
    pub fn put(repository: &'a Repository, lease: &Lease) -> Result<Held<'a>, RepositoryError> {
        let key = format!("leases/{}", ObjectId(random()));
        let close = |lease: &Lease| repository.close_json(Kind::Lease, &key, lease, false);
        let renewed = Mutex::new((Instant::now(), 0));
        match repository.remote.put(&key, close(lease)) {
            // Whoever may only read does without: what it reads may be pruned meanwhile.
            Err(error)
                if !lease.writes
                    && matches!(error.failure, StoreFailure::Denied | StoreFailure::Refused) =>
            {
                tracing::debug!("no lease: {error}");
                let bytes = Vec::new();
                return Ok(Held { repository, key, bytes, since_ms: 0, renewed });
            }
            put => put?,
        }
        // The store's clock counts: those of hosts differ.
        let put = repository.remote.head(&key)?;
        let since_ms = put.map_or(0, |listing| listing.put_ms);
        let bytes = close(&Lease { since_ms, ..lease.clone() });
        Ok(Held { repository, key, bytes, since_ms, renewed })
    }

    /// Runs work while a thread renews the lease.
    pub fn while_held<T>(
        &self,
        work: impl FnOnce() -> Result<T, RepositoryError>,
    ) -> Result<T, RepositoryError> {
        std::thread::scope(|scope| {
            let (end, ended) = channel::<()>();
            if self.bytes.is_empty() {
                return work();
            }
            scope.spawn(move || {
                while ended.recv_timeout(RENEWED) == Err(RecvTimeoutError::Timeout) {
                    let at = Instant::now();
                    // One that fails is tried again in time; whether it came too late is looked at.
                    if self.repository.remote.put(&self.key, self.bytes.clone()).is_ok() {
                        let mut renewed = self.renewed();
                        renewed.1 += u64::from(renewed.0.elapsed() > SURE);
                        renewed.0 = at;
                    }
                }
            });
            let done = work();
            drop(end);
            done
        })
    }

    /// How often it may not have held so far. As long as that is the same, nothing that this process
    /// relies on has been removed.
    pub fn gaps(&self) -> u64 {
        let renewed = self.renewed();
        renewed.1 + u64::from(renewed.0.elapsed() > SURE)
    }

    /// Its key.
    #[cfg(feature = "internals")]
    pub fn key(&self) -> &str {
        &self.key
    }

    fn renewed(&self) -> MutexGuard<'_, (Instant, u64)> {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when it is held, in milliseconds since 1970 by the store's clock.
    pub fn since_ms(&self) -> i64 {
        self.since_ms
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.bytes.is_empty() {
            return;
        }
        // What is left of it ends by itself.
        self.repository.remote.try_delete(&self.key);
    }
}

/// A lease of somebody's, as it was found.
pub struct Found {
    pub key: String,
    /// When it was put or renewed last, in milliseconds since 1970.
    pub put_ms: i64,
    pub lease: Lease,
}

/// All leases.
pub fn leases(repository: &Repository) -> Result<Vec<Found>, RepositoryError> {
    let listed = repository.remote.list("leases")?;
    let times: HashMap<String, i64> =
        listed.into_iter().map(|listing| (listing.key, listing.put_ms)).collect();
    let mut found = Vec::new();
    repository.remote.get_each(times.keys().cloned().collect(), |key, bytes| {
        let mut lease: Lease = repository.open_json(Kind::Lease, key, &bytes, MAX_LEASE)?;
        let put_ms = times.get(key).copied().unwrap_or_default();
        if lease.since_ms == 0 {
            lease.since_ms = put_ms;
        }
        found.push(Found { key: key.to_owned(), put_ms, lease });
        Ok(())
    })?;
    Ok(found)
}

/// The name of this host.
pub fn host() -> String {
    let name = nix::sys::utsname::uname();
    name.map(|name| name.nodename().to_string_lossy().into_owned()).unwrap_or_default()
}
