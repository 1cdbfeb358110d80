//! Pages straight into memory, by a userfaultfd that this memory is registered with.

use std::sync::{Arc, OnceLock};

use super::{Transport, TransportError};
use crate::host::uffd::{Uffd, UffdError};
use crate::page::{Block, BlockId, PAGE_SIZE, Run};

/// Pages in one call at most: 256 KiB. The rate of copying is within some percent of
/// that of larger calls, and a fault that comes meanwhile waits a quarter as long for
/// the processor.
const STEP_PAGES: u64 = 64;

/// Zero pages in one call at most: 2 MiB, which takes about 12 µs.
const ZERO_STEP_PAGES: u64 = 512;

/// The zeros of a huge page of the usual size, so that a fault allocates nothing.
static ZEROS: [u8; 2 << 20] = [0; 2 << 20];

/// Installs pages by userfaultfd, in this process's memory or in another's.
pub struct DirectTransport {
    uffd: Arc<Uffd>,
    /// Where each block lies, if that is known.
    addresses: Vec<Option<u64>>,
}

impl DirectTransport {
    /// Installs pages by `uffd`. `addresses` says for each block where its first byte
    /// lies, or nothing for a block that is not to be installed this way.
    ///
    /// # Safety
    /// Each address must truly be that block's, in the process whose memory `uffd`
    /// serves, and the block's whole length be registered with it: bytes installed at a
    /// wrong address are memory corrupted in another process.
    pub unsafe fn new(uffd: Arc<Uffd>, addresses: Vec<Option<u64>>) -> DirectTransport {
        DirectTransport { uffd, addresses }
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> &Arc<Uffd> {
        &self.uffd
    }

    /// Where the block's first byte lies.
    pub fn address(&self, block: BlockId) -> Option<u64> {
        self.addresses.get(block.index()).copied().flatten()
    }

    fn at(&self, run: Run) -> Result<u64, TransportError> {
        let unknown =
            || TransportError::Io(std::io::Error::other("the block's address is not known"));
        Ok(self.address(run.block).ok_or_else(unknown)? + run.offset())
    }
}

impl Transport for DirectTransport {
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError> {
        let at = self.at(run)?;
        // SAFETY: the address is the block's, as `new` was promised, and the run lies
        // within the block; the caller has claimed the run, so that nobody else
        // installs it.
        Ok(unsafe { self.uffd.copy(at, bytes, block.page_size) }?)
    }

    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        if block.page_size != PAGE_SIZE as u64 {
            // There is no zero page of the size of hugetlbfs's.
            return match ZEROS.get(..run.bytes() as usize) {
                Some(zeros) => self.copy(block, run, zeros),
                None => self.copy(block, run, &vec![0; run.bytes() as usize]),
            };
        }
        let at = self.at(run)?;
        // SAFETY: as in `copy`.
        Ok(unsafe { self.uffd.zero(at, run.bytes(), block.page_size) }?)
    }

    fn wake(&self, _block: &Block, run: Run) -> Result<(), TransportError> {
        Ok(self.uffd.wake(self.at(run)?, run.bytes())?)
    }

    fn step_pages(&self, _block: BlockId) -> u64 {
        STEP_PAGES
    }

    fn zero_step_pages(&self, _block: BlockId) -> u64 {
        ZERO_STEP_PAGES
    }
}

impl From<UffdError> for TransportError {
    fn from(error: UffdError) -> TransportError {
        match error {
            UffdError::Gone { source, .. } => TransportError::Gone(source),
            other => TransportError::Io(std::io::Error::other(other)),
        }
    }
}

/// Two ways at once: every block goes by the first until the second is known to lead
/// there. A page that has been claimed goes one way only, so a change of ways in
/// between loses or doubles nothing.
pub struct Route<P> {
    first: P,
    direct: OnceLock<DirectTransport>,
}

impl<P: Transport> Route<P> {
    /// All blocks by `first`, for now.
    pub fn new(first: P) -> Route<P> {
        Route { first, direct: OnceLock::new() }
    }

    /// Opens the direct way, once.
    pub fn open_direct(&self, direct: DirectTransport) {
        // A second opening is ignored: it could only lead to the same places.
        let _ = self.direct.set(direct);
    }

    /// The first way.
    pub fn first(&self) -> &P {
        &self.first
    }

    /// The direct way, once it is open.
    pub fn direct(&self) -> Option<&DirectTransport> {
        self.direct.get()
    }

    fn way(&self, block: BlockId) -> &dyn Transport {
        match self.direct.get() {
            Some(direct) if direct.address(block).is_some() => direct,
            _ => &self.first,
        }
    }
}

impl<P: Transport> Transport for Arc<Route<P>> {
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError> {
        self.way(run.block).copy(block, run, bytes)
    }

    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        self.way(run.block).zero(block, run)
    }

    fn wake(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        self.way(run.block).wake(block, run)
    }

    fn step_pages(&self, block: BlockId) -> u64 {
        self.way(block).step_pages(block)
    }

    fn zero_step_pages(&self, block: BlockId) -> u64 {
        self.way(block).zero_step_pages(block)
    }
}
