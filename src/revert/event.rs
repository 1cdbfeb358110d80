//! What a revert tells as it goes.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::options::Placement;

/// What happens during a revert, in this order but for `StillNeeded`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum RevertEvent {
    /// Something of the recorded command line was changed.
    Note {
        /// What was changed.
        what: String,
        /// Why.
        why: String,
    },
    /// A disk that is part of the snapshot: where the guest's changes to it go.
    Disk {
        /// The disk.
        disk: String,
        /// The frozen file, which is only read.
        frozen: PathBuf,
        /// The new file on top of it; none for one without a name, which goes with QEMU.
        overlay: Option<PathBuf>,
    },
    /// QEMU's QMP answers.
    QemuReady {
        /// QEMU's process id.
        pid: i32,
    },
    /// By which transport memory goes.
    Placing {
        /// The transport.
        #[serde(rename = "way")]
        placement: Placement,
        /// Why this one.
        reason: String,
    },
    /// The guest runs (or, saved while paused, could run).
    Running {
        /// QEMU's process id; none for a QEMU that somebody else started.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid: Option<i32>,
    },
    /// How far memory has come.
    Progress(Progress),
    /// An interrupt came while the guest still depends on the image being served.
    StillNeeded,
    /// All memory is in place; the guest no longer depends on us.
    Resident {
        /// The final counts.
        #[serde(flatten)]
        progress: Progress,
        /// Answers that brought memory, as opposed to requests for what was on its way.
        demands: u64,
        /// The median time of such an answer, in microseconds.
        answer_p50_us: f64,
        /// The time that 99 of 100 answers took at most, in microseconds.
        answer_p99_us: f64,
    },
}

/// How far a revert has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// Pages of 4096 bytes that are in place.
    pub pages: u64,
    /// Pages of the machine.
    pub total: u64,
    /// Requests from the guest so far.
    pub requests: u64,
}
