//! Pages by QEMU's own postcopy socket, as `ram` sections.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Transport, TransportError};
use crate::page::{Block, BlockId, PAGE_SIZE, Run};
use crate::wire::Frame;

/// Pages in one section at most. An urgent page waits behind one section and what the
/// socket's buffer holds; smaller sections cost throughput.
const STEP_PAGES: u64 = 16;

/// Sends pages down a socket that a QEMU destination reads.
///
/// The stream is one sequence of bytes, so its sections are written one at a time under a
/// lock. It is the only lock on the path of a fault; prefetch releases it between two
/// sections, and stands aside while a fault is being answered.
pub struct SocketTransport<W> {
    stream: Mutex<Stream<W>>,
}

struct Stream<W> {
    socket: W,
    frame: Frame,
}

impl<W: Write + Send> SocketTransport<W> {
    /// Sends down `socket`, on which the package has already been sent.
    pub fn new(socket: W) -> SocketTransport<W> {
        SocketTransport { stream: Mutex::new(Stream { socket, frame: Frame::default() }) }
    }

    /// Sends something other than pages, between two sections.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn send(&self, bytes: &[u8]) -> Result<(), TransportError> {
        Ok(self.lock().socket.write_all(bytes)?)
    }

    fn lock(&self) -> MutexGuard<'_, Stream<W>> {
        // A thread that panicked here may have left half a section. QEMU refuses what follows,
        // and that is the error to report.
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write + Send> Transport for SocketTransport<W> {
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError> {
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let stream = &mut *self.lock();
        let section = stream.frame.pages(block, run, pages.iter());
        Ok(stream.socket.write_all(section)?)
    }

    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        let stream = &mut *self.lock();
        let section = stream.frame.zeros(block, run);
        Ok(stream.socket.write_all(section)?)
    }

    fn step_pages(&self, _block: BlockId) -> u64 {
        STEP_PAGES
    }
}
