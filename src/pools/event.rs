//! What is told of pools and guests.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kind::ErrorKind;
use crate::memory::CacheFigures;
use crate::revert::{Preload, ResetWay};

/// A pool as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: PathBuf,
    /// How it is.
    pub state: PoolState,
    /// Why it can't start guests, if it can't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// How many guests are to wait, armed.
    pub armed: u32,
    /// How many do.
    pub ready: u32,
    /// How many may be taken at a time.
    pub max: u32,
    /// How many are taken.
    pub running: u32,
    /// How many requests wait for a guest.
    pub waiting: u32,
    /// How many guests have been taken so far, since the daemon was started.
    pub takes: u64,
    /// What of a guest's memory is in place while it waits.
    pub preload: Preload,
    /// Whether its guests can be reset inside their QEMU.
    pub resettable: bool,
    /// Whether its guests share memory that they have not written.
    pub share: bool,
    /// The cache of its image's chunks, once that is open. Pools of one image have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheView>,
}

/// A cache of an image's decompressed chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct CacheView {
    /// Bytes that are kept.
    pub bytes: u64,
    /// The most that are.
    pub limit: u64,
    /// Chunks that were found in it.
    pub hits: u64,
    /// Chunks that had to be read from the image.
    pub misses: u64,
}

impl From<CacheFigures> for CacheView {
    fn from(figures: CacheFigures) -> CacheView {
        let CacheFigures { bytes, limit, hits, misses } = figures;
        CacheView { bytes, limit, hits, misses }
    }
}

/// How a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PoolState {
    /// As many guests wait as are to.
    Ready,
    /// Guests are being armed.
    Filling,
    /// No guest can be started; it is tried again.
    Degraded,
}

/// Why a pool can't start guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct Problem {
    /// The kind of error, by [`ErrorKind::code`].
    pub code: String,
    /// What failed, why, and what to do.
    pub message: String,
}

impl Problem {
    pub(super) fn new(kind: ErrorKind, message: String) -> Problem {
        Problem { code: kind.code().to_owned(), message }
    }
}

/// A guest that was taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct GuestView {
    /// Its id, which no other guest has.
    pub id: String,
    /// Its pool.
    pub pool: String,
    /// Its name.
    pub name: String,
    /// Its QEMU's process id; it changes with a reset that takes a new process.
    pub qemu_pid: i32,
    /// Its QEMU's control socket (QMP).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// Its directory: sockets, logs and overlays.
    pub dir: PathBuf,
    /// The port of this host for each recorded one.
    pub ports: BTreeMap<String, u16>,
    /// How long taking it took, from the request until QEMU ran the guest, in milliseconds; none of
    /// a guest that a daemon before this one has handed out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ms: Option<f64>,
    /// Seconds since it was taken.
    pub age_s: f64,
    /// Whether its next reset is inside its QEMU: all its memory is in place, and its writes are
    /// tracked.
    pub resettable: bool,
    /// How often it has been reset.
    pub resets: u64,
    /// The share of its memory that is in place, from 0 to 1; none where nobody knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present: Option<f64>,
}

/// What a reset has done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct ResetView {
    /// How the guest went back.
    pub how: ResetWay,
    /// Host pages that were written back; none of a new process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<u64>,
    /// How long it took until the guest ran again, in milliseconds.
    pub ms: f64,
    /// Why the guest got a new process, where it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The guest as it is now.
    pub guest: GuestView,
}

/// What happens to pools and guests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum PoolEvent {
    /// A pool has changed.
    Pool(PoolView),
    /// A pool was removed.
    Removed {
        /// Its name.
        pool: String,
    },
    /// A guest was taken.
    Taken(GuestView),
    /// A guest went back to its image.
    Reset {
        /// The guest's id.
        id: String,
        /// Its pool.
        pool: String,
        /// How.
        how: ResetWay,
        /// How long it took, in milliseconds.
        ms: f64,
    },
    /// A guest is no more.
    Released {
        /// Its id.
        id: String,
        /// Its pool.
        pool: String,
        /// Why: `asked`, `lifetime`, `ended` (its QEMU has), `pool_removed`, `unclaimed` (who asked
        /// for it had hung up).
        why: String,
    },
    /// A pool can't start guests.
    Degraded {
        /// The pool.
        pool: String,
        /// The kind of error.
        code: String,
        /// What failed, why, and what to do.
        message: String,
    },
}
