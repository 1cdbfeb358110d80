//! An ordinary (precopy) migration stream: all memory first, device state last. Its guest
//! waits for all of it, and takes no right that QEMU doesn't have anyway.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::error::PostcopyError;
use super::options::Placement;
use super::source::{LastWord, PostcopyEvent};
use crate::image::{Cursor, Image, ImageError, Piece, Sections};
use crate::memory::FaultReport;
use crate::page::{BlockId, PAGE_SIZE, Page, PageSource};
use crate::wire::{
    Frame, ReturnPath, ReturnPathMessage, end_of_ram, open_return_path, ping, precopy_opening, tail,
};

/// The PING behind the device state.
const LOADED: u32 = 1;

/// A guest as an ordinary migration stream, ready to be sent.
pub(super) struct EagerStream {
    image: Arc<Image>,
    /// What comes before the pages.
    opening: Vec<u8>,
    /// What comes behind them.
    ending: Vec<u8>,
}

impl EagerStream {
    /// The guest of an image. `sections` are the parts of its stream that are not RAM.
    pub fn new(image: &Arc<Image>, sections: &Sections) -> EagerStream {
        // QEMU tells by the return path when it has loaded everything.
        let head = [&sections.config[..], &open_return_path()].concat();
        let opening = precopy_opening(&head, image.blocks());
        let devices = [&sections.devices[..], &ping(LOADED)].concat();
        let ending = [end_of_ram(), tail(&devices, &sections.vmdesc)].concat();
        EagerStream { image: Arc::clone(image), opening, ending }
    }

    /// Begins to send it to the QEMU at the other end of `socket`, for this `reason`. What
    /// happens comes through the receiver.
    ///
    /// # Errors
    /// When the socket can't be shared or a thread can't be started.
    pub fn send(
        self,
        socket: UnixStream,
        reason: String,
    ) -> Result<(EagerSource, UnboundedReceiver<PostcopyEvent>), PostcopyError> {
        let (events, receiver) = unbounded_channel();
        let _ = events.send(PostcopyEvent::Placing { placement: Placement::Eager, reason });
        let sent = Arc::new(AtomicU64::new(0));
        let sending = Sending {
            stream: self,
            socket: socket.try_clone().map_err(PostcopyError::Duplicate)?,
            sent: Arc::clone(&sent),
        };
        let thread = std::thread::Builder::new().name("send".into());
        thread.spawn(move || sending.run(&events)).map_err(PostcopyError::Thread)?;
        Ok((EagerSource { socket, sent }, receiver))
    }
}

/// An ordinary migration under way. Dropping it ends it without waiting for its thread, which
/// may be stuck in a read of a disk that has died.
pub(super) struct EagerSource {
    socket: UnixStream,
    sent: Arc<AtomicU64>,
}

impl EagerSource {
    /// Pages sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for EagerSource {
    fn drop(&mut self) {
        // The thread's next read or write fails. QEMU may be gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

/// The thread that sends, and then waits until QEMU has loaded everything.
struct Sending {
    stream: EagerStream,
    socket: UnixStream,
    sent: Arc<AtomicU64>,
}

impl Sending {
    fn run(mut self, events: &UnboundedSender<PostcopyEvent>) {
        let _last = LastWord { events: events.clone(), doing: "send memory" };
        match self.send().and_then(|()| self.confirm()) {
            Ok(()) => {
                let _ = events.send(PostcopyEvent::Loaded);
                let _ = events.send(PostcopyEvent::Preloaded);
                let _ = events.send(PostcopyEvent::Finished(FaultReport::none()));
            }
            Err(error) => {
                let _ = events.send(PostcopyEvent::Failed(error));
            }
        }
    }

    /// Sends everything.
    fn send(&mut self) -> Result<(), PostcopyError> {
        let image = &self.stream.image;
        let unread = |page: Page, source: ImageError| PostcopyError::Read {
            block: image.blocks()[page.block.index()].name.clone(),
            offset: page.number * PAGE_SIZE as u64,
            source: source.into(),
        };
        let write = |mut socket: &UnixStream, bytes: &[u8]| {
            socket.write_all(bytes).map_err(PostcopyError::Stream)
        };
        write(&self.socket, &self.stream.opening)?;
        let mut frame = Frame::default();
        let first = Page { block: BlockId(0), number: 0 };
        let mut pages = Cursor::over_all(image).map_err(|error| unread(first, error))?;
        while let Some(page) = pages.page() {
            let piece = pages.next_piece().map_err(|error| unread(page, error))?;
            let Some(piece) = piece else { break };
            let run = piece.run();
            let block = &image.blocks()[run.block.index()];
            let bytes = match piece {
                Piece::Zeros(run) => frame.zeros(block, run),
                Piece::Data(run, bytes) => frame.pages(block, run, bytes.as_chunks().0.iter()),
            };
            write(&self.socket, bytes)?;
            self.sent.fetch_add(run.count, Ordering::Relaxed);
        }
        write(&self.socket, &self.stream.ending)?;
        // Without a description of the devices, QEMU would wait for one.
        self.socket.shutdown(Shutdown::Write).map_err(PostcopyError::Stream)
    }

    /// Waits until QEMU has loaded the device state and let go of the stream. Its last
    /// status says no more: it is an error as well where the stream had no description.
    fn confirm(&self) -> Result<(), PostcopyError> {
        let closed = |_| PostcopyError::Stream(io::ErrorKind::ConnectionReset.into());
        let mut path = ReturnPath::new(&self.socket);
        let mut loaded = false;
        while let Some(message) = path.next_message().map_err(closed)? {
            match message {
                ReturnPathMessage::Pong(LOADED) => loaded = true,
                ReturnPathMessage::Shut(_) if loaded => return Ok(()),
                ReturnPathMessage::Shut(status) => return Err(PostcopyError::Refused(status)),
                _ => {}
            }
        }
        Err(PostcopyError::Stream(io::ErrorKind::UnexpectedEof.into()))
    }
}
