//! The source's side of a postcopy migration: device state first, then memory as
//! the guest asks for it, then the rest, then the end.
//!
//! Plain threads: one sends the opening and then fills memory ([`sending`]), one reads the
//! return path and answers requests ([`requests`]), and where pages go straight into QEMU's
//! memory, one more takes faults from its userfaultfd ([`direct`]). Whoever follows the
//! source hears of its steps through a channel ([`event`]).

mod direct;
mod doubts;
mod event;
mod pings;
mod requests;
mod resuming;
mod sending;
mod takeover;
mod transports;
mod unread;

use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

pub(super) use event::{LastWord, PostcopyEvent};
pub(super) use resuming::Interrupted;
pub(super) use sending::{Beginning, DeviceState};
pub(super) use transports::PostcopyOptions;

use super::error::PostcopyError;
use super::kept::Kept;
use crate::host::uffd::Uffd;
use crate::memory::{ClaimMap, Memory, Pace, Pager, repair};
use crate::page::{Block, BlockId, PageSource};
use crate::transport::{Route, SocketTransport};
use crate::wire::ReturnPath;
use direct::{SourceRoute, wake_all};
use pings::Pongs;
use requests::Requests;
use sending::Sending;
use transports::Transports;
use unread::Unread;

/// A postcopy source at work. Dropping it ends it and waits for its threads.
pub(super) struct PostcopySource {
    memory: Arc<Memory>,
    route: Arc<SourceRoute>,
    socket: UnixStream,
    pace: Arc<Pace>,
    /// Tells the thread that sends to fill memory; dropped, it tells it to end.
    release: Option<mpsc::Sender<()>>,
    events: UnboundedSender<PostcopyEvent>,
    repairing: bool,
    threads: Vec<JoinHandle<()>>,
}

impl PostcopySource {
    /// Begins to send to the QEMU at the other end of `socket`. What happens comes
    /// through the receiver.
    ///
    /// # Errors
    /// When the socket can't be shared or a thread can't be started.
    pub fn start(
        beginning: Beginning,
        pages: Arc<dyn PageSource>,
        socket: UnixStream,
        options: PostcopyOptions,
    ) -> Result<(PostcopySource, UnboundedReceiver<PostcopyEvent>), PostcopyError> {
        let share = || socket.try_clone().map_err(PostcopyError::Duplicate);
        let ledger = options.kept.as_ref().map(|kept| kept.ledger.clone());
        let transport = SocketTransport::new(share()?);
        let transport = match ledger.clone() {
            Some(ledger) => transport.telling_of_large(move |under_way| ledger.set_torn(under_way)),
            None => transport,
        };
        let route = Arc::new(Route::new(transport));
        let transport = Box::new(Arc::clone(&route));
        let memory = match &ledger {
            Some(ledger) => {
                let claims = ClaimMap::over(pages.blocks(), ledger.claim_words());
                Memory::claimed(pages, transport, claims)
            }
            None => Memory::new(pages, transport),
        };
        let pace = Arc::new(Pace::new(options.fill.rate));
        let (events, receiver) = unbounded_channel();
        let memory = Arc::new(match options.fail_on_damage {
            true => memory,
            false => {
                let events = events.clone();
                memory.telling(move |what| _ = events.send(PostcopyEvent::Unreadable(what)))
            }
        });
        let (pongs, heard) = mpsc::channel();
        let (release, released) = mpsc::channel();

        let path = Unread::new(share()?).map_err(PostcopyError::Duplicate)?;
        let path = match &beginning {
            Beginning::Interrupted(_) => path.for_us_alone(),
            Beginning::New(_) | Beginning::TakenOver(_) => path,
        };
        let requests = Requests {
            server: Pager::new(Arc::clone(&memory))?.recording(options.record),
            path: ReturnPath::new(path),
            ledger,
            memory: Arc::clone(&memory),
            events: events.clone(),
            pongs,
        };
        let standby = options.standby;
        let pongs = match &beginning {
            Beginning::New(_) => Pongs::new(heard),
            Beginning::TakenOver(_) | Beginning::Interrupted(_) => Pongs::behind_loaded(heard),
        };
        let transports = Transports {
            options,
            route: Arc::clone(&route),
            memory: Arc::clone(&memory),
            pongs,
            events: events.clone(),
        };
        let beginning = Some(beginning);
        // No thread of ours has claimed anything yet.
        let unfinished = memory.unfinished();
        let pace_of = Arc::clone(&pace);
        let sending = Sending { beginning, transports, pace: pace_of, unfinished, released };
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.into()).spawn(body);
            thread.map_err(PostcopyError::Thread)
        };
        let mut source = PostcopySource {
            memory,
            route,
            socket,
            pace,
            release: Some(release),
            events,
            repairing: false,
            threads: Vec::new(),
        };
        if !standby {
            source.release();
        }
        source.threads.push(spawn("faults", Box::new(move || requests.run()))?);
        source.threads.push(spawn("fill", Box::new(move || sending.run()))?);
        Ok((source, receiver))
    }

    /// The memory under way.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The addresses in QEMU's process of the blocks that are installed directly.
    pub fn proven_ranges(&self) -> Vec<Range<u64>> {
        let Some(direct) = self.route.direct() else { return Vec::new() };
        let blocks = self.memory.blocks().iter().enumerate();
        let range = |(index, block): (usize, &Block)| {
            let start = direct.address(BlockId(index as u16))?;
            Some(start..start + block.len)
        };
        blocks.filter_map(range).collect()
    }

    /// The userfaultfd by which memory is installed directly, and the address of each block, if it
    /// is known.
    pub fn installed(&self) -> Option<(Arc<Uffd>, Vec<Option<u64>>)> {
        let direct = self.route.direct()?;
        Some((Arc::clone(direct.uffd()), direct.addresses().to_vec()))
    }

    /// Wakes whoever waits for memory that is installed directly.
    pub fn waker(&self) -> impl Fn() + Send + use<> {
        let (route, memory) = (Arc::clone(&self.route), Arc::clone(&self.memory));
        move || {
            if let Err(error) = wake_all(&route, memory.blocks()) {
                tracing::debug!("{error}");
            }
        }
    }

    /// Has a keeper hold what a successor needs to go on: nobody held it before.
    pub fn hold(&self, kept: &Kept) -> io::Result<()> {
        kept.hold_stream(self.socket.as_fd())?;
        if let Some(direct) = self.route.direct() {
            kept.hold_direct(direct.uffd().as_fd(), direct.addresses())?;
        }
        Ok(())
    }

    /// Lets the source of a guest in standby fill memory.
    pub fn release(&self) {
        // It fails when the thread has ended, which has told why.
        let _ = self.release.as_ref().map(|release| release.send(()));
    }

    /// Tries again and again to bring what can't be read, from now on.
    ///
    /// # Errors
    /// When no thread can be started for it.
    pub fn repair(&mut self) -> Result<(), PostcopyError> {
        if std::mem::replace(&mut self.repairing, true) {
            return Ok(());
        }
        let (memory, pace) = (Arc::clone(&self.memory), Arc::clone(&self.pace));
        let events = self.events.clone();
        let last = LastWord { events: events.clone(), doing: "try again to read memory" };
        let thread = std::thread::Builder::new().name("repair".into()).spawn(move || {
            let _last = last;
            if let Err(error) = repair(&memory, &pace) {
                let _ = events.send(PostcopyEvent::Failed(error.into()));
            }
        });
        self.threads.push(thread.map_err(PostcopyError::Thread)?);
        Ok(())
    }

    /// Fills at full speed from now on.
    pub fn hurry(&self) {
        self.pace.hurry();
    }

    /// Ends a source that has failed, without waiting for its threads: one may be stuck in
    /// a read of a disk that has died.
    pub fn abandon(self) {
        let thread = std::thread::Builder::new().name("abandoned".into());
        if let Err(error) = thread.spawn(move || drop(self)) {
            tracing::debug!("no thread to wait for those of a postcopy source: {error}");
        }
    }
}

impl Drop for PostcopySource {
    fn drop(&mut self) {
        self.pace.stop();
        self.release = None;
        // Wakes the threads out of their reads and writes. QEMU may be gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Mutex;

    use super::*;
    use crate::memory::FillOptions;
    use crate::page::{ChunkId, ChunkReader, Location, Page, SourceError};
    use crate::revert::options::Placement;

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
            panic!("as the test wants")
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
        let state = DeviceState::new(&[], &[], &source.0);
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let working_set = vec![Page { block: BlockId(0), number: 0 }];
        let fill = FillOptions { working_set, ..FillOptions::default() };
        let placement = Placement::Socket;
        let options = PostcopyOptions { placement, fill, ..PostcopyOptions::default() };
        let (_source, mut told) =
            PostcopySource::start(Beginning::New(state), Arc::new(source), ours, options).unwrap();
        let Some(PostcopyEvent::Failed(error)) = told.blocking_recv() else {
            panic!("nothing told")
        };
        assert!(error.to_string().contains("was to fill memory panicked"), "{error}");
    }

    /// An image on a disk that has died: reads wait until `end` is closed.
    struct DeadDisk {
        blocks: Vec<Block>,
        read: mpsc::Sender<()>,
        end: Mutex<mpsc::Receiver<()>>,
    }

    impl PageSource for DeadDisk {
        fn blocks(&self) -> &[Block] {
            &self.blocks
        }

        fn chunk_pages(&self) -> usize {
            1
        }

        fn locate(&self, _: Page) -> Result<Location, SourceError> {
            self.read.send(()).unwrap();
            let _ = self.end.lock().unwrap().recv();
            Ok(Location::Zero)
        }

        fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
            struct None;
            impl ChunkReader for None {
                fn read(&mut self, _: ChunkId) -> Result<&[u8], SourceError> {
                    unreachable!("all pages are zero")
                }
            }
            Ok(Box::new(None))
        }
    }

    #[test]
    fn a_source_that_hangs_in_a_read_is_not_waited_for() {
        let block = Block { name: "ram".into(), len: 4096, page_size: 4096 };
        let ((read, has_read), (end, ends)) = (mpsc::channel(), mpsc::channel());
        let disk = DeadDisk { blocks: vec![block], read, end: Mutex::new(ends) };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let state = DeviceState::new(&[], &[], &disk.blocks);
        let options =
            PostcopyOptions { placement: Placement::Socket, ..PostcopyOptions::default() };
        let (source, _events) =
            PostcopySource::start(Beginning::New(state), Arc::new(disk), ours, options).unwrap();
        // REQ_PAGES_ID: what follows is 16 bytes; offset, length, the block's name.
        theirs.write_all(&[0, 3, 0, 16]).unwrap();
        theirs.write_all(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 3, b'r', b'a', b'm']).unwrap();
        has_read.recv().unwrap();
        source.abandon();
        drop(end);
    }
}
