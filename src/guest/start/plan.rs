//! What starting a recorded guest takes: the program, its arguments, what it inherits,
//! and what differs from the record.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use crate::guest::GuestError;
use crate::guest::disks::overlay::{Overlay, Overlays};

/// The id of the character backend that our own control socket hangs on.
pub(in crate::guest) const CONTROL_ID: &str = "snapback-control";

/// Something that differs from the record, for the caller to tell.
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
    /// Its command line, `argv[0]` included, our control socket not.
    pub argv: Vec<String>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Variables to set on top of our own environment.
    pub env: Vec<(String, String)>,
    /// The control socket that the caller asked for, absolute.
    pub qmp: Option<PathBuf>,
    /// All Unix sockets on which QEMU will listen, absolute.
    pub sockets: Vec<PathBuf>,
    /// Whether the guest waits to be told to run.
    pub paused: bool,
    /// What differs from the record.
    pub notes: Vec<Note>,
    /// Names of the blocks that it maps from a file.
    pub mapped: Vec<String>,
    /// The overlays that starting it makes, one for each captured disk.
    pub overlays: Vec<Overlay>,
    /// Descriptors to pass on, under the numbers they have here.
    pub(in crate::guest) inherit: Vec<OwnedFd>,
}

impl StartPlan {
    /// Makes the overlays that the plan speaks of.
    pub(in crate::guest) fn make_overlays(&mut self) -> Result<Overlays, GuestError> {
        let StartPlan { overlays, inherit, argv, .. } = self;
        Overlays::make(overlays, |fd, set| {
            argv.extend(["-add-fd".into(), format!("fd={},set={set}", fd.as_raw_fd())]);
            inherit.push(fd);
        })
    }

    /// Has QEMU inherit a descriptor. Gives its number there, as in
    /// `migrate-incoming fd:NUMBER`.
    pub fn inherit(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.inherit.push(fd);
        number
    }
}
