//! The source's side of a postcopy migration: device state first, then memory as
//! the guest asks for it, then the rest, then good-bye.
//!
//! Plain threads: one sends the opening and then fills memory, one reads the return
//! path and answers requests, and where pages go straight into QEMU's memory, one more
//! takes faults from its userfaultfd. Whoever follows the feed hears of its steps
//! through a channel.

use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::way::Way;
use crate::memory::{
    FaultReport, FillOptions, Memory, MemoryError, Pace, Pager, prefetch, preload,
};
use crate::page::{Block, BlockId, PAGE_SIZE, Page, PageSource};
use crate::transport::proof::AttachError;
use crate::transport::{Route, SocketTransport, TransportError};
use crate::wire::{Opening, ReturnPath, ReturnPathMessage, WireError, closing, package};

/// PINGs, told apart by their values.
const PING_OPENED: u32 = 1;
const PING_LISTENING: u32 = 2;
pub(super) const PING_LOADED: u32 = 3;
pub(super) const PING_PROBED: u32 = 4;

/// Memory of the working set that is sent ahead, by the socket, in bytes: what QEMU takes
/// in while it loads the device state. Requests that come meanwhile wait behind what
/// the socket holds of it.
const HEAD_BYTES: usize = 1 << 20;

/// What a feed has to say.
#[derive(Debug)]
pub enum FeedEvent {
    /// The way that pages go from now on.
    Placing {
        /// The way.
        way: Way,
        /// Why.
        reason: String,
    },
    /// The device state is in; QEMU runs the guest next.
    Loaded,
    /// The working set is in place.
    Preloaded,
    /// What the intake of faults from userfaultfd has seen, if anything.
    Faults(Option<FaultReport>),
    /// QEMU has confirmed that it has everything. The last event, with what the
    /// requests by return path have shown.
    Finished(FaultReport),
    /// The feed has ended before that. The last event.
    Failed(FeedError),
}

/// Why a feed ended early.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// Memory could not be brought.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The return path could not be understood.
    #[error("QEMU's return path: {0}")]
    Wire(#[from] WireError),
    /// The opening could not be sent.
    #[error("QEMU closed the migration stream while it was given the device state ({0})")]
    Opening(std::io::Error),
    /// Pages can't be installed directly, though nothing else was asked for.
    #[error("memory can't be installed by userfaultfd: {0}")]
    Adopt(#[from] AttachError),
    /// Some blocks can't be installed directly, though nothing else was asked for.
    #[error("memory can't be installed by userfaultfd: these blocks were not found in QEMU: {0}")]
    Unproven(String),
    /// QEMU hung up.
    #[error("QEMU closed the return path before its memory was complete")]
    HungUp,
    /// QEMU reported a failure.
    #[error("QEMU ended the migration with status {0}")]
    Refused(u32),
    /// A thread could not be started.
    #[error("starting a thread failed: {0}")]
    Thread(std::io::Error),
    /// A thread of ours panicked.
    #[error(
        "the thread that was to {0} panicked: that is a bug of snapback, whose message is on \
         standard error"
    )]
    Panicked(&'static str),
}

/// Tells of a thread that panics, whose followers would wait forever.
pub(super) struct LastWord {
    pub events: UnboundedSender<FeedEvent>,
    /// What the thread does.
    pub doing: &'static str,
}

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.events.send(FeedEvent::Failed(FeedError::Panicked(self.doing)));
        }
    }
}

/// The device state and what goes with it, made ready ahead of time.
pub struct Prepared {
    opening: Vec<u8>,
    package: Vec<u8>,
}

impl Prepared {
    /// Puts together what is sent before the guest runs. `config` and `devices` are
    /// the saved stream's.
    pub fn new(config: &[u8], devices: &[u8], blocks: &[Block]) -> Prepared {
        // _SC_PAGESIZE always succeeds on Linux; 4096 is right wherever it would not.
        let host_page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .and_then(|size| u64::try_from(size).ok())
            .unwrap_or(4096);
        let opening = Opening { config, blocks, ping: PING_OPENED, host_page_size };
        Prepared {
            opening: opening.bytes(),
            package: package(devices, PING_LISTENING, PING_LOADED),
        }
    }
}

/// Who is fed, and how.
#[derive(Debug, Clone, Default)]
pub struct FeedOptions {
    /// The way pages go.
    pub way: Way,
    /// QEMU's process id, if it is known.
    pub pid: Option<i32>,
    /// How memory is filled.
    pub fill: FillOptions,
    /// Whether the working set goes ahead of the guest's first instruction; it is then
    /// told when it is in place.
    pub preload: bool,
    /// How long demands are recorded, from the start on.
    pub record: Duration,
}

/// The route of this feed's pages.
pub(super) type FeedRoute = Route<SocketTransport<UnixStream>>;

/// A feed under way. Dropping it ends it and waits for its threads.
pub struct Feed {
    memory: Arc<Memory>,
    socket: UnixStream,
    pace: Arc<Pace>,
    threads: Vec<JoinHandle<()>>,
}

impl Feed {
    /// Begins to feed the QEMU at the other end of `socket`. What happens comes
    /// through the receiver.
    ///
    /// # Errors
    /// When the socket can't be shared or a thread can't be started.
    pub fn start(
        prepared: Prepared,
        source: Arc<dyn PageSource>,
        socket: UnixStream,
        options: FeedOptions,
    ) -> Result<(Feed, UnboundedReceiver<FeedEvent>), FeedError> {
        let share = || socket.try_clone().map_err(FeedError::Thread);
        let route = Arc::new(Route::new(SocketTransport::new(share()?)));
        let memory = Arc::new(Memory::new(source, Box::new(Arc::clone(&route))));
        let pace = Arc::new(Pace::new(options.fill.rate));
        let (events, receiver) = unbounded_channel();
        let (pongs, heard) = mpsc::channel();

        let answering = Answering {
            server: Pager::new(Arc::clone(&memory))?.recording(options.record),
            path: ReturnPath::new(share()?),
            memory: Arc::clone(&memory),
            events: events.clone(),
            pongs,
        };
        let filling = Filling {
            prepared,
            options,
            route,
            memory: Arc::clone(&memory),
            pace: Arc::clone(&pace),
            pongs: heard,
            takes_faults: false,
            events: events.clone(),
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(body).map_err(FeedError::Thread)
        };
        let mut feed = Feed { memory, socket, pace, threads: Vec::new() };
        feed.threads.push(spawn("faults", Box::new(move || answering.run()))?);
        feed.threads.push(spawn(
            "fill",
            Box::new(move || {
                let _last = LastWord { events: events.clone(), doing: "fill memory" };
                if let Err(error) = filling.run() {
                    let _ = events.send(FeedEvent::Failed(error));
                }
            }),
        )?);
        Ok((feed, receiver))
    }

    /// The memory under way.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Fills at full speed from now on.
    pub fn hurry(&self) {
        self.pace.hurry();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.pace.stop();
        // Wakes the threads out of their reads and writes. QEMU may be gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The thread that sends: opening, package, memory, closing.
pub(super) struct Filling {
    prepared: Prepared,
    pub options: FeedOptions,
    pub route: Arc<FeedRoute>,
    pub memory: Arc<Memory>,
    pace: Arc<Pace>,
    pub pongs: mpsc::Receiver<u32>,
    pub events: UnboundedSender<FeedEvent>,
    /// Whether faults may be taken from userfaultfd: an event that we take reaches nobody
    /// else, so only when every block's address is known.
    pub takes_faults: bool,
}

impl Filling {
    fn run(mut self) -> Result<(), FeedError> {
        let opening = |e| FeedError::Opening(io_error(e));
        self.route.first().send(&self.prepared.opening).map_err(opening)?;
        self.route.first().send(&self.prepared.package).map_err(opening)?;
        // What the guest asks for first leaves at once, behind the device state: the direct
        // way takes longer to open than the guest to run. No rate holds it back, nor what
        // the guest waits for.
        match preload(&self.memory, self.head(), &self.pace) {
            // QEMU has refused the device state; the other thread hears of it as well.
            Err(MemoryError::Install { source: TransportError::Gone(_), .. }) => return Ok(()),
            sent => sent?,
        }
        // The other thread's end means an end of the feed, and is told by that thread.
        let Some(loaded) = self.open_the_way()? else { return Ok(()) };
        let intake = self.start_intake()?;
        if self.options.preload {
            preload(&self.memory, &self.options.fill.working_set, &self.pace)?;
            let _ = self.events.send(FeedEvent::Preloaded);
        }
        if loaded || self.wait_pong(PING_LOADED) {
            self.fill()?;
        }
        if let Some(intake) = intake {
            let _ = self.events.send(FeedEvent::Faults(intake.finish()));
        }
        match self.memory.wait_complete(Duration::ZERO) {
            true => self.route.first().send(&closing()).map_err(|_| FeedError::HungUp),
            false => Ok(()),
        }
    }

    /// The working set's first pages, as many as make up [`HEAD_BYTES`] with what is
    /// stored beside them.
    fn head(&self) -> &[Page] {
        let set = &self.options.fill.working_set;
        let chunk_bytes = self.memory.chunk_pages() * PAGE_SIZE;
        &set[..set.len().min(HEAD_BYTES / chunk_bytes)]
    }

    /// Brings all memory. Until the guest runs, its requests have the way for
    /// themselves: this comes after.
    fn fill(&self) -> Result<(), FeedError> {
        prefetch(&self.memory, &self.options.fill, &self.pace)?;
        // What faults have claimed is still on its way.
        while !self.memory.wait_complete(Duration::from_millis(100)) && !self.pace.is_stopped() {}
        Ok(())
    }

    /// Waits for an answer; false when there will be none.
    pub fn wait_pong(&self, value: u32) -> bool {
        self.pongs.iter().any(|pong| pong == value)
    }
}

fn io_error(error: TransportError) -> std::io::Error {
    match error {
        TransportError::Gone(error) | TransportError::Io(error) => error,
    }
}

/// The thread that reads the return path.
struct Answering {
    server: Pager,
    path: ReturnPath<UnixStream>,
    memory: Arc<Memory>,
    events: UnboundedSender<FeedEvent>,
    pongs: mpsc::Sender<u32>,
}

impl Answering {
    fn run(mut self) {
        let _last = LastWord { events: self.events.clone(), doing: "answer QEMU's requests" };
        let last = match self.answer() {
            Ok(()) => FeedEvent::Finished(self.server.into_report()),
            Err(error) => FeedEvent::Failed(error),
        };
        let _ = self.events.send(last);
    }

    fn answer(&mut self) -> Result<(), FeedError> {
        let mut block = None;
        while let Some(message) = self.path.next_message().map_err(hung_up)? {
            let heard = Instant::now();
            match message {
                ReturnPathMessage::RequestPages { block: name, offset, len } => {
                    if let Some(name) = name {
                        block = Some(self.find(&name, offset, len)?);
                    }
                    let block = block.ok_or_else(|| FeedError::Wire(nameless(offset)))?;
                    self.server.serve(block, offset, u64::from(len), heard)?;
                }
                ReturnPathMessage::Pong(value) => {
                    if value == PING_LOADED {
                        let _ = self.events.send(FeedEvent::Loaded);
                    }
                    let _ = self.pongs.send(value);
                }
                ReturnPathMessage::Shut(0) => return Ok(()),
                ReturnPathMessage::Shut(status) => return Err(FeedError::Refused(status)),
                ReturnPathMessage::Other(_) => {}
            }
        }
        Err(FeedError::HungUp)
    }

    fn find(&self, name: &str, offset: u64, len: u32) -> Result<BlockId, MemoryError> {
        let found = self.memory.blocks().iter().position(|block| block.name == name);
        found.map(|index| BlockId(index as u16)).ok_or_else(|| MemoryError::NoSuchMemory {
            block: name.into(),
            offset,
            len: u64::from(len),
        })
    }
}

/// QEMU that ends without having read all that we sent resets the connection.
fn hung_up(error: WireError) -> FeedError {
    match error {
        WireError::Io { source, .. } if source.kind() == ErrorKind::ConnectionReset => {
            FeedError::HungUp
        }
        other => other.into(),
    }
}

fn nameless(offset: u64) -> WireError {
    WireError::Malformed {
        at: 0,
        what: format!("a request for offset {offset:#x} of the block before, and there was none"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{ChunkId, ChunkReader, Location, SourceError};

    /// Memory whose index makes a thread panic.
    struct Dreadful([Block; 1]);

    struct Unused;

    impl PageSource for Dreadful {
        fn blocks(&self) -> &[Block] {
            &self.0
        }

        fn chunk_pages(&self) -> usize {
            4
        }

        fn locate(&self, _page: Page) -> Result<Location, SourceError> {
            panic!("as the test wants it")
        }

        fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
            Ok(Box::new(Unused))
        }
    }

    impl ChunkReader for Unused {
        fn read(&mut self, _chunk: ChunkId) -> Result<&[u8], SourceError> {
            Ok(&[])
        }
    }

    #[test]
    fn a_panic_is_told_to_whoever_follows() {
        let source = Dreadful([Block { name: "pc.ram".into(), len: 4096, page_size: 4096 }]);
        let prepared = Prepared::new(&[], &[], &source.0);
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let working_set = vec![Page { block: BlockId(0), number: 0 }];
        let fill = FillOptions { working_set, ..FillOptions::default() };
        let options = FeedOptions { way: Way::Socket, fill, ..FeedOptions::default() };
        let (_feed, mut told) = Feed::start(prepared, Arc::new(source), ours, options).unwrap();
        let Some(FeedEvent::Failed(error)) = told.blocking_recv() else { panic!("nothing told") };
        assert!(error.to_string().contains("was to fill memory panicked"), "{error}");
    }
}
