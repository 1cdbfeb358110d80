//! The thread that sends: opening, device state, memory, closing.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::direct::{FaultThread, Opened, Opener, SourceRoute};
use super::event::{LastWord, PostcopyEvent};
use super::pings::{self, Pongs};
use crate::memory::{FillOptions, Memory, MemoryError, Pace, prefetch, preload};
use crate::page::{Block, PAGE_SIZE, Page};
use crate::revert::error::PostcopyError;
use crate::revert::options::Placement;
use crate::transport::TransportError;
use crate::wire::{Opening, closing, package};

/// Memory of the working set that is sent ahead, by the socket, in bytes: what QEMU takes
/// in while it loads the device state. Requests that come meanwhile wait behind what
/// the socket holds of it.
const HEAD_BYTES: usize = 1 << 20;

/// The device state and what goes with it, made ready ahead of time.
pub(in crate::revert) struct DeviceState {
    opening: Vec<u8>,
    package: Vec<u8>,
}

impl DeviceState {
    /// Puts together what is sent before the guest runs. `config` and `devices` are
    /// the saved stream's.
    pub fn new(config: &[u8], devices: &[u8], blocks: &[Block]) -> DeviceState {
        // No other is let in: `host::check_page_size`.
        let host_page_size = PAGE_SIZE as u64;
        let opening = Opening { config, blocks, ping: pings::OPENED, host_page_size };
        DeviceState {
            opening: opening.bytes(),
            package: package(devices, pings::LISTENING, pings::LOADED),
        }
    }
}

/// To whom a source sends, and how.
#[derive(Debug, Clone, Default)]
pub(in crate::revert) struct PostcopyOptions {
    /// By which transport pages go.
    pub placement: Placement,
    /// QEMU's process id, if it is known.
    pub pid: Option<i32>,
    /// How memory is filled.
    pub fill: FillOptions,
    /// Whether the working set goes ahead of the guest's first instruction;
    /// [`PostcopyEvent::Preloaded`] tells when it is in place.
    pub preload: bool,
    /// Whether nothing is filled before
    /// [`release`](super::PostcopySource::release).
    pub standby: bool,
    /// How long demands are recorded: those by the return path from the start of the
    /// source on, those by userfaultfd from its release on.
    pub record: Duration,
}

pub(super) struct Sending {
    pub device_state: DeviceState,
    pub options: PostcopyOptions,
    pub route: Arc<SourceRoute>,
    pub memory: Arc<Memory>,
    pub pace: Arc<Pace>,
    pub pongs: Pongs,
    /// Says when memory may be filled; closed when the source ends.
    pub released: mpsc::Receiver<()>,
    pub events: UnboundedSender<PostcopyEvent>,
}

impl Sending {
    pub fn run(mut self) {
        let events = self.events.clone();
        let _last = LastWord { events: events.clone(), doing: "fill memory" };
        if let Err(error) = self.send() {
            let _ = events.send(PostcopyEvent::Failed(error));
        }
    }

    /// Sends everything. It returns early when the source has ended: whoever ended it, or
    /// the thread that reads the return path, has told why.
    fn send(&mut self) -> Result<(), PostcopyError> {
        let opening = |e| PostcopyError::Opening(io_error(e));
        self.route.first().send(&self.device_state.opening).map_err(opening)?;
        self.route.first().send(&self.device_state.package).map_err(opening)?;
        // What the guest is going to ask for first leaves at once, behind the device state: the
        // guest runs before the direct transport is open. Like all that the guest waits for,
        // it is not held back by a rate.
        match preload(&self.memory, self.head(), &self.pace) {
            // QEMU has refused the device state; the thread at the return path tells of it.
            Err(MemoryError::Install { source: TransportError::Gone(_), .. }) => return Ok(()),
            sent => sent?,
        }
        let Some(takes_faults) = self.open_direct()? else { return Ok(()) };
        if self.released.recv().is_err() {
            return Ok(());
        }
        let faults = match self.route.direct().filter(|_| takes_faults) {
            Some(direct) => {
                let (record, events) = (self.options.record, self.events.clone());
                Some(FaultThread::start(&self.memory, direct, record, events)?)
            }
            None => None,
        };
        if self.options.preload {
            preload(&self.memory, &self.options.fill.working_set, &self.pace)?;
            let _ = self.events.send(PostcopyEvent::Preloaded);
        }
        // Until the guest runs, what it asks for has the transport to itself.
        if self.pongs.loaded() {
            self.fill()?;
        }
        if let Some(faults) = faults {
            let _ = self.events.send(PostcopyEvent::Faults(faults.finish()));
        }
        match self.memory.wait_complete(Duration::ZERO) {
            true => self.route.first().send(&closing()).map_err(|_| PostcopyError::HungUp),
            false => Ok(()),
        }
    }

    /// The working set's first pages, as many as make up [`HEAD_BYTES`] with what is
    /// stored beside them; none for a guest in standby, which has time to wait for the
    /// direct transport.
    fn head(&self) -> &[Page] {
        if self.options.standby {
            return &[];
        }
        let set = &self.options.fill.working_set;
        let chunk_bytes = self.memory.chunk_pages() * PAGE_SIZE;
        &set[..set.len().min(HEAD_BYTES / chunk_bytes)]
    }

    /// Opens the direct transport where it is wanted and can be had, and tells which
    /// transport is taken. Returns whether faults may be taken from userfaultfd: only when
    /// every block's address is known. Nothing when the source has ended.
    fn open_direct(&mut self) -> Result<Option<bool>, PostcopyError> {
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
        self.route.open_direct(direct);
        Ok(Some(unproven.is_empty()))
    }

    fn tell(&self, placement: Placement, reason: &str) {
        let reason = reason.to_owned();
        let _ = self.events.send(PostcopyEvent::Placing { placement, reason });
    }

    /// Brings all memory.
    fn fill(&self) -> Result<(), PostcopyError> {
        prefetch(&self.memory, &self.options.fill, &self.pace)?;
        // What faults have claimed is still on its way.
        while !self.memory.wait_complete(Duration::from_millis(100)) && !self.pace.is_stopped() {}
        Ok(())
    }
}

fn io_error(error: TransportError) -> std::io::Error {
    match error {
        TransportError::Gone(error) | TransportError::Io(error) => error,
    }
}
