//! A source that takes the place of one whose process has died.
//!
//! What its predecessor left is sound at every moment at which it may have been killed:
//!
//! - A page that was claimed and not present has been installed or not. Installed directly, the
//!   kernel refuses it a second time (EEXIST). Sent by socket, it has arrived once QEMU has
//!   answered a PING behind it, and the page map tells whether it did.
//! - A section in the stream is whole or not there: it is queued in one step
//!   (`transport::SocketTransport`).
//! - A request on the return path leaves the socket only when it has been answered
//!   ([`Unread`](super::unread::Unread)), so it is read again.
//! - A fault that was read from userfaultfd is lost. Waking the thread makes it fault again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::direct::FaultThread;
use super::event::PostcopyEvent;
use super::pings;
use super::transports::Transports;
use crate::host::procfs::AddressSpace;
use crate::host::uffd::Uffd;
use crate::keeper::Ledger;
use crate::memory::MemoryError;
use crate::page::{Block, BlockId, PAGE_SIZE, Run};
use crate::revert::error::PostcopyError;
use crate::revert::options::Placement;
use crate::transport::DirectTransport;
use crate::transport::proof::Candidates;
use crate::wire::ping;

/// What goes on in the place of a source that has died.
pub(super) struct TakeOver<'a> {
    pub transports: &'a mut Transports,
    pub ledger: &'a Ledger,
    /// The pages that the predecessor had claimed and not installed, for all it could say.
    pub unfinished: Vec<Run>,
}

impl TakeOver<'_> {
    /// Serves faults again and settles what the predecessor left unfinished. Returns the
    /// thread that takes faults, if there is one; nothing when the source has ended.
    pub fn run(
        self,
        userfaultfd: Option<OwnedFd>,
    ) -> Result<Option<Option<FaultThread>>, PostcopyError> {
        if self.ledger.is_torn() {
            return Err(PostcopyError::Torn);
        }
        let direct = userfaultfd.zip(self.ledger.direct());
        let mut faults = match direct {
            Some((userfaultfd, addresses)) => {
                let uffd = Arc::new(Uffd::from_fd(userfaultfd));
                // SAFETY: the predecessor has proven each address to be the block's in the
                // process whose userfaultfd this is, before it noted them in the ledger.
                let direct = unsafe { DirectTransport::new(uffd, addresses) };
                self.transports.route.open_direct(direct);
                let blocks = 0..self.transports.memory.blocks().len();
                let all = blocks.into_iter().all(|index| self.is_direct(BlockId(index as u16)));
                self.serve_faults(all)?
            }
            None => None,
        };
        let _ = self.transports.events.send(PostcopyEvent::TakenOver);
        if self.transports.route.direct().is_some() {
            self.transports.tell(Placement::Uffd, "taken over");
        }

        let value = pings::TAKEN_OVER + self.ledger.restarts() as u32;
        // A QEMU that has hung up has all memory, or has died: its return path tells which.
        let sent = self.transports.route.first().send(&ping(value)).is_ok();
        if !sent || !self.transports.pongs.taken_in(value) {
            return Ok(None);
        }
        if self.transports.route.direct().is_none() {
            let Some(takes_faults) = self.transports.open_direct()? else { return Ok(None) };
            faults = self.serve_faults(takes_faults)?;
        }
        self.settle()?;
        Ok(Some(faults))
    }

    /// Wakes whoever waits for a fault that the predecessor had read, and takes faults itself
    /// where it may.
    fn serve_faults(&self, takes_faults: bool) -> Result<Option<FaultThread>, PostcopyError> {
        let Some(direct) = self.transports.route.direct() else { return Ok(None) };
        let faults = match takes_faults {
            true => self.transports.take_faults()?,
            false => None,
        };
        for (index, block) in self.transports.memory.blocks().iter().enumerate() {
            let Some(address) = direct.address(BlockId(index as u16)) else { continue };
            let whole = block.len.next_multiple_of(block.page_size);
            let woken = direct.uffd().wake(address, whole);
            woken.map_err(|error| MemoryError::FaultHandler(error.into()))?;
        }
        Ok(faults)
    }

    /// Settles the pages that the predecessor left unfinished. QEMU has taken in all that was
    /// sent.
    fn settle(&self) -> Result<(), PostcopyError> {
        let memory = &self.transports.memory;
        for of_block in self.unfinished.chunk_by(|one, other| one.block == other.block) {
            let block = of_block[0].block;
            if self.is_direct(block) {
                // What is there already is not installed again.
                of_block.iter().try_for_each(|page| memory.settle(*page, false))?;
                continue;
            }
            let of: &Block = &memory.blocks()[block.index()];
            let unsettled = |why: String| PostcopyError::Unsettled { block: of.name.clone(), why };
            if of.page_size != PAGE_SIZE as u64 {
                return Err(unsettled(": its pages are huge".into()));
            }
            let space = self.address_space();
            let candidates = space.and_then(|space| Candidates::find(&space, of));
            let candidates = candidates.map_err(|error| unsettled(format!(": {error}")))?;
            for page in of_block {
                let arrived = candidates.is_present(page.offset());
                let arrived =
                    arrived.ok_or_else(|| unsettled(": it may lie in several places".into()))?;
                memory.settle(*page, arrived)?;
            }
        }
        Ok(())
    }

    /// QEMU's memory as /proc shows it: as the predecessor has opened it, where it was in a
    /// sandbox.
    fn address_space(&self) -> io::Result<Arc<AddressSpace>> {
        let options = &self.transports.options;
        match (&options.space, options.pid) {
            (Some(space), _) => Ok(Arc::clone(space)),
            (None, Some(pid)) => AddressSpace::open(pid).map(Arc::new),
            (None, None) => Err(io::Error::other("QEMU's process is not known")),
        }
    }

    /// Whether the direct transport leads to this block.
    fn is_direct(&self, block: BlockId) -> bool {
        self.transports.route.direct().is_some_and(|direct| direct.address(block).is_some())
    }
}
