//! The thread that sends: opening, device state, memory, closing.

use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::direct::FaultThreads;
use super::event::{LastWord, PostcopyEvent};
use super::pings;
use super::resuming::{Interrupted, take_up};
use super::takeover::TakeOver;
use super::transports::Transports;
use crate::memory::{FillOptions, MemoryError, Pace, prefetch, preload};
use crate::page::{Block, PAGE_SIZE, Page, Run};
use crate::revert::error::PostcopyError;
use crate::revert::options::Preload;
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

/// How a source begins.
pub(in crate::revert) enum Beginning {
    /// With the device state, of which QEMU has nothing yet.
    New(DeviceState),
    /// In the place of one that has died, with the userfaultfd that it had copied, if it had.
    TakenOver(Option<OwnedFd>),
    /// In the place of one of which nothing is left.
    Interrupted(Interrupted),
}

pub(super) struct Sending {
    /// Taken by the thread when it starts.
    pub beginning: Option<Beginning>,
    pub transports: Transports,
    pub pace: Arc<Pace>,
    /// What a predecessor has left unfinished.
    pub unfinished: Vec<Run>,
    /// Says when memory may be filled; closed when the source ends.
    pub released: mpsc::Receiver<()>,
}

impl Sending {
    pub fn run(mut self) {
        let events = self.transports.events.clone();
        let _last = LastWord { events: events.clone(), doing: "fill memory" };
        if let Err(error) = self.send() {
            let _ = events.send(PostcopyEvent::Failed(error));
        }
    }

    /// Sends everything. It returns early when the source has ended: whoever ended it, or
    /// the thread that reads the return path, has told why.
    fn send(&mut self) -> Result<(), PostcopyError> {
        let begun = match self.beginning.take() {
            Some(Beginning::New(state)) => self.open(&state)?,
            Some(Beginning::TakenOver(userfaultfd)) => self.take_over(userfaultfd)?,
            Some(Beginning::Interrupted(found)) => take_up(&mut self.transports, found)?,
            None => None,
        };
        let Some(faults) = begun else { return Ok(()) };
        if !self.transports.options.standby {
            self.preload()?;
        }
        // Until the guest runs, what it asks for has the transport to itself.
        if self.transports.pongs.loaded() {
            self.fill()?;
        }
        if let Some(faults) = faults {
            let _ = self.transports.events.send(PostcopyEvent::Faults(faults.finish()));
        }
        match self.transports.memory.wait_complete(Duration::ZERO) {
            true => {
                self.transports.route.first().send(&closing()).map_err(|_| PostcopyError::HungUp)
            }
            false => Ok(()),
        }
    }

    /// Sends the device state, opens the direct transport and waits until memory may be filled.
    /// Returns the thread that takes faults, if there is one; nothing when the source has ended.
    fn open(&mut self, state: &DeviceState) -> Result<Option<Option<FaultThreads>>, PostcopyError> {
        let opening = |e| PostcopyError::Opening(io_error(e));
        self.transports.route.first().send(&state.opening).map_err(opening)?;
        self.transports.route.first().send(&state.package).map_err(opening)?;
        // What the guest is going to ask for first leaves at once, behind the device state: the
        // guest runs before the direct transport is open. Like all that the guest waits for,
        // it is not held back by a rate.
        match preload(&self.transports.memory, self.head(), &self.pace) {
            // QEMU has refused the device state; the thread at the return path tells of it.
            Err(MemoryError::Install { source: TransportError::Gone(_), .. }) => return Ok(None),
            sent => sent?,
        }
        let Some(takes_faults) = self.transports.open_direct()? else { return Ok(None) };
        if self.transports.options.standby {
            self.preload()?;
        }
        if self.released.recv().is_err() {
            return Ok(None);
        }
        let faults = takes_faults.then(|| self.transports.take_faults()).transpose()?;
        Ok(Some(faults.flatten()))
    }

    /// Goes on where a source has died. Returns what [`open`](Sending::open) does.
    fn take_over(
        &mut self,
        userfaultfd: Option<OwnedFd>,
    ) -> Result<Option<Option<FaultThreads>>, PostcopyError> {
        let Some(kept) = self.transports.options.kept.clone() else { return Ok(None) };
        let unfinished = std::mem::take(&mut self.unfinished);
        TakeOver { transports: &mut self.transports, ledger: &kept.ledger, unfinished }
            .run(userfaultfd)
    }

    /// The working set's first pages, as many as make up [`HEAD_BYTES`] with what is
    /// stored beside them; none for a guest in standby, which has time to wait for the
    /// direct transport.
    fn head(&self) -> &[Page] {
        if self.transports.options.standby {
            return &[];
        }
        let set = &self.transports.options.fill.working_set;
        let chunk_bytes = self.transports.memory.chunk_pages() * PAGE_SIZE;
        &set[..set.len().min(HEAD_BYTES / chunk_bytes)]
    }

    /// Brings what is to be in place ahead of the guest's first instruction.
    fn preload(&self) -> Result<(), PostcopyError> {
        let Transports { options, memory, events, .. } = &self.transports;
        match options.preload {
            Preload::Nothing => return Ok(()),
            Preload::WorkingSet => preload(memory, &options.fill.working_set, &self.pace)?,
            Preload::All => {
                // Nobody asks for anything: there is nothing to wait for, or to give way to.
                let fill = FillOptions { hold: None, delay: None, ..options.fill.clone() };
                // What can't be read has been told, and is tried again.
                let _missing = prefetch(memory, &fill, &self.pace)?;
            }
        }
        let _ = events.send(PostcopyEvent::Preloaded);
        Ok(())
    }

    /// Brings all memory.
    fn fill(&self) -> Result<(), PostcopyError> {
        let options = &self.transports.options.fill;
        let missing = prefetch(&self.transports.memory, options, &self.pace)?;
        if missing > 0 {
            let _ = self.transports.events.send(PostcopyEvent::Filled);
        }
        // What faults have claimed is still on its way.
        while !self.transports.memory.wait_complete(Duration::from_millis(100))
            && !self.pace.is_stopped()
        {}
        Ok(())
    }
}

fn io_error(error: TransportError) -> std::io::Error {
    match error {
        TransportError::Gone(error) | TransportError::Io(error) => error,
    }
}
