//! Resident: all memory is in place, and the guest depends on nobody.

use super::qemu::Qemu;
use crate::guest::Process;
use crate::qmp::Qmp;
use crate::revert::outcome::Outcome;

/// A guest that has all its memory. Dropping it ends a QEMU of ours: take it out with
/// [`into_held`](Resident::into_held) to let it live on.
pub struct Resident {
    pub(super) qemu: Qemu,
    pub(super) outcome: Outcome,
}

/// A guest that has been brought back and is still its owner's: QEMU ends when this is
/// dropped.
#[derive(Debug)]
#[non_exhaustive]
pub struct Held {
    /// QEMU's process.
    pub(crate) process: Process,
    /// QEMU's control socket.
    pub(crate) qmp: Qmp,
    /// How its memory came.
    pub outcome: Outcome,
}

impl Held {
    /// QEMU's process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Ends QEMU. Overlays of its disks stay, unless they are ephemeral.
    pub async fn end(mut self) {
        self.process.kill().await;
    }

    /// Lets QEMU live on by itself; returns its process id.
    pub fn detach(mut self) -> i32 {
        self.process.detach();
        self.process.pid()
    }
}

impl Resident {
    /// How its memory came.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// The QEMU that was started for it; nothing where somebody else has started it.
    pub fn into_held(self) -> Option<Held> {
        match self.qemu {
            Qemu::Ours { process, qmp, .. } => Some(Held { process, qmp, outcome: self.outcome }),
            Qemu::Theirs { .. } => None,
        }
    }
}
