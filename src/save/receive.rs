//! Receives the migration stream and writes the image, on a thread of its own.
//!
//! The thread does nothing but drain the socket: in `background-snapshot` one QEMU
//! thread both sends pages and serves the guest's writes to pages not yet sent, so a
//! reader that lingers makes the guest wait.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};

use super::checked::Checked;
use super::direct::{Backpressure, DirectReading, Inheritance, Places, Unchanged};
use super::error::SaveError;
use super::event::SaveEvent;
use super::merge::Merge;
use super::moment::Moment;
use super::options::SaveOptions;
use crate::cancel::Cancellation;
use crate::failpoint::{copy_of_the_stream, fault};
use crate::host::uffd::Uffd;
use crate::identity::Identity;
use crate::image::{Details, Image, ImageWriter, Saved, Sections, WriterOptions};
use crate::libvirt::block_name;
use crate::machine::Machine;
use crate::memory::captured::CapturedMemory;
use crate::page::{Block, PAGE_SIZE};
use crate::wire::{Item, StreamBlock, StreamReader, Tail, WireError, run_state};

/// A stream being received.
pub(super) struct Receiving {
    /// Told once, when the first page comes; an error when none will.
    pub first_page: oneshot::Receiver<()>,
    /// Told once, before the first page: what the stream begins with.
    pub begun: oneshot::Receiver<Begun>,
    /// Told once, when all memory is captured, though QEMU may send on.
    pub captured: oneshot::Receiver<()>,
    /// Told once, when all has been received or when that has failed.
    pub done: oneshot::Receiver<Result<Received, SaveError>>,
    /// Closed when the stream has ended; nothing is sent to it.
    ended: oneshot::Receiver<()>,
    pub counters: Arc<Counters>,
    given_up: Cancellation,
    read_directly: Cancellation,
    hold_back: Cancellation,
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
    fn set_image_bytes(&self, bytes: u64) {
        self.image_bytes.store(bytes, Ordering::Relaxed);
    }

    fn look(&self, merge: &Merge) {
        self.pages.store(merge.captured(), Ordering::Relaxed);
        self.image_bytes.store(merge.written_bytes(), Ordering::Relaxed);
    }

    pub fn progress(&self) -> SaveEvent {
        SaveEvent::Progress {
            pages: self.pages.load(Ordering::Relaxed),
            total: self.total,
            image_bytes: self.image_bytes.load(Ordering::Relaxed),
        }
    }
}

/// What memory is put into.
#[derive(Debug, Clone)]
pub(super) struct Stores {
    /// An image.
    pub image: bool,
    /// Memory of ours, for clones. They come first: memory is read from outside once this is requested.
    pub memory: Option<Cancellation>,
}

/// What a stream begins with, and what memory is put into.
pub(super) struct Begun {
    pub config: Vec<u8>,
    pub machine_type: String,
    pub blocks: Vec<Block>,
    /// That of the image, if one is written.
    pub identity: Identity,
    pub merge: Arc<Merge>,
    pub memory: Option<Arc<CapturedMemory>>,
    /// Where memory can be read from outside, in the order of the blocks.
    pub places: Option<Places>,
}

/// A stream that has been received: all of an image but the machine's record and the image's
/// name. Dropped, it leaves nothing.
pub(super) struct Received {
    /// None where no image is written.
    writer: Option<ImageWriter>,
    config: Vec<u8>,
    /// The devices, unless the stream was ended before they came.
    tail: Option<Tail>,
    machine_type: String,
    /// Pages that were read from outside.
    direct_pages: u64,
    /// Pages that were taken from the parent unread.
    inherited_pages: u64,
    /// Copies of the userfaultfds that QEMU had while the stream came; none where nobody wants them.
    userfaultfds: Option<io::Result<Vec<Uffd>>>,
}

impl Receiving {
    /// Starts to receive from `socket`, and reads memory at `places` beside, except what is
    /// `unchanged`, which has to be known by the first page. Memory goes `into` an image, or is kept
    /// for clones.
    ///
    /// # Errors
    /// When a thread can't be started.
    pub fn start(
        socket: UnixStream,
        options: &SaveOptions,
        checked: &Checked,
        places: Option<Places>,
        unchanged: Arc<OnceLock<Unchanged>>,
        into: Stores,
    ) -> Result<Receiving, SaveError> {
        let (begun_sender, begun) = oneshot::channel();
        let (first_page_sender, first_page) = oneshot::channel();
        let (captured_sender, captured) = oneshot::channel();
        let (done_sender, done) = oneshot::channel();
        let (ended_sender, ended) = oneshot::channel();
        let total = checked.blocks.iter().map(|b| b.used_len / PAGE_SIZE as u64).sum();
        let counters = Arc::new(Counters { total, ..Counters::default() });
        let (given_up, read_directly) = (Cancellation::new(), Cancellation::new());
        let hold_back = Cancellation::new();
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
            received: 0,
            places,
            unchanged,
            into,
            begun: Some(begun_sender),
            first_page: Some(first_page_sender),
            captured: Some(captured_sender),
            given_up: given_up.clone(),
            read_directly: read_directly.clone(),
            hold_back: hold_back.clone(),
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
        Ok(Receiving {
            begun,
            first_page,
            captured,
            done,
            ended,
            counters,
            given_up,
            read_directly,
            hold_back,
            socket: ours,
        })
    }

    /// Memory may be read from outside from now on: the guest goes on. Where not `all` of the stream is
    /// waited for once memory is captured, it may be held back meanwhile.
    pub fn read_directly(&self, all: bool) {
        if !all {
            self.hold_back.request();
        }
        self.read_directly.request();
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
        self.writer.as_ref().map_or(Duration::ZERO, |writer| writer.stats().stalled)
    }

    /// Copies of the userfaultfds that QEMU had while the stream came.
    pub fn take_userfaultfds(&mut self) -> Option<io::Result<Vec<Uffd>>> {
        self.userfaultfds.take()
    }

    /// Ends writing, also while [`Received::finish`] is at work.
    pub fn cancellation(&self) -> Cancellation {
        self.writer.as_ref().map(ImageWriter::cancellation).unwrap_or_default()
    }

    /// Whether an image is written.
    pub fn has_image(&self) -> bool {
        self.writer.is_some()
    }

    /// Pages that were read from outside, and not taken from QEMU's stream.
    pub fn direct_pages(&self) -> u64 {
        self.direct_pages
    }

    /// Takes these devices if the stream has brought none.
    pub fn complete(&mut self, devices: Vec<u8>) {
        if fault("own devices") {
            self.tail = None;
        }
        self.tail.get_or_insert(Tail { devices, vmdesc: Vec::new() });
    }

    /// Pages that were taken from the parent and read nowhere.
    pub fn inherited_pages(&self) -> u64 {
        self.inherited_pages
    }

    /// Makes it an image, whole and under its name.
    ///
    /// # Errors
    /// When it can't be written, or nobody has brought the devices.
    pub fn finish(self, machine: Machine, moment: Moment) -> Result<Saved, SaveError> {
        let inside = "its memory";
        let (Some(Tail { mut devices, vmdesc }), Some(writer)) = (self.tail, self.writer) else {
            return Err(WireError::Ended { at: 0, inside }.into());
        };
        // Where we held the guest, QEMU has written down that it was paused.
        if machine.running {
            run_state::set_running(&mut devices);
        }
        let details = Details {
            machine: Machine { machine_type: self.machine_type, ..machine },
            moment_unix_us: moment.unix_us,
            pause_us: moment.pause.map(|pause| pause.as_micros() as u64),
        };
        let sections = Sections { config: self.config, devices, vmdesc };
        Ok(writer.finish(details, sections)?)
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
    /// Pages of the stream so far.
    received: u64,
    /// Where memory can be read from outside.
    places: Option<Places>,
    /// What the guest has not written since the parent; nothing where that is not known.
    unchanged: Arc<OnceLock<Unchanged>>,
    into: Stores,
    begun: Option<oneshot::Sender<Begun>>,
    first_page: Option<oneshot::Sender<()>>,
    captured: Option<oneshot::Sender<()>>,
    given_up: Cancellation,
    read_directly: Cancellation,
    hold_back: Cancellation,
    /// The process of a QEMU whose userfaultfds are wanted.
    tracked: Option<i32>,
    userfaultfds: Option<io::Result<Vec<Uffd>>>,
}

impl Receiver {
    fn receive(mut self, socket: &UnixStream) -> Result<Received, SaveError> {
        let backpressure = RefCell::new(None);
        let counters = Arc::clone(&self.counters);
        let mut stream = StreamReader::new(Gathering {
            socket,
            brought_few: false,
            backpressure: &backpressure,
            counters: &counters,
            copy: copy_of_the_stream(),
        });
        let (mut sides, mut tail) = (None, None);
        loop {
            let item = match (stream.next_item(), &sides) {
                (Ok(None), _) => break,
                (Ok(Some(item)), _) => item,
                // Whatever has become of the stream: nothing of memory is missing.
                (Err(_), Some(Sides { merge, .. })) if merge.is_complete() => break,
                (Err(error), _) => return Err(error.into()),
            };
            if self.given_up.is_requested() {
                return Err(SaveError::Interrupted);
            }
            if sides.is_none() && matches!(item, Item::Blocks(_)) {
                drop(item);
                sides = Some(self.begin(&stream)?);
                continue;
            }
            match (item, &mut sides) {
                (Item::Page(page, bytes), Some(Sides { merge, direct, .. })) => {
                    merge.stream(page, bytes)?;
                    self.count(merge);
                    if let Some(direct) = direct
                        && direct.stream_brought(page, bytes, merge)
                        && self.hold_back.is_requested()
                    {
                        backpressure.replace(direct.backpressure(merge, &self.given_up));
                    }
                }
                (Item::Zero(page), Some(Sides { merge, .. })) => {
                    merge.stream_zero(page)?;
                    self.count(merge);
                }
                (Item::Tail(found), _) => tail = Some(found),
                // The reader gives the block list once, before any page.
                (Item::Blocks(_), _) | (_, None) => unreachable!(),
            }
        }
        let Some(Sides { merge, direct, .. }) = sides else { unreachable!() };
        // Its thread ends, and so does who was capturing: nobody puts anything into the image from now on.
        drop(direct);
        merge.wait_settled();
        merge.write_deferred(&self.given_up, |bytes| self.counters.set_image_bytes(bytes))?;
        let (config, machine_type) = (stream.config(), stream.machine_type().to_owned());
        let (direct_pages, inherited_pages) = (merge.direct(), merge.inherited());
        let (writer, userfaultfds) = (merge.take_image(), self.userfaultfds);
        Ok(Received {
            writer,
            config,
            tail,
            machine_type,
            direct_pages,
            inherited_pages,
            userfaultfds,
        })
    }

    /// Begins the image, once the machine's blocks are known.
    fn begin(&mut self, stream: &StreamReader<Gathering<'_>>) -> Result<Sides, SaveError> {
        let blocks: Vec<Block> = stream.blocks().iter().map(|block| self.shape(block)).collect();
        let (captured, _) = oneshot::channel();
        let captured = self.captured.take().unwrap_or(captured);
        let writer = match self.into.image {
            true => Some(self.create(&blocks)?),
            false => None,
        };
        let parent = writer.as_ref().and_then(ImageWriter::parent_pages);
        let inheritance = parent
            .zip(self.unchanged.get())
            .map(|(parent, unchanged)| Inheritance::new(unchanged, &blocks, parent));
        let identity = writer.as_ref().map_or_else(Identity::random, ImageWriter::identity);
        let memory = self.into.memory.is_some().then(|| CapturedMemory::new(&blocks).map(Arc::new));
        let memory = memory.transpose().map_err(SaveError::Captured)?;
        let merge = Arc::new(Merge::new(writer, memory.clone(), &blocks, captured));
        let names = stream.blocks().iter().map(|block| &block.name);
        let places = self.places.take().map(|places| places.in_order(names));
        let begun = Begun {
            config: stream.config(),
            machine_type: stream.machine_type().to_owned(),
            blocks,
            identity,
            merge: Arc::clone(&merge),
            memory,
            places: places.clone(),
        };
        if let Some(sender) = self.begun.take() {
            let _ = sender.send(begun);
        }
        let begin = self.read_directly.clone();
        let clear = self.into.memory.clone();
        let direct = places.map(|places| DirectReading::new(places, begin, clear, inheritance));
        Ok(Sides { _ended: End(Arc::clone(&merge)), merge, direct })
    }

    fn shape(&self, block: &StreamBlock) -> Block {
        Block {
            name: block_name(&block.name).to_owned(),
            len: block.len,
            page_size: self.page_sizes.get(&block.name).copied().unwrap_or(4096),
        }
    }

    fn create(&self, blocks: &[Block]) -> Result<ImageWriter, SaveError> {
        let (path, options, blocks) = (&self.path, self.options.clone(), blocks.to_vec());
        Ok(match &self.parent {
            Some(parent) => ImageWriter::create_on(path, options, blocks, parent)?,
            None => ImageWriter::create(path, options, blocks)?,
        })
    }

    fn count(&mut self, merge: &Merge) {
        if let Some(first_page) = self.first_page.take() {
            let _ = first_page.send(());
            // QEMU has them until all of the stream is sent, which it can't be before it is read:
            // now, and after whoever waits for this page has been told.
            self.userfaultfds = self.tracked.map(Uffd::all_of);
        }
        self.received += 1;
        // Asking the writer costs more than counting: now and then is enough.
        if self.received.is_multiple_of(1024) {
            self.counters.look(merge);
        }
    }
}

/// The image, and what reads memory beside the stream.
struct Sides {
    direct: Option<DirectReading>,
    merge: Arc<Merge>,
    /// Dropped last.
    _ended: End,
}

/// Tells whoever waits for a page that the stream brings nothing more.
struct End(Arc<Merge>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
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
    /// What it waits for before it reads, if there is something.
    backpressure: &'a RefCell<Option<Backpressure>>,
    counters: &'a Counters,
    /// For tests.
    copy: Option<File>,
}

impl Read for Gathering<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut backpressure = self.backpressure.borrow_mut();
        let is_wanted =
            backpressure.as_mut().is_some_and(|it| it.wait(|merge| self.counters.look(merge)));
        if self.brought_few && !is_wanted {
            std::thread::sleep(GATHER);
        }
        let count = self.socket.read(buffer)?;
        self.brought_few = count < ENOUGH_BYTES;
        if let Some(copy) = &mut self.copy {
            copy.write_all(&buffer[..count])?;
        }
        Ok(count)
    }
}
