//! Receives the migration stream and writes the image, on a thread of its own.
//!
//! The thread does nothing but drain the socket: in `background-snapshot` one QEMU
//! thread both sends pages and serves the guest's writes to pages not yet sent, so a
//! reader that lingers makes the guest wait.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};

use super::checked::Checked;
use super::error::SaveError;
use super::event::SaveEvent;
use super::moment::Moment;
use super::options::SaveOptions;
use crate::cancel::Cancellation;
use crate::host::uffd::Uffd;
use crate::image::{Details, Image, ImageWriter, Saved, Sections, WriterOptions};
use crate::libvirt::block_name;
use crate::machine::Machine;
use crate::page::{Block, PAGE_SIZE};
use crate::wire::{Item, StreamBlock, StreamReader, Tail, run_state};

/// A stream being received.
pub(super) struct Receiving {
    /// Told once, when the first page comes; an error when none will.
    pub first_page: oneshot::Receiver<()>,
    /// Told once, when all has been received or when that has failed.
    pub done: oneshot::Receiver<Result<Received, SaveError>>,
    /// Closed when the stream has ended; nothing is sent to it.
    ended: oneshot::Receiver<()>,
    pub counters: Arc<Counters>,
    given_up: Cancellation,
    socket: UnixStream,
}

/// How far a stream has come.
#[derive(Default)]
pub(super) struct Counters {
    pages: AtomicU64,
    image_bytes: AtomicU64,
    total: u64,
}

impl Counters {
    pub fn progress(&self) -> SaveEvent {
        SaveEvent::Progress {
            pages: self.pages.load(Ordering::Relaxed),
            total: self.total,
            image_bytes: self.image_bytes.load(Ordering::Relaxed),
        }
    }
}

/// A stream that has been received: all of an image but the machine's record and the image's
/// name. Dropped, it leaves nothing.
pub(super) struct Received {
    writer: ImageWriter,
    sections: Sections,
    machine_type: String,
    /// Copies of the userfaultfds that QEMU had while the stream came; none where nobody wants them.
    userfaultfds: Option<io::Result<Vec<Uffd>>>,
}

impl Receiving {
    /// Starts to receive from `socket`.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn start(
        socket: UnixStream,
        options: &SaveOptions,
        checked: &Checked,
    ) -> Result<Receiving, SaveError> {
        let (first_page_sender, first_page) = oneshot::channel();
        let (done_sender, done) = oneshot::channel();
        let (ended_sender, ended) = oneshot::channel();
        let total = checked.blocks.iter().map(|b| b.used_len / PAGE_SIZE as u64).sum();
        let counters = Arc::new(Counters { total, ..Counters::default() });
        let given_up = Cancellation::new();
        let ours = socket.try_clone().map_err(SaveError::Socket)?;
        let receiver = Receiver {
            path: options.image.clone(),
            options: WriterOptions {
                compression: options.compression,
                force: options.force,
                bandwidth: options.bandwidth,
                ..WriterOptions::default()
            },
            parent: checked.parent.clone(),
            page_sizes: checked
                .blocks
                .iter()
                .map(|block| (block.name.clone(), block.page_size))
                .collect(),
            counters: Arc::clone(&counters),
            first_page: Some(first_page_sender),
            given_up: given_up.clone(),
            tracked: options.resettable.then_some(checked.pid),
            userfaultfds: None,
        };
        let receive = move || {
            let received = receiver.receive(&socket);
            let failed = received.is_err();
            let _ = done_sender.send(received);
            if failed {
                drain(&socket);
            }
            drop(ended_sender);
        };
        std::thread::Builder::new()
            .name("receive".into())
            .spawn(receive)
            .map_err(SaveError::Thread)?;
        Ok(Receiving { first_page, done, ended, counters, given_up, socket: ours })
    }

    /// Whether the stream has ended.
    pub fn has_ended(&mut self) -> bool {
        self.ended.try_recv() == Err(TryRecvError::Closed)
    }

    /// Has the thread write nothing more; it still takes what comes until the stream ends.
    /// Returns whether that has happened already.
    pub fn give_up(&mut self) -> bool {
        self.given_up.request();
        self.has_ended()
    }

    /// Ends a stream that nobody has begun to send, unless its first page comes within `patience`.
    pub async fn end_unless_begun(&mut self, patience: Duration) {
        let first_page = &mut self.first_page;
        if !first_page.is_terminated() && tokio::time::timeout(patience, first_page).await.is_err()
        {
            // It fails when the stream has ended already.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }

    /// Waits for the end of the stream.
    pub async fn ended(self) {
        if !self.ended.is_terminated() {
            let _ = self.ended.await;
        }
    }
}

/// Takes what comes until the stream ends, and throws it away: a guest that wants to write
/// waits for QEMU, and QEMU for us, whatever has become of the image.
fn drain(mut socket: &UnixStream) {
    let mut buffer = vec![0; 1 << 20];
    while socket.read(&mut buffer).is_ok_and(|count| count > 0) {}
}

impl Received {
    /// How long QEMU had to wait for us.
    pub fn stalled(&self) -> Duration {
        self.writer.stats().stalled
    }

    /// Copies of the userfaultfds that QEMU had while the stream came.
    pub fn take_userfaultfds(&mut self) -> Option<io::Result<Vec<Uffd>>> {
        self.userfaultfds.take()
    }

    /// Ends writing, also while [`Received::finish`] is at work.
    pub fn cancellation(&self) -> Cancellation {
        self.writer.cancellation()
    }

    /// Makes it an image, whole and under its name.
    pub fn finish(mut self, machine: Machine, moment: Moment) -> Result<Saved, SaveError> {
        // Where we held the guest, QEMU has written down that it was paused.
        if machine.running {
            run_state::set_running(&mut self.sections.devices);
        }
        let details = Details {
            machine: Machine { machine_type: self.machine_type, ..machine },
            moment_unix_us: moment.unix_us,
            pause_us: moment.pause.map(|pause| pause.as_micros() as u64),
        };
        Ok(self.writer.finish(details, self.sections)?)
    }
}

/// The receiving thread.
struct Receiver {
    path: PathBuf,
    options: WriterOptions,
    parent: Option<Arc<Image>>,
    /// The stream names no page sizes; QEMU's monitor does.
    page_sizes: HashMap<String, u64>,
    counters: Arc<Counters>,
    first_page: Option<oneshot::Sender<()>>,
    given_up: Cancellation,
    /// The process of a QEMU whose userfaultfds are wanted.
    tracked: Option<i32>,
    userfaultfds: Option<io::Result<Vec<Uffd>>>,
}

impl Receiver {
    fn receive(mut self, socket: &UnixStream) -> Result<Received, SaveError> {
        let mut stream = StreamReader::new(Gathering { socket, brought_few: false });
        let mut writer = None;
        let mut tail = None;
        while let Some(item) = stream.next_item()? {
            if self.given_up.is_requested() {
                return Err(SaveError::Interrupted);
            }
            match (item, &mut writer) {
                (Item::Blocks(blocks), None) => writer = Some(self.create(blocks)?),
                (Item::Page(page, bytes), Some(writer)) => {
                    writer.page(page, bytes)?;
                    self.count(writer);
                }
                (Item::Zero(page), Some(writer)) => {
                    writer.zero(page)?;
                    self.count(writer);
                }
                (Item::Tail(found), _) => tail = Some(found),
                // The reader gives the block list once, before any page.
                (Item::Blocks(_), Some(_)) | (_, None) => unreachable!(),
            }
        }
        let (Some(writer), Some(Tail { devices, vmdesc })) = (writer, tail) else { unreachable!() };
        let config = stream.config();
        let machine_type = stream.machine_type().to_owned();
        let (sections, userfaultfds) = (Sections { config, devices, vmdesc }, self.userfaultfds);
        Ok(Received { writer, sections, machine_type, userfaultfds })
    }

    fn create(&self, blocks: &[StreamBlock]) -> Result<ImageWriter, SaveError> {
        let with_page_size = |block: &StreamBlock| Block {
            name: block_name(&block.name).to_owned(),
            len: block.len,
            page_size: self.page_sizes.get(&block.name).copied().unwrap_or(4096),
        };
        let blocks = blocks.iter().map(with_page_size).collect();
        let (path, options) = (&self.path, self.options.clone());
        Ok(match &self.parent {
            Some(parent) => ImageWriter::create_on(path, options, blocks, parent)?,
            None => ImageWriter::create(path, options, blocks)?,
        })
    }

    fn count(&mut self, writer: &ImageWriter) {
        if let Some(first_page) = self.first_page.take() {
            let _ = first_page.send(());
            // QEMU has them until all of the stream is sent, which it can't be before it is read:
            // now, and after whoever waits for this page has been told.
            self.userfaultfds = self.tracked.map(Uffd::all_of);
        }
        let pages = self.counters.pages.fetch_add(1, Ordering::Relaxed);
        // Asking the writer costs more than counting: now and then is enough.
        if pages.is_multiple_of(1024) {
            let written = writer.stats().written_bytes;
            self.counters.image_bytes.store(written, Ordering::Relaxed);
        }
    }
}

/// Bytes that are worth a read of their own.
const ENOUGH_BYTES: usize = 64 << 10;

/// How long a read waits for more, if the one before has brought less than that. At a
/// gigabyte a second half of the socket's usual room fills meanwhile.
const GATHER: Duration = Duration::from_micros(100);

/// A socket that is read in larger pieces than QEMU writes. QEMU sends every page by
/// itself; a reader that takes each as it comes is put to sleep and woken for each, at a
/// higher price for both sides than that of copying the page.
struct Gathering<'a> {
    socket: &'a UnixStream,
    brought_few: bool,
}

impl Read for Gathering<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.brought_few {
            std::thread::sleep(GATHER);
        }
        let count = self.socket.read(buffer)?;
        self.brought_few = count < ENOUGH_BYTES;
        Ok(count)
    }
}
