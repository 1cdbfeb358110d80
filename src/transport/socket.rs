//! Pages by QEMU's own postcopy socket, as `ram` sections.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Transport, TransportError};
use crate::page::{Block, BlockId, PAGE_SIZE, Run};
use crate::wire::Frame;

/// Pages in one section at most. An urgent page waits behind one section and what the
/// socket's buffer holds; smaller sections cost throughput.
///
/// A section of this size is queued by one write completely or not at all, even if the writer
/// is killed meanwhile: Linux cuts what is written to a Unix socket into buffers of 32 KiB and
/// somewhat less than 16 KiB more (`unix_stream_sendmsg` in net/unix/af_unix.c), each of
/// which is queued in one step. That is what lets another process go on with the stream.
const STEP_PAGES: u64 = 8;

/// The most bytes that are queued in one step, in any case.
const ONE_STEP: usize = 40 << 10;

/// Sends pages down a socket that a QEMU destination reads.
///
/// The stream is one sequence of bytes, so its sections are written one at a time under a
/// lock. It is the only lock on the path of a fault; prefetch releases it between two
/// sections, and stands aside while a fault is being answered.
pub struct SocketTransport<W> {
    stream: Mutex<Stream<W>>,
    /// Told before and after a section that may be queued in parts.
    on_large: Option<Box<dyn Fn(bool) + Send + Sync>>,
}

struct Stream<W> {
    socket: W,
    frame: Frame,
}

impl<W: Write + Send> SocketTransport<W> {
    /// Sends down `socket`, on which the package has already been sent.
    pub fn new(socket: W) -> SocketTransport<W> {
        let stream = Mutex::new(Stream { socket, frame: Frame::default() });
        SocketTransport { stream, on_large: None }
    }

    /// Tells of sections that may be queued in parts, as those of huge pages are: `true` before
    /// and `false` behind each.
    pub fn telling_of_large(self, on_large: impl Fn(bool) + Send + Sync + 'static) -> Self {
        SocketTransport { on_large: Some(Box::new(on_large)), ..self }
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
        let on_large = self.on_large.as_ref().filter(|_| section.len() > ONE_STEP);
        on_large.inspect(|tell| tell(true));
        stream.socket.write_all(section)?;
        on_large.inspect(|tell| tell(false));
        Ok(())
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
