//! The source's side of a postcopy migration: device state first, then memory as
//! the guest asks for it, then the rest, then good-bye.
//!
//! Plain threads: one sends the opening and then fills memory, one reads the return
//! path and answers requests, and where pages go straight into QEMU's memory, one more
//! takes faults from its userfaultfd. Whoever follows the feed hears of its steps
//! through a channel.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::adopt::{AdoptError, Adopted, Probe};
use crate::memory::{
    DirectPlace, FaultReport, FaultServer, FillOptions, Intake, Memory, MemoryError, Pace,
    PlaceError, Route, SocketPlace, StopIntake, prefetch, preload,
};
use crate::page::{Block, BlockId, PageSource};
use crate::wire::{Opening, ReturnPath, ReturnPathMessage, WireError, closing, package, ping};

/// PINGs, told apart by their values.
const PING_OPENED: u32 = 1;
const PING_LISTENING: u32 = 2;
const PING_LOADED: u32 = 3;
const PING_PROBED: u32 = 4;

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
    Adopt(#[from] AdoptError),
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

/// By which way pages reach the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Straight into memory by QEMU's userfaultfd where that can be had, else by the
    /// socket.
    #[default]
    Auto,
    /// By userfaultfd for every block, or not at all.
    Uffd,
    /// By QEMU's postcopy socket.
    Socket,
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
type FeedRoute = Route<SocketPlace<UnixStream>>;

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
        let route = Arc::new(Route::new(SocketPlace::new(share()?)));
        let memory = Arc::new(Memory::new(source, Box::new(Arc::clone(&route))));
        let pace = Arc::new(Pace::new(options.fill.rate));
        let (events, receiver) = unbounded_channel();
        let (pongs, heard) = mpsc::channel();

        let answering = Answering {
            server: FaultServer::new(Arc::clone(&memory))?.recording(options.record),
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
struct Filling {
    prepared: Prepared,
    options: FeedOptions,
    route: Arc<FeedRoute>,
    memory: Arc<Memory>,
    pace: Arc<Pace>,
    pongs: mpsc::Receiver<u32>,
    events: UnboundedSender<FeedEvent>,
}

impl Filling {
    fn run(mut self) -> Result<(), FeedError> {
        let opening = |e| FeedError::Opening(io_error(e));
        self.route.first().send(&self.prepared.opening).map_err(opening)?;
        self.route.first().send(&self.prepared.package).map_err(opening)?;
        // The other thread's end means an end of the feed, and is told by that thread.
        let Some(loaded) = self.open_the_way()? else { return Ok(()) };
        let intake = self.start_intake()?;
        // The guest will want its working set at once; the rest waits until it runs.
        if self.options.preload || self.route.direct().is_some() {
            preload(&self.memory, &self.options.fill, &self.pace)?;
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

    /// Brings all memory. Until the guest runs, its requests have the way for
    /// themselves: this comes after.
    fn fill(&self) -> Result<(), FeedError> {
        prefetch(&self.memory, &self.options.fill, &self.pace)?;
        // What faults have claimed is still on its way.
        while !self.memory.wait_complete(Duration::from_millis(100)) && !self.pace.is_stopped() {}
        Ok(())
    }

    /// Waits for an answer; false when there will be none.
    fn wait_pong(&self, value: u32) -> bool {
        self.pongs.iter().any(|pong| pong == value)
    }

    /// Opens the direct way where it is wanted and can be had, and says which way is
    /// taken. Returns whether the device state is in by then; nothing when the feed has
    /// ended.
    fn open_the_way(&mut self) -> Result<Option<bool>, FeedError> {
        if self.options.way == Way::Socket {
            self.tell(Way::Socket, "as was asked for");
            return Ok(Some(false));
        }
        if !self.wait_pong(PING_LISTENING) {
            return Ok(None);
        }
        let adopted = self.options.pid.ok_or(AdoptError::Unseen).and_then(Adopted::adopt);
        let adopted = match adopted {
            Ok(adopted) => adopted,
            Err(reason) if self.options.way == Way::Uffd => return Err(reason.into()),
            Err(reason) => {
                self.tell(Way::Socket, &reason.to_string());
                return Ok(Some(false));
            }
        };
        let mut server = FaultServer::new(Arc::clone(&self.memory))?;
        let mut probes = Vec::new();
        for (index, block) in self.memory.blocks().iter().enumerate() {
            let mut probe = None;
            server.probe(BlockId(index as u16), |offset, content| {
                probe = adopted.probe(block, offset, content);
            })?;
            probes.push(probe);
        }
        self.route.first().send(&ping(PING_PROBED)).map_err(|_| FeedError::HungUp)?;
        let mut loaded = false;
        loop {
            match self.pongs.recv() {
                Ok(PING_PROBED) => break,
                Ok(PING_LOADED) => loaded = true,
                Ok(_) => {}
                Err(_) => return Ok(None),
            }
        }
        let prove = |probe: &Option<Probe>| probe.as_ref().and_then(|p| adopted.prove(p));
        let addresses: Vec<_> = probes.iter().map(prove).collect();
        let blocks = self.memory.blocks().iter().zip(&addresses);
        let unproven: Vec<_> =
            blocks.filter(|(_, at)| at.is_none()).map(|(block, _)| block.name.as_str()).collect();
        match (unproven.is_empty(), self.options.way) {
            (true, _) => self.tell(Way::Uffd, "every block's address is proven"),
            (false, Way::Uffd) => return Err(FeedError::Unproven(unproven.join(", "))),
            (false, _) => {
                let reason = format!("by socket, as not found: {}", unproven.join(", "));
                self.tell(Way::Uffd, &reason);
            }
        }
        // SAFETY: each address has been proven to be the block's, in the process whose
        // userfaultfd this is, in a mapping that is registered with it.
        let direct = unsafe { DirectPlace::new(Arc::new(adopted.uffd), addresses) };
        self.route.open_direct(direct);
        Ok(Some(loaded))
    }

    fn tell(&self, way: Way, reason: &str) {
        let _ = self.events.send(FeedEvent::Placing { way, reason: reason.to_owned() });
    }

    /// Starts to take faults from userfaultfd, beside QEMU's own thread. Only when every
    /// block's address is known: an event that we take reaches nobody else.
    fn start_intake(&self) -> Result<Option<RunningIntake>, FeedError> {
        let Some(direct) = self.route.direct().filter(|direct| direct.has_all_blocks()) else {
            return Ok(None);
        };
        let (intake, stop) = Intake::new(Arc::clone(&self.memory), direct)?;
        let intake = intake.recording(self.options.record);
        let events = self.events.clone();
        let run = move || match intake.run() {
            Ok(report) => Some(report),
            Err(error) => {
                let _ = events.send(FeedEvent::Failed(error.into()));
                None
            }
        };
        let thread = std::thread::Builder::new().name("intake".into()).spawn(run);
        let thread = Some(thread.map_err(FeedError::Thread)?);
        Ok(Some(RunningIntake { stop, thread }))
    }
}

/// An intake's thread, ended with this value.
struct RunningIntake {
    stop: StopIntake,
    thread: Option<JoinHandle<Option<FaultReport>>>,
}

impl RunningIntake {
    /// Ends it, and returns what it has seen.
    fn finish(mut self) -> Option<FaultReport> {
        self.stop.stop();
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for RunningIntake {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn io_error(error: PlaceError) -> std::io::Error {
    match error {
        PlaceError::Gone(error) | PlaceError::Io(error) => error,
    }
}

/// The thread that reads the return path.
struct Answering {
    server: FaultServer,
    path: ReturnPath<UnixStream>,
    memory: Arc<Memory>,
    events: UnboundedSender<FeedEvent>,
    pongs: mpsc::Sender<u32>,
}

impl Answering {
    fn run(mut self) {
        let last = match self.answer() {
            Ok(()) => FeedEvent::Finished(self.server.into_report()),
            Err(error) => FeedEvent::Failed(error),
        };
        let _ = self.events.send(last);
    }

    fn answer(&mut self) -> Result<(), FeedError> {
        let mut block = None;
        while let Some(message) = self.path.next_message()? {
            match message {
                ReturnPathMessage::RequestPages { block: name, offset, len } => {
                    if let Some(name) = name {
                        block = Some(self.find(&name, offset, len)?);
                    }
                    let block = block.ok_or_else(|| FeedError::Wire(nameless(offset)))?;
                    self.server.serve(block, offset, u64::from(len))?;
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

fn nameless(offset: u64) -> WireError {
    WireError::Malformed {
        at: 0,
        what: format!("a request for offset {offset:#x} of the block before, and there was none"),
    }
}
