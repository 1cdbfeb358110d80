//! By which way pages go, and how the direct one is opened.

use std::sync::Arc;
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use super::feed::{FeedError, FeedEvent, Filling, LastWord, PING_LOADED, PING_PROBED};
use crate::cancel::Cancellation;
use crate::memory::{FaultHandler, FaultReport, Pager};
use crate::page::BlockId;
use crate::transport::DirectTransport;
use crate::transport::proof::{AttachError, Locator};
use crate::wire::ping;

/// By which way pages reach the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Straight into memory by QEMU's userfaultfd where that can be had, else by the
    /// socket.
    #[default]
    Auto,
    /// By userfaultfd for every block, or not at all.
    Uffd,
    /// By QEMU's postcopy socket.
    Socket,
    /// By a private mapping of a flat image, which QEMU makes itself.
    Map,
}

impl Filling {
    /// Opens the direct way where it is wanted and can be had, and says which way is
    /// taken. Returns whether the device state is in by then; nothing when the feed has
    /// ended.
    pub fn open_the_way(&mut self) -> Result<Option<bool>, FeedError> {
        if self.options.way == Way::Socket {
            self.tell(Way::Socket, "as was asked for");
            return Ok(Some(false));
        }
        // Not while QEMU loads the device state: the guest is to run as soon as it can, and
        // has what it asks for first on its way by the socket.
        if !self.wait_pong(PING_LOADED) {
            return Ok(None);
        }
        let locator = self
            .options
            .pid
            .ok_or(AttachError::Unseen)
            .and_then(|pid| Locator::attach(pid, self.memory.blocks()));
        let locator = match locator {
            Ok(locator) => locator,
            Err(reason) if self.options.way == Way::Uffd => return Err(reason.into()),
            Err(reason) => {
                self.tell(Way::Socket, &reason.to_string());
                return Ok(Some(true));
            }
        };
        let Some(addresses) = self.find_blocks(&locator)? else { return Ok(None) };
        let blocks = self.memory.blocks().iter().zip(&addresses).enumerate();
        let unproven: Vec<_> = blocks
            .filter(|(index, (_, address))| address.is_none() && self.needs_address(*index))
            .map(|(_, (block, _))| block.name.as_str())
            .collect();
        self.takes_faults = unproven.is_empty();
        match (unproven.is_empty(), self.options.way) {
            (true, _) => self.tell(Way::Uffd, "every block's address is proven"),
            (false, Way::Uffd) => return Err(FeedError::Unproven(unproven.join(", "))),
            (false, _) => {
                let reason = format!("by socket, as not found: {}", unproven.join(", "));
                self.tell(Way::Uffd, &reason);
            }
        }
        // SAFETY: each address has been proven to be the block's, in the process whose
        // userfaultfd this is. QEMU has registered all its RAMBlocks with it when it
        // answered the PING behind LISTEN, and the kernel refuses to install anything
        // elsewhere (ENOENT, UFFDIO_COPY(2const)).
        let direct = unsafe { DirectTransport::new(Arc::new(locator.uffd), addresses) };
        self.route.open_direct(direct);
        Ok(Some(true))
    }

    /// The blocks' addresses, as far as they can be proven; nothing when the feed has ended.
    fn find_blocks(&self, locator: &Locator) -> Result<Option<Vec<Option<u64>>>, FeedError> {
        let mut server = Pager::new(Arc::clone(&self.memory))?;
        let mut addresses = vec![None; self.memory.blocks().len()];
        let all = 0..addresses.len();
        if !self.prove(locator, &mut server, all.clone(), &mut addresses)? {
            return Ok(None);
        }
        // Blocks that look alike where they were probed (the ROMs of two network cards,
        // zeros) were each found in the other's place as well. Alone, each is found in its
        // own: there the other's page lies already.
        for index in all {
            if addresses[index].is_none()
                && self.needs_address(index)
                && !self.prove(locator, &mut server, index..index + 1, &mut addresses)?
            {
                return Ok(None);
            }
        }
        Ok(Some(addresses))
    }

    /// Sends a page of each of these blocks by the socket, and notes the addresses that
    /// are proven when they have arrived. False when the feed has ended.
    fn prove(
        &self,
        locator: &Locator,
        server: &mut Pager,
        indices: std::ops::Range<usize>,
        addresses: &mut [Option<u64>],
    ) -> Result<bool, FeedError> {
        let blocks = self.memory.blocks();
        let mut probes = Vec::new();
        for index in indices {
            server.probe(BlockId(index as u16), |offset, content| {
                let probe = locator.probe(&blocks[index], offset, content);
                probes.extend(probe.map(|probe| (index, probe)));
            })?;
        }
        self.route.first().send(&ping(PING_PROBED)).map_err(|_| FeedError::HungUp)?;
        if !self.wait_pong(PING_PROBED) {
            return Ok(false);
        }
        locator.locate(blocks, &probes, addresses);
        Ok(true)
    }

    /// Whether anything of the block is left to be installed.
    fn needs_address(&self, index: usize) -> bool {
        !self.memory.is_settled(BlockId(index as u16))
    }

    fn tell(&self, way: Way, reason: &str) {
        let _ = self.events.send(FeedEvent::Placing { way, reason: reason.to_owned() });
    }

    /// Starts to take faults from userfaultfd, beside QEMU's own thread. Only when every
    /// block's address is known: an event that we take reaches nobody else.
    pub fn start_intake(&self) -> Result<Option<RunningIntake>, FeedError> {
        let Some(direct) = self.route.direct().filter(|_| self.takes_faults) else {
            return Ok(None);
        };
        let cancel = Cancellation::new();
        let intake = FaultHandler::new(Arc::clone(&self.memory), direct, &cancel)?;
        let intake = intake.recording(self.options.record);
        let events = self.events.clone();
        let last = LastWord { events: events.clone(), doing: "answer the guest's faults" };
        let run = move || {
            let _last = last;
            match intake.run() {
                Ok(report) => Some(report),
                Err(error) => {
                    let _ = events.send(FeedEvent::Failed(error.into()));
                    None
                }
            }
        };
        let thread = std::thread::Builder::new().name("intake".into()).spawn(run);
        let thread = Some(thread.map_err(FeedError::Thread)?);
        Ok(Some(RunningIntake { cancel, thread }))
    }
}

/// An intake's thread, ended with this value.
pub(super) struct RunningIntake {
    cancel: Cancellation,
    thread: Option<JoinHandle<Option<FaultReport>>>,
}

impl RunningIntake {
    /// Ends it, and returns what it has seen.
    pub fn finish(mut self) -> Option<FaultReport> {
        self.cancel.request();
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for RunningIntake {
    fn drop(&mut self) {
        self.cancel.request();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
