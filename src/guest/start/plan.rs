//! What starting a recorded guest takes: the program, its arguments, what it inherits,
//! and what differs from the record.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use crate::guest::GuestError;
use crate::guest::disks::overlay::{Overlay, Overlays};
use crate::guest::start::reach::Reach;
use crate::host::in_use::ReservedPort;

/// The id of the character backend of snapback's own control socket.
pub(in crate::guest) const CONTROL_ID: &str = "snapback-control";

/// A difference from the record, to be reported to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What was changed.
    pub what: String,
    /// Why.
    pub why: String,
}

impl Note {
    pub(in crate::guest) fn new(what: impl Into<String>, why: impl Into<String>) -> Note {
        Note { what: what.into(), why: why.into() }
    }
}

/// How to start QEMU.
#[derive(Debug)]
pub struct StartPlan {
    /// The program.
    pub binary: PathBuf,
    /// Its command line, with `argv[0]` and without snapback's own control socket.
    pub argv: Vec<String>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Variables to set on top of our own environment.
    pub env: Vec<(String, String)>,
    /// All Unix sockets on which QEMU will listen, absolute.
    pub sockets: Vec<PathBuf>,
    /// Whether the guest stays paused until its user resumes it.
    pub paused: bool,
    /// How others will reach it.
    pub reach: Reach,
    /// The ports in it that are kept free for QEMU, until it has bound them.
    pub(in crate::guest) reserved: Vec<ReservedPort>,
    /// The guest's own directory, which is made before the start.
    pub(in crate::guest) own: Option<PathBuf>,
    /// What differs from the record.
    pub notes: Vec<Note>,
    /// Names of the blocks that it maps from a file.
    pub mapped: Vec<String>,
    /// The overlays to create before the start, one for each captured disk.
    pub overlays: Vec<Overlay>,
    /// What [`label_of`](crate::guest::label_of) tells of the process, of letters, digits and
    /// signs such as `-`.
    pub label: String,
    /// Descriptors to pass on, under the numbers they have here.
    pub(in crate::guest) inherit: Vec<OwnedFd>,
}

impl StartPlan {
    /// Creates the overlays of the plan.
    pub(in crate::guest) fn make_overlays(&mut self) -> Result<Overlays, GuestError> {
        let StartPlan { overlays, inherit, argv, .. } = self;
        Overlays::make(overlays, |fd, set| {
            argv.extend(["-add-fd".into(), format!("fd={},set={set}", fd.as_raw_fd())]);
            inherit.push(fd);
        })
    }

    /// Adds a descriptor that QEMU inherits. Returns its number in QEMU, as for
    /// `migrate-incoming fd:NUMBER`.
    #[cfg(test)]
    pub fn inherit(&mut self, fd: OwnedFd) -> std::os::fd::RawFd {
        let number = fd.as_raw_fd();
        self.inherit.push(fd);
        number
    }
}
