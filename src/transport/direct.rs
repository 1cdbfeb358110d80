//! Pages installed directly in memory, by the userfaultfd that it is registered with.

use std::sync::{Arc, LazyLock, OnceLock};

use super::{Transport, TransportError};
use crate::host::uffd::{Uffd, UffdError};
use crate::page::{Block, BlockId, PAGE_SIZE, Run};

/// Pages in one call at most: 256 KiB. Copying is within a few percent as fast as in calls of
/// 1 MiB, and a fault that comes meanwhile waits a quarter as long for the processor.
const STEP_PAGES: u64 = 64;

/// Zero pages in one call at most, and at least to be left out: 2 MiB, a huge page, which takes
/// about 12 µs.
const ZERO_STEP_PAGES: u64 = 512;

/// A huge page of the usual size, so that a fault allocates nothing. It is memory of the kernel's
/// page of zeros; as a constant it would be a tenth of the program.
static ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; 2 << 20]);

/// Installs pages by userfaultfd, in this process's memory or in another's.
pub struct DirectTransport {
    uffd: Arc<Uffd>,
    /// The address of each block's first byte, if it is known.
    addresses: Vec<Option<u64>>,
}

impl DirectTransport {
    /// Installs pages by `uffd`. `addresses` holds the address of each block's first byte, or
    /// nothing for a block that this transport doesn't serve.
    ///
    /// # Safety
    /// Each address must be that block's in the process whose memory `uffd` serves, and the
    /// whole block must be registered with it: bytes installed at a wrong address corrupt the
    /// memory of that process.
    pub unsafe fn new(uffd: Arc<Uffd>, addresses: Vec<Option<u64>>) -> DirectTransport {
        LazyLock::force(&ZEROS);
        DirectTransport { uffd, addresses }
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> &Arc<Uffd> {
        &self.uffd
    }

    /// The addresses of the blocks that it serves.
    pub fn addresses(&self) -> &[Option<u64>] {
        &self.addresses
    }

    /// The address of the block's first byte, if this transport serves the block.
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

    /// What QEMU has discarded ahead of a postcopy migration, the kernel gives as zeros when it
    /// is no longer registered: in a huge page where one is wanted, which thousands of small
    /// pages of zeros would prevent.
    fn leaves_zeros(&self, _block: BlockId) -> bool {
        true
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

/// Two transports at once: all blocks go by the first, until the direct one is open for those
/// whose addresses it knows. A page is claimed before it is sent, so none is lost or sent
/// twice by the change.
pub struct Route<T> {
    first: T,
    direct: OnceLock<DirectTransport>,
}

impl<T: Transport> Route<T> {
    /// Sends all blocks by `first`, for now.
    pub fn new(first: T) -> Route<T> {
        Route { first, direct: OnceLock::new() }
    }

    /// Sends by `direct` the blocks that it serves, from now on.
    pub fn open_direct(&self, direct: DirectTransport) {
        // A second call changes nothing: the addresses would be the same.
        let _ = self.direct.set(direct);
    }

    /// The first transport.
    pub fn first(&self) -> &T {
        &self.first
    }

    /// The direct transport, once it is open.
    pub fn direct(&self) -> Option<&DirectTransport> {
        self.direct.get()
    }

    fn transport_of(&self, block: BlockId) -> &dyn Transport {
        match self.direct.get() {
            Some(direct) if direct.address(block).is_some() => direct,
            _ => &self.first,
        }
    }
}

impl<T: Transport> Transport for Arc<Route<T>> {
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError> {
        self.transport_of(run.block).copy(block, run, bytes)
    }

    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        self.transport_of(run.block).zero(block, run)
    }

    fn wake(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        self.transport_of(run.block).wake(block, run)
    }

    fn step_pages(&self, block: BlockId) -> u64 {
        self.transport_of(block).step_pages(block)
    }

    fn zero_step_pages(&self, block: BlockId) -> u64 {
        self.transport_of(block).zero_step_pages(block)
    }

    fn leaves_zeros(&self, block: BlockId) -> bool {
        self.transport_of(block).leaves_zeros(block)
    }
}
