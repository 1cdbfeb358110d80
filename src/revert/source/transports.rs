//! The transports of a source: the socket, and the direct one once it is open.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::direct::{FaultThreads, Opened, Opener, SourceRoute, wake_all};
use super::event::PostcopyEvent;
use super::pings::Pongs;
use crate::host::procfs::AddressSpace;
use crate::memory::{FillOptions, Memory, MemoryError};
use crate::revert::error::PostcopyError;
use crate::revert::kept::Kept;
use crate::revert::options::{Placement, Preload};

/// To whom a source sends, and how.
#[derive(Debug, Clone, Default)]
pub(in crate::revert) struct PostcopyOptions {
    /// By which transport pages go.
    pub placement: Placement,
    /// QEMU's process id, if it is known.
    pub pid: Option<i32>,
    /// How memory is filled.
    pub fill: FillOptions,
    /// What goes ahead of the guest's first instruction; [`PostcopyEvent::Preloaded`] tells when
    /// it is in place.
    pub preload: Preload,
    /// Whether nothing else is filled before
    /// [`release`](super::PostcopySource::release).
    pub standby: bool,
    /// How long demands are recorded: those by the return path from the start of the
    /// source on, those by userfaultfd from its release on.
    pub record: Duration,
    /// QEMU's memory as /proc shows it, where this process may not open it.
    pub space: Option<Arc<AddressSpace>>,
    /// Whether memory that can't be read ends the source. Else it is told, and tried again from
    /// [`repair`](super::PostcopySource::repair) on.
    pub fail_on_damage: bool,
    /// What a successor needs is noted there.
    pub kept: Option<Kept>,
}

/// What memory goes by, and what opening the direct transport takes.
pub(super) struct Transports {
    pub options: PostcopyOptions,
    pub route: Arc<SourceRoute>,
    pub memory: Arc<Memory>,
    pub pongs: Pongs,
    pub events: UnboundedSender<PostcopyEvent>,
}

impl Transports {
    /// Opens the direct transport where it is wanted and can be had, and tells which
    /// transport is taken. Returns whether faults may be taken from userfaultfd: only when
    /// every block's address is known. Nothing when the source has ended.
    pub fn open_direct(&mut self) -> Result<Option<bool>, PostcopyError> {
        let wanted = self.options.placement;
        if wanted == Placement::Socket {
            self.tell(Placement::Socket, "as was asked for");
            return Ok(Some(false));
        }
        // Not while QEMU loads the device state: the guest is to run as soon as it can, and
        // has what it asks for first on its way by the socket.
        if !self.pongs.loaded() {
            return Ok(None);
        }
        let opener = Opener { memory: &self.memory, route: &self.route, pongs: &mut self.pongs };
        let (direct, unproven) = match opener.open(self.options.pid)? {
            Opened::Found { direct, unproven } => (direct, unproven.join(", ")),
            Opened::Refused(reason) if wanted == Placement::Uffd => return Err(reason.into()),
            Opened::Refused(reason) => {
                self.tell(Placement::Socket, &reason.to_string());
                return Ok(Some(false));
            }
            Opened::Ended => return Ok(None),
        };
        match (unproven.is_empty(), wanted) {
            (true, _) => self.tell(Placement::Uffd, "every block's address is proven"),
            (false, Placement::Uffd) => return Err(PostcopyError::Unproven(unproven)),
            (false, _) => {
                self.tell(Placement::Uffd, &format!("by socket, as not found: {unproven}"));
            }
        }
        if let Some(kept) = &self.options.kept {
            kept.hold_direct(direct.uffd().as_fd(), direct.addresses())
                .map_err(PostcopyError::Duplicate)?;
        }
        self.route.open_direct(direct);
        Ok(Some(unproven.is_empty()))
    }

    /// Takes faults from userfaultfd where this may be done, and wakes whoever waits for one
    /// that a process which has died has read.
    pub fn serve_faults(&self, take: bool) -> Result<Option<FaultThreads>, PostcopyError> {
        let faults = match take {
            true => self.take_faults()?,
            false => None,
        };
        let woken = wake_all(&self.route, self.memory.blocks());
        woken.map_err(|error| MemoryError::FaultHandler(error.into()))?;
        Ok(faults)
    }

    pub fn tell(&self, placement: Placement, reason: &str) {
        let reason = reason.to_owned();
        let _ = self.events.send(PostcopyEvent::Placing { placement, reason });
    }

    /// Starts the thread that takes faults from userfaultfd, where the direct transport is open.
    /// It must lead to every block.
    pub fn take_faults(&self) -> Result<Option<FaultThreads>, PostcopyError> {
        let Some(direct) = self.route.direct() else { return Ok(None) };
        let (record, events) = (self.options.record, self.events.clone());
        FaultThreads::start(&self.memory, direct, record, events).map(Some)
    }
}
