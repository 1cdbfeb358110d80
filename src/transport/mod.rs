//! How pages reach a guest's memory.

mod direct;
pub mod lookalikes;
pub mod proof;
pub mod search;
mod socket;

pub use direct::{DirectTransport, Route};
pub use socket::SocketTransport;

use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};
use crate::page::{Block, BlockId, Run};

/// Why pages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// QEMU is gone, or has closed the connection.
    #[error("QEMU is gone ({0})")]
    Gone(std::io::Error),
    /// Something else.
    #[error("{0}")]
    Io(std::io::Error),
}

impl TransportError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            TransportError::Gone(_) => ErrorKind::QemuEnded,
            TransportError::Io(error) => ErrorKind::of_io(error),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<PathBuf>, None)
    }
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

/// Brings pages to a guest's memory. The caller has claimed the pages; a page that is handed
/// over is installed exactly once.
pub trait Transport: Send + Sync {
    /// Installs the run's bytes; `bytes.len()` is `run.bytes()`. When it returns, they are in
    /// place or cannot be overtaken, and the guest will wake if it waits for them.
    ///
    /// # Errors
    /// When the transport is broken.
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError>;

    /// Installs zeros.
    ///
    /// # Errors
    /// When the transport is broken.
    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError>;

    /// Wakes the threads that wait for pages which are in place already. There is nothing to
    /// do where QEMU wakes them itself.
    ///
    /// # Errors
    /// When the transport is broken.
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

    /// Whether memory of this block in which nothing is installed is zeros once QEMU has ended
    /// the migration. A stretch of zeros as long as a step can then be left as it is: who
    /// touches it earlier is answered by [`Transport::zero`], which must leave pages that are
    /// there as they are.
    fn leaves_zeros(&self, block: BlockId) -> bool {
        let _ = block;
        false
    }
}
