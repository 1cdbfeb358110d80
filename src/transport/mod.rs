//! How pages reach a guest's memory.

mod direct;
pub mod proof;
mod socket;

pub use direct::{DirectTransport, Route};
pub use socket::SocketTransport;

use crate::page::{Block, BlockId, Run};

/// Why pages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// QEMU is gone, or has closed the way.
    #[error("QEMU is gone ({0})")]
    Gone(std::io::Error),
    /// Something else.
    #[error("{0}")]
    Io(std::io::Error),
}

impl From<std::io::Error> for TransportError {
    fn from(error: std::io::Error) -> TransportError {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
        match error.kind() {
            BrokenPipe | ConnectionReset | NotConnected => TransportError::Gone(error),
            _ => TransportError::Io(error),
        }
    }
}

/// A way for pages to reach a guest's memory. Whoever calls has claimed the pages;
/// a page that is handed over is installed exactly once.
pub trait Transport: Send + Sync {
    /// Installs the run's bytes; `bytes.len()` is `run.bytes()`. Returns once they
    /// are on their way for good and the guest, if it waits for them, will wake.
    ///
    /// # Errors
    /// When the way is broken.
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError>;

    /// Installs zeros.
    ///
    /// # Errors
    /// When the way is broken.
    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError>;

    /// Wakes whoever waits for pages that are in place already. Where waiters look
    /// again by themselves there is nothing to do.
    ///
    /// # Errors
    /// When the way is broken.
    fn wake(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        let _ = (block, run);
        Ok(())
    }

    /// The most target pages of this block that one call should bring, so that an
    /// urgent page does not wait long behind it.
    fn step_pages(&self, block: BlockId) -> u64;

    /// The same for zeros.
    fn zero_step_pages(&self, block: BlockId) -> u64 {
        self.step_pages(block)
    }
}
