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
    /// What its guests may take of memory, where that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryView>,
    /// Bytes of memory that its QEMUs have of their own now: what they share with nobody, and what is
    /// no part of a file. It is measured when it is asked for, and not told in events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// The cache of its image's chunks, once that is open. Pools of one image have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheView>,
}

/// What the guests of a pool may take of memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct MemoryView {
    /// The most that they may be counted with together.
    pub limit: u64,
    /// What they are counted with now.
    pub counted: u64,
    /// What a guest that is taken is counted with; none before its image has been opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<u64>,
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
    /// How what is done for it as soon as it runs has come on, where something is: its agent is told
    /// (`new_macs`, `agent_set_time`, `agent_exec`), and a command run (`hook_running`). Until it is
    /// done, the guest is like all others of its pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup: Option<SetupView>,
}

/// How what is done for a guest as soon as it runs has come on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct SetupView {
    /// How far.
    pub state: SetupState,
    /// What has failed, if something has; what was to follow is left out then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl SetupView {
    pub(super) fn pending() -> SetupView {
        SetupView { state: SetupState::Pending, problem: None }
    }

    /// As it is once the daemon has ended that did it.
    pub(super) fn abandoned(self) -> SetupView {
        match self.state {
            SetupState::Pending => SetupView {
                state: SetupState::Failed,
                problem: Some("the daemon was ended meanwhile; a reset does it anew".to_owned()),
            },
            _ => self,
        }
    }
}

/// How far what is done for a guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SetupState {
    /// It is under way.
    Pending,
    /// All is done.
    Done,
    /// Something has failed.
    Failed,
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
    /// A guest's agent has done something that it was told once the guest ran, or has failed.
    Agent {
        /// The guest's id.
        id: String,
        /// Its pool.
        pool: String,
        /// What: a command of the guest's shell, `guest-set-time`, or a card's new address.
        did: String,
        /// Why it failed; none where it did not. What was to follow is left out then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<String>,
        /// How long it took, in milliseconds; the first time with the wait for the agent.
        ms: f64,
        /// How many things are to follow.
        left: u64,
    },
    /// The command that was run once a guest ran has ended.
    Hook {
        /// The guest's id.
        id: String,
        /// Its pool.
        pool: String,
        /// What failed; none where it ended well.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<String>,
        /// How long it ran, in milliseconds.
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
