//! How pages reach a guest's memory.

mod direct;
pub mod proof;
mod socket;

pub use direct::{DirectPlace, Route};
pub use socket::SocketPlace;

use std::sync::RwLockReadGuard;

use crate::page::{Block, BlockId, Run};

/// Why pages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// QEMU is gone, or has closed the way.
    #[error("QEMU is gone ({0})")]
    Gone(std::io::Error),
    /// Nothing can be installed just now; try again.
    #[error("the memory's layout is changing")]
    Changing,
    /// Something else.
    #[error("{0}")]
    Io(std::io::Error),
}

impl From<std::io::Error> for PlaceError {
    fn from(error: std::io::Error) -> PlaceError {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
        match error.kind() {
            BrokenPipe | ConnectionReset | NotConnected => PlaceError::Gone(error),
            _ => PlaceError::Io(error),
        }
    }
}

/// A way for pages to reach a guest's memory. Whoever calls has claimed the pages;
/// a page that is handed over is installed exactly once.
pub trait Place: Send + Sync {
    /// Installs the run's bytes; `bytes.len()` is `run.bytes()`. Returns once they
    /// are on their way for good and the guest, if it waits for them, will wake.
    ///
    /// # Errors
    /// When the way is broken.
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), PlaceError>;

    /// Installs zeros.
    ///
    /// # Errors
    /// When the way is broken.
    fn zero(&self, block: &Block, run: Run) -> Result<(), PlaceError>;

    /// Wakes whoever waits for pages that are in place already. Where waiters look
    /// again by themselves there is nothing to do. Where owners can give memory back,
    /// what they have given back becomes zeros.
    ///
    /// # Errors
    /// When the way is broken.
    fn wake(&self, block: &Block, run: Run) -> Result<(), PlaceError> {
        let _ = (block, run);
        Ok(())
    }

    /// As long as this guard lives, no memory is given back or unmapped. Whoever claims
    /// pages takes it before, and lets go when they are installed or released; and
    /// never takes it twice. Nothing where that can't happen.
    fn steady(&self) -> Option<RwLockReadGuard<'_, ()>> {
        None
    }

    /// The most target pages of this block that one call should bring, so that an
    /// urgent page does not wait long behind it.
    fn step_pages(&self, block: BlockId) -> u64;

    /// The same for zeros.
    fn zero_step_pages(&self, block: BlockId) -> u64 {
        self.step_pages(block)
    }
}
