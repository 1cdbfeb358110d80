//! A guest that was saved and goes on in its QEMU, and can be taken back to its image there.
//!
//! QEMU has write-protected its memory for the image, and has let go of it once all was sent; what
//! the guest has written since then nobody has seen. So its memory is write-protected anew, by a
//! copy of the userfaultfd that QEMU had, and then all of it is compared with the image, once: a
//! page is protected before it is looked at, and what differs counts as written.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::address::GuestAddress;
use super::event::{OnEvent, SaveEvent};
use super::options::SaveOptions;
use crate::cancel::Cancellation;
use crate::guest::device_paths;
use crate::host::pidfd::Pidfd;
use crate::host::procfs::{AddressSpace, Mapping, ProcessMemory};
use crate::host::uffd::Uffd;
use crate::image::{Image, Sections};
use crate::libvirt::block_name;
use crate::page::{Block, PageSource};
use crate::qmp::{Qmp, RamBlock};
use crate::reset::{
    Asked, GuestMemory, Requests, Reset, ResetError, ResetOutcome, ResetWay, Rewinder, SOCKET,
    StateFile, Tracker, Undo,
};
use crate::runs::{Entry, ProcessId, Record};
use crate::transport::search::{SearchError, find_among};

/// How long QEMU may take to let go of the guest's memory once it has sent all of it.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is asked for that.
const ASK_EVERY: Duration = Duration::from_millis(2);

/// How long QEMU's control socket may be taken by somebody else when a reset is asked for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The same when nothing is left to do but to tidy up.
const TIDY_TIMEOUT: Duration = Duration::from_secs(1);

/// What a save leaves of a guest that is to be reset.
pub(super) struct ToBeReset {
    pub qmp: Qmp,
    pub pid: i32,
    pub blocks: Vec<RamBlock>,
    /// Its devices at the moment, by their paths in QEMU's object tree.
    pub devices: Vec<String>,
    /// Copies of the userfaultfds that QEMU had while it sent the guest's memory.
    pub userfaultfds: Option<io::Result<Vec<Uffd>>>,
}

/// A guest that was saved, and can be taken back to its image inside its QEMU, as often as one
/// likes. Its QEMU is somebody else's, and lives on when this is dropped: the guest runs on
/// untracked. There is no connection to QEMU in between, so that others have its control socket.
pub struct SavedGuest {
    // Dropped first: the guest must not wait for whoever is told to end.
    rewinder: Rewinder,
    sections: Sections,
    socket: PathBuf,
    pid: i32,
    process: Pidfd,
    requests: Option<Requests>,
    /// Its record, which goes with it.
    _run: Option<Entry>,
}

impl SavedGuest {
    /// Begins to track the writes of a guest, and waits until it is known what it has written since
    /// the moment.
    pub(super) async fn begin(
        mut guest: ToBeReset,
        options: &SaveOptions,
        cancel: &Cancellation,
    ) -> Result<SavedGuest, ResetError> {
        let GuestAddress::Socket(socket) = &options.guest else {
            return Err(ResetError::Obstacle("libvirt would not know of it".into()));
        };
        let userfaultfds = guest.userfaultfds.take();
        let process = Pidfd::open(guest.pid).map_err(gone)?;
        let image = Image::open(&options.image)?;
        let pages = image.manifest().blocks.iter().map(Block::pages).sum();
        let (entry, requests) = match record(&options.image, guest.pid, pages, options).await {
            Ok(recorded) => recorded,
            Err(error) => return Err(ResetError::Requests(error)),
        };
        let tracked = async {
            let uffd = userfaultfd(guest.pid, userfaultfds).await?;
            let memory = guest.memory(&image).await?;
            let memory = Undo::Tracked(Tracker::start(memory, Arc::new(uffd))?);
            memory.ready().await?;
            Ok::<_, ResetError>(Arc::new(memory))
        };
        let memory = tokio::select! {
            memory = tracked => memory?,
            () = cancel.requested() => return Err(ResetError::Obstacle("interrupted".into())),
        };
        if device_paths(&guest.qmp).await? != guest.devices {
            let why = "a device was plugged in or removed since the moment";
            return Err(ResetError::Obstacle(why.into()));
        }
        let (sections, runs) = (image.sections()?, image.manifest().machine.running);
        let mut rewinder = Rewinder::new(&guest.qmp, memory, StateFile::new()?, runs).await?;
        rewinder.prepare(&guest.qmp, Some(&sections)).await?;
        rewinder.hang_up();
        let (socket, pid) = (socket.clone(), guest.pid);
        Ok(SavedGuest { rewinder, sections, socket, pid, process, requests, _run: entry })
    }

    /// QEMU's process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How many host pages the guest has written since the moment, or the last reset.
    pub fn written(&self) -> u64 {
        self.rewinder.memory().written()
    }

    /// Takes the guest back to its image: memory, devices and disks. What it has written since is
    /// gone. It runs then, if it did at the moment.
    ///
    /// # Errors
    /// Where it [`is_refusal`](ResetError::is_refusal), the guest goes on untouched; else its QEMU
    /// has been ended.
    pub async fn reset(&mut self) -> Result<Reset, ResetError> {
        let (reset, qmp) = self.rewind().await?;
        self.prepare(&qmp).await;
        Ok(reset)
    }

    /// As [`reset`](SavedGuest::reset), but does not make ready for the next one. Returns the
    /// connection as well, by which that is done.
    async fn rewind(&mut self) -> Result<(Reset, Qmp), ResetError> {
        let began = Instant::now();
        let qmp = self.connect(CONNECT_TIMEOUT).await?;
        let rewound = async {
            let pages = self.rewinder.rewind(&qmp, &self.sections).await?;
            self.rewinder.run(&qmp).await.map(|()| pages)
        };
        match rewound.await {
            Ok(pages) => {
                let took_ms = began.elapsed().as_secs_f64() * 1e3;
                Ok((Reset { pages, took_ms }, qmp))
            }
            Err(error) if error.is_refusal() => Err(error),
            Err(error) => {
                // A mixture of two moments must not run. It fails when QEMU has ended already.
                let _ = self.process.kill();
                Err(error)
            }
        }
    }

    async fn connect(&self, timeout: Duration) -> Result<Qmp, ResetError> {
        let refuse = |why: String| ResetError::Obstacle(why);
        let qmp = Qmp::connect(&self.socket, timeout).await;
        let qmp =
            qmp.map_err(|error| refuse(format!("its QEMU can't be told anything: {error}")))?;
        match qmp.peer_pid() == Some(self.pid) {
            true => Ok(qmp),
            false => Err(refuse("another QEMU listens on its control socket".into())),
        }
    }

    /// Makes ready for the next reset, while the guest runs.
    async fn prepare(&mut self, qmp: &Qmp) {
        if let Err(error) = self.rewinder.prepare(qmp, Some(&self.sections)).await {
            tracing::warn!("the next reset will have to wait for QEMU: {error}");
        }
        self.rewinder.hang_up();
    }

    /// Resets the guest whenever it is asked for by [`runs`](crate::runs), until its QEMU ends,
    /// `cancel` is requested, or somebody else wants to track its memory.
    ///
    /// # Errors
    /// When a reset has failed half-way: QEMU has been ended then.
    pub async fn serve(
        mut self,
        cancel: Cancellation,
        mut on_event: impl FnMut(SaveEvent) + Send,
    ) -> Result<(), ResetError> {
        let memory = Arc::clone(self.rewinder.memory());
        loop {
            let asked = tokio::select! {
                asked = self.asked() => asked,
                () = cancel.requested() => break,
                () = self.process.ended() => return Ok(()),
                () = memory.ended() => return Ok(()),
            };
            if !self.answer(asked, &mut on_event).await? {
                return Ok(());
            }
        }
        memory.end();
        if let Ok(qmp) = self.connect(TIDY_TIMEOUT).await
            && let Err(error) = self.rewinder.tidy_up(&qmp).await
        {
            tracing::debug!("QEMU still has the state of the devices open: {error}");
        }
        Ok(())
    }

    async fn asked(&self) -> Asked {
        match &self.requests {
            Some(requests) => requests.next().await,
            None => std::future::pending().await,
        }
    }

    /// Does what somebody asks for. Returns whether the guest's writes are still tracked.
    async fn answer(&mut self, asked: Asked, on_event: OnEvent<'_>) -> Result<bool, ResetError> {
        let asked = match self.rewinder.memory().answer(asked).await {
            ControlFlow::Continue(asked) => asked,
            ControlFlow::Break(is_tracked) => return Ok(is_tracked),
        };
        match self.rewind().await {
            Ok((reset, qmp)) => {
                asked.answer(&reset.into()).await;
                let Reset { pages, took_ms } = reset;
                on_event(SaveEvent::Reset { how: ResetWay::InPlace, pages: Some(pages), took_ms });
                self.prepare(&qmp).await;
                Ok(true)
            }
            Err(error) if error.is_refusal() => {
                let why = error.to_string();
                asked.answer(&ResetOutcome::Refused { why: why.clone() }).await;
                on_event(SaveEvent::Note { what: "the guest was not reset".to_owned(), why });
                Ok(true)
            }
            Err(error) => {
                asked.answer(&ResetOutcome::Failed { why: error.to_string() }).await;
                Err(error)
            }
        }
    }
}

impl ToBeReset {
    /// The guest's memory in QEMU's process.
    async fn memory(&self, image: &Arc<Image>) -> Result<GuestMemory, ResetError> {
        let (pid, blocks, pages) = (self.pid, self.blocks.clone(), Arc::clone(image));
        let found = tokio::task::spawn_blocking(move || addresses(pid, &blocks, &pages)).await;
        let addresses = found.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
        let failed = |source| ResetError::Memory { what: "opened", address: 0, source };
        let space = Arc::new(AddressSpace::open(pid).map_err(failed)?);
        let memory = ProcessMemory::open(pid).map_err(failed)?;
        // SAFETY: QEMU tells each address itself, or else they were found among the mappings that
        // it keeps from children, which it does with its RAMBlocks alone: as many of them are as
        // long as blocks are, and where that is more than one, their content tells which is which,
        // or it doesn't matter since the same belongs to them. QEMU keeps its RAMBlocks where they
        // are.
        unsafe { GuestMemory::new(Arc::clone(image), &addresses, space, memory) }
    }
}

/// The userfaultfd that QEMU had, once QEMU has let go of the guest's memory: what is registered
/// before that QEMU would take off again.
async fn userfaultfd(pid: i32, copies: Option<io::Result<Vec<Uffd>>>) -> Result<Uffd, ResetError> {
    let refuse = |why: String| Err(ResetError::Obstacle(why));
    let mut copies = match copies {
        Some(Ok(copies)) => copies,
        Some(Err(error)) => return refuse(format!("QEMU's userfaultfd can't be copied ({error})")),
        None => Vec::new(),
    };
    let (number, last) = (copies.len(), copies.pop());
    let (1, Some(uffd)) = (number, last) else {
        return refuse(format!("QEMU had {number} userfaultfds where one was expected"));
    };
    let until = Instant::now() + LET_GO_TIMEOUT;
    while Uffd::number_of(pid).map_err(gone)? > 0 {
        if Instant::now() > until {
            return refuse(format!("QEMU has held its memory for another {LET_GO_TIMEOUT:?}"));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    Ok(uffd)
}

/// Where QEMU has each block of an image.
fn addresses(
    pid: i32,
    blocks: &[RamBlock],
    image: &Arc<Image>,
) -> Result<Vec<Option<u64>>, ResetError> {
    let of_block = |block: &Block| {
        let found = blocks.iter().find(|ram| block_name(&ram.name) == block.name);
        found.ok_or_else(|| ResetError::Obstacle(format!("QEMU has no block `{}`", block.name)))
    };
    let blocks: Vec<&RamBlock> =
        image.manifest().blocks.iter().map(of_block).collect::<Result<_, _>>()?;
    let told: Vec<Option<u64>> = blocks.iter().map(|block| block.address).collect();
    if told.iter().all(Option::is_some) {
        return Ok(told);
    }
    let refused = |error: SearchError| match error {
        SearchError::NotThere { block, .. } | SearchError::Alike { block, .. } => {
            ResetError::Obstacle(format!("it can't be told where QEMU has the memory of `{block}`"))
        }
        error => ResetError::Obstacle(error.to_string()),
    };
    let failed = |source| ResetError::Memory { what: "found", address: 0, source };
    let mappings = Mapping::kept_from_children_of(pid).map_err(failed)?;
    let mapped = blocks.iter().map(|block| block.total_len).collect();
    find_among(pid, image as &dyn PageSource, mappings, mapped).map_err(refused)
}

/// Records a guest, and listens for whoever wants it reset, where that was asked for.
async fn record(
    image: &Path,
    pid: i32,
    pages: u64,
    options: &SaveOptions,
) -> io::Result<(Option<Entry>, Option<Requests>)> {
    let Some(run) = &options.run else { return Ok((None, None)) };
    let record = Record {
        qemu: ProcessId::of(pid),
        resident: true,
        ..Record::new(std::path::absolute(image)?, pages)
    };
    let entry = Entry::begin(run, record);
    if !entry.has_begun().await {
        return Err(io::Error::other("the guest can't be recorded"));
    }
    let requests = Requests::listen(&entry.directory().join(SOCKET))?;
    Ok((Some(entry), Some(requests)))
}

/// That QEMU has ended.
fn gone(error: io::Error) -> ResetError {
    ResetError::Obstacle(format!("QEMU has ended ({error})"))
}
