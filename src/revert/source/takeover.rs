//! A source that takes the place of one whose process has died.
//!
//! What its predecessor left is sound at every moment at which it may have been killed:
//!
//! - A page that was claimed and not present has been installed or not. Installed directly, the
//!   kernel refuses it a second time (EEXIST). Sent by socket, it has arrived once QEMU has
//!   answered a PING behind it, and the page map tells whether it did ([`doubts`](super::doubts)).
//! - A section in the stream is whole or not there: it is queued in one step
//!   (`transport::SocketTransport`).
//! - A request on the return path leaves the socket only when it has been answered
//!   ([`Unread`](super::unread::Unread)), so it is read again.
//! - A fault that was read from userfaultfd is lost. Waking the thread makes it fault again.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::direct::FaultThreads;
use super::doubts::{Doubt, TRIES, unsettled};
use super::event::PostcopyEvent;
use super::pings;
use super::transports::Transports;
use crate::host::procfs::AddressSpace;
use crate::host::uffd::Uffd;
use crate::keeper::Ledger;
use crate::page::{BlockId, PAGE_SIZE, Run};
use crate::revert::error::PostcopyError;
use crate::revert::options::Placement;
use crate::transport::DirectTransport;
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
        mut self,
        userfaultfd: Option<OwnedFd>,
    ) -> Result<Option<Option<FaultThreads>>, PostcopyError> {
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
                let all =
                    blocks.into_iter().all(|index| self.address(BlockId(index as u16)).is_some());
                self.transports.serve_faults(all)?
            }
            None => None,
        };
        let _ = self.transports.events.send(PostcopyEvent::TakenOver);
        if self.transports.route.direct().is_some() {
            self.transports.tell(Placement::Uffd, "taken over");
        }

        // A QEMU that has hung up has all memory, or has died: its return path tells which.
        if !self.is_answered() {
            return Ok(None);
        }
        if self.transports.route.direct().is_none() {
            let Some(takes_faults) = self.transports.open_direct()? else { return Ok(None) };
            faults = self.transports.serve_faults(takes_faults)?;
        }
        if !self.settle()? {
            return Ok(None);
        }
        self.transports.memory.ask_again()?;
        Ok(Some(faults))
    }

    /// Waits until QEMU has taken in all that was sent; false when the source has ended.
    fn is_answered(&mut self) -> bool {
        let value = pings::TAKEN_OVER + self.ledger.restarts() as u32;
        let sent = self.transports.route.first().send(&ping(value)).is_ok();
        sent && self.transports.pongs.taken_in(value)
    }

    /// Settles the pages that the predecessor left unfinished. False when the source has ended.
    fn settle(&mut self) -> Result<bool, PostcopyError> {
        let memory = Arc::clone(&self.transports.memory);
        let unfinished = std::mem::take(&mut self.unfinished);
        let (direct, by_socket): (Vec<_>, Vec<_>) =
            unfinished.into_iter().partition(|page| self.address(page.block).is_some());
        // What is there already is not installed again.
        direct.into_iter().try_for_each(|page| memory.settle(page, false))?;
        self.settle_by_socket(by_socket)
    }

    /// Settles pages of blocks that keep to the socket.
    fn settle_by_socket(&mut self, pages: Vec<Run>) -> Result<bool, PostcopyError> {
        let memory = Arc::clone(&self.transports.memory);
        let block = |page: &Run| &memory.blocks()[page.block.index()];
        if let Some(huge) = pages.iter().find(|page| block(page).page_size != PAGE_SIZE as u64) {
            return Err(unsettled(block(huge), ": its pages are huge".into()));
        }
        let Some(first) = pages.first() else { return Ok(true) };
        let space = self.address_space();
        let space = space.map_err(|error| unsettled(block(first), format!(": {error}")))?;
        let ids = (0..memory.blocks().len()).map(|index| BlockId(index as u16));
        let known: Vec<u64> = ids.filter_map(|id| self.address(id)).collect();
        let doubt = |page| Doubt::new(page, &memory, |id| self.address(id));
        let mut doubts: Vec<Doubt> = pages.into_iter().map(doubt).collect();
        for _ in 0..TRIES {
            if doubts.is_empty() {
                return Ok(true);
            }
            doubts.iter_mut().for_each(|doubt| doubt.before_ping(&memory));
            if !self.is_answered() {
                return Ok(false);
            }
            let mut left = Vec::new();
            for doubt in doubts {
                match doubt.has_arrived(&memory, &space, &known)? {
                    Some(arrived) => memory.settle(doubt.page, arrived)?,
                    None => left.push(doubt),
                }
            }
            doubts = left;
        }
        match doubts.first() {
            Some(doubt) => Err(unsettled(block(&doubt.page), ": others look alike".into())),
            None => Ok(true),
        }
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

    /// Where the direct transport finds this block.
    fn address(&self, block: BlockId) -> Option<u64> {
        self.transports.route.direct()?.address(block)
    }
}
