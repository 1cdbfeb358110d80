//! How the direct transport is opened: QEMU's userfaultfd is copied, and where each block
//! lies in QEMU's memory is proven by a page that arrives there.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::event::{LastWord, PostcopyEvent};
use super::pings::{PROBED, Pongs};
use crate::cancel::Cancellation;
use crate::host::uffd::UffdError;
use crate::memory::{FaultHandler, FaultReport, Memory, Pager};
use crate::page::{Block, BlockId};
use crate::revert::error::PostcopyError;
use crate::transport::proof::{AttachError, Locator};
use crate::transport::{DirectTransport, Route, SocketTransport};
use crate::wire::ping;

/// The route of a source's pages: the socket, and beside it the direct transport.
pub(super) type SourceRoute = Route<SocketTransport<UnixStream>>;

/// What came of opening it.
pub(super) enum Opened {
    /// It leads to every block but those named, whose place was not found.
    Found { direct: DirectTransport, unproven: Vec<String> },
    /// It can't be had.
    Refused(AttachError),
    /// The source has ended meanwhile.
    Ended,
}

/// Wakes whoever waits for memory that the direct transport leads to: each faults again.
pub(super) fn wake_all(route: &SourceRoute, blocks: &[Block]) -> Result<(), UffdError> {
    let Some(direct) = route.direct() else { return Ok(()) };
    for (index, block) in blocks.iter().enumerate() {
        if let Some(address) = direct.address(BlockId(index as u16)) {
            direct.uffd().wake(address, block.len.next_multiple_of(block.page_size))?;
        }
    }
    Ok(())
}

/// What opening it needs of the source.
pub(super) struct Opener<'a> {
    pub memory: &'a Arc<Memory>,
    pub route: &'a SourceRoute,
    pub pongs: &'a mut Pongs,
}

impl Opener<'_> {
    /// Opens it. QEMU, process `pid` where that is known, must have loaded the device state.
    pub fn open(mut self, pid: Option<i32>) -> Result<Opened, PostcopyError> {
        let blocks = self.memory.blocks();
        let locator = pid.ok_or(AttachError::Unseen).and_then(|pid| Locator::attach(pid, blocks));
        let locator = match locator {
            Ok(locator) => locator,
            Err(reason) => return Ok(Opened::Refused(reason)),
        };
        let Some(addresses) = self.find_blocks(&locator)? else { return Ok(Opened::Ended) };
        let unproven = blocks.iter().zip(&addresses).enumerate();
        let unproven = unproven
            .filter(|(index, (_, address))| address.is_none() && self.needs_address(*index))
            .map(|(_, (block, _))| block.name.clone())
            .collect();
        // SAFETY: each address has been proven to be the block's, in the process whose
        // userfaultfd this is. QEMU has registered all its RAMBlocks with it when it
        // answered the PING behind LISTEN, and the kernel refuses to install anything
        // elsewhere (ENOENT, UFFDIO_COPY(2const)).
        let direct = unsafe { DirectTransport::new(Arc::new(locator.uffd), addresses) };
        Ok(Opened::Found { direct, unproven })
    }

    /// The blocks' addresses, as far as they can be proven; nothing when the source has
    /// ended.
    fn find_blocks(
        &mut self,
        locator: &Locator,
    ) -> Result<Option<Vec<Option<u64>>>, PostcopyError> {
        let mut server = Pager::new(Arc::clone(self.memory))?;
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
    /// are proven once they have arrived. False when the source has ended.
    fn prove(
        &mut self,
        locator: &Locator,
        server: &mut Pager,
        indices: Range<usize>,
        addresses: &mut [Option<u64>],
    ) -> Result<bool, PostcopyError> {
        let blocks = self.memory.blocks();
        let mut probes = Vec::new();
        for index in indices {
            server.probe(BlockId(index as u16), |offset, content| {
                let probe = locator.probe(&blocks[index], offset, content);
                probes.extend(probe.map(|probe| (index, probe)));
            })?;
        }
        self.route.first().send(&ping(PROBED)).map_err(|_| PostcopyError::HungUp)?;
        if !self.pongs.probed() {
            return Ok(false);
        }
        locator.locate(blocks, &probes, addresses);
        Ok(true)
    }

    /// Whether anything of the block is left to be installed.
    fn needs_address(&self, index: usize) -> bool {
        !self.memory.is_settled(BlockId(index as u16))
    }
}

/// Threads that take faults where memory comes from afar: one that waits for its bytes holds up no
/// other.
const FAR_HANDLERS: usize = 8;

/// The threads that take faults from userfaultfd, beside QEMU's own: one, or several where memory comes
/// from afar. They must be started only where the direct transport leads to every block: QEMU does not
/// hear of an event that we take.
pub(super) struct FaultThreads {
    cancel: Cancellation,
    threads: Vec<JoinHandle<Option<FaultReport>>>,
}

impl FaultThreads {
    /// Starts to take faults, and records them for so long.
    pub fn start(
        memory: &Arc<Memory>,
        direct: &DirectTransport,
        record: Duration,
        events: UnboundedSender<PostcopyEvent>,
    ) -> Result<FaultThreads, PostcopyError> {
        let handlers = if memory.is_far() { FAR_HANDLERS } else { 1 };
        let mut started = FaultThreads { cancel: Cancellation::new(), threads: Vec::new() };
        for _ in 0..handlers {
            let handler = FaultHandler::new(Arc::clone(memory), direct, &started.cancel)?;
            let handler = handler.recording(record);
            let events = events.clone();
            let last = LastWord { events: events.clone(), doing: "answer the guest's faults" };
            let run = move || {
                let _last = last;
                match handler.run() {
                    Ok(report) => Some(report),
                    Err(error) => {
                        let _ = events.send(PostcopyEvent::Failed(error.into()));
                        None
                    }
                }
            };
            let thread = std::thread::Builder::new().name("fault handler".into()).spawn(run);
            started.threads.push(thread.map_err(PostcopyError::Thread)?);
        }
        Ok(started)
    }

    /// Ends them, and returns what they have seen.
    pub fn finish(mut self) -> Option<FaultReport> {
        self.cancel.request();
        let reports = self.threads.drain(..).filter_map(|thread| thread.join().ok().flatten());
        reports.reduce(FaultReport::merged)
    }
}

impl Drop for FaultThreads {
    fn drop(&mut self) {
        self.cancel.request();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
