//! The source's side of a postcopy migration: device state first, then memory as
//! the guest asks for it, then the rest, then good-bye.
//!
//! Two plain threads: one sends the opening and then fills memory, one reads the
//! return path and answers requests. Whoever follows the feed hears of its steps
//! through a channel.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::memory::{FaultServer, Memory, MemoryError, SocketPlace, prefetch};
use crate::page::{Block, BlockId, PageSource};
use crate::wire::{Opening, ReturnPath, ReturnPathMessage, WireError, closing, package};

/// PINGs, told apart by their values.
const PING_OPENED: u32 = 1;
const PING_LISTENING: u32 = 2;
const PING_LOADED: u32 = 3;

/// What a feed has to say.
#[derive(Debug)]
pub enum FeedEvent {
    /// The device state is in; QEMU runs the guest next.
    Loaded,
    /// QEMU has confirmed that it has everything. The last event.
    Finished,
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

/// A feed under way. Dropping it ends it and waits for its threads.
pub struct Feed {
    memory: Arc<Memory>,
    socket: UnixStream,
    stop: Arc<AtomicBool>,
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
        prefetch_threads: usize,
    ) -> Result<(Feed, UnboundedReceiver<FeedEvent>), FeedError> {
        let share = || socket.try_clone().map_err(FeedError::Thread);
        let place = SocketPlace::new(share()?);
        let memory = Arc::new(Memory::new(source, Box::new(place)));
        let stop = Arc::new(AtomicBool::new(false));
        let (events, receiver) = unbounded_channel();
        let (loaded, device_state_is_in) = mpsc::channel();

        let answering = Answering {
            server: FaultServer::new(Arc::clone(&memory))?,
            path: ReturnPath::new(share()?),
            memory: Arc::clone(&memory),
            events: events.clone(),
            loaded,
        };
        let filling = Filling {
            prepared,
            socket: share()?,
            memory: Arc::clone(&memory),
            stop: Arc::clone(&stop),
            prefetch_threads,
            device_state_is_in,
        };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(body).map_err(FeedError::Thread)
        };
        let mut feed = Feed { memory, socket, stop, threads: Vec::new() };
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
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
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
    socket: UnixStream,
    memory: Arc<Memory>,
    stop: Arc<AtomicBool>,
    prefetch_threads: usize,
    device_state_is_in: mpsc::Receiver<()>,
}

impl Filling {
    fn run(mut self) -> Result<(), FeedError> {
        self.socket.write_all(&self.prepared.opening).map_err(FeedError::Opening)?;
        self.socket.write_all(&self.prepared.package).map_err(FeedError::Opening)?;
        // Until the guest runs, its requests have the stream for themselves. An end
        // of the other thread is that thread's to report.
        if self.device_state_is_in.recv().is_err() {
            return Ok(());
        }
        prefetch(&self.memory, self.prefetch_threads, &self.stop)?;
        // What faults have claimed is still on its way.
        while !self.memory.wait_complete(Duration::from_millis(100)) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
        self.socket.write_all(&closing()).map_err(|_| FeedError::HungUp)
    }
}

/// The thread that reads the return path.
struct Answering {
    server: FaultServer,
    path: ReturnPath<UnixStream>,
    memory: Arc<Memory>,
    events: UnboundedSender<FeedEvent>,
    loaded: mpsc::Sender<()>,
}

impl Answering {
    fn run(mut self) {
        let last = self.answer().map_or_else(FeedEvent::Failed, |()| FeedEvent::Finished);
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
                ReturnPathMessage::Pong(PING_LOADED) => {
                    let _ = self.loaded.send(());
                    let _ = self.events.send(FeedEvent::Loaded);
                }
                ReturnPathMessage::Shut(0) => return Ok(()),
                ReturnPathMessage::Shut(status) => return Err(FeedError::Refused(status)),
                ReturnPathMessage::Pong(_) | ReturnPathMessage::Other(_) => {}
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
