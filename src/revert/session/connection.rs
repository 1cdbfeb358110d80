//! A session's QEMU and what brings its guest's memory: what the states from Launched on
//! have in common.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::away::{self, StoreWatch};
use super::confined::{Confined, Confinement};
use super::contents::Contents;
use super::halt::Halt;
use super::lifecycle::{Lifecycle, Next, Told};
use super::preparation::{Placed, Preparation};
use super::qemu::{Qemu, has_run, migrate_from};
use super::reconnect::Resuming;
use super::reports::{Reports, migration, reported, resumed};
use crate::cancel::Cancellation;
use crate::far::Answering;
use crate::host::procfs::AddressSpace;
use crate::image::Image;
use crate::keeper::{Keeper, Ledger};
use crate::memory::working_set::RECORD_WINDOW;
use crate::memory::{FillOptions, Unreadable};
use crate::page::PageSource;
use crate::qmp::Qmp;
use crate::reset::ResetError;
use crate::revert::collapse::Collapsing;
use crate::revert::eager::EagerSource;
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::event::{OnEvent, Progress, RevertEvent};
use crate::revert::kept::Kept;
use crate::revert::options::Delivery;
use crate::revert::rtc::Rtc;
use crate::revert::source::{Beginning, Interrupted, PostcopyOptions, PostcopySource};
use crate::revert::unreadable::describe;
use crate::runs::Entry;

/// How often QEMU is asked how far it is with a guest whose memory it maps. Its event MIGRATION
/// comes only with the capability `events`.
const POLL: Duration = Duration::from_millis(5);

/// The shortest time between two reports of progress, whatever is asked for.
const SHORTEST_TICK: Duration = Duration::from_millis(1);

/// What the states from Launched on have in common.
pub(super) struct Connection {
    // Dropped before the source: a guest whose source has ended would only wait.
    pub qemu: Qemu,
    /// None before the guest is armed, and where QEMU maps its memory.
    source: Option<Source>,
    reports: Reports,
    pub lifecycle: Lifecycle,
    pub image: Arc<Image>,
    /// What the image's pages are read by.
    pub pages: Arc<dyn PageSource>,
    pub delivery: Delivery,
    pub cancel: Cancellation,
    kept: Option<Kept>,
    pub confinement: Confinement,
    /// QEMU's memory as /proc shows it, where this process may not open that any more, or has taken
    /// over.
    pub space: Option<Arc<AddressSpace>>,
    /// What the machine's battery-backed clock shows.
    pub rtc: Rtc,
    /// Whether the guest is to be reset inside its QEMU.
    pub resettable: bool,
    /// What that needs, once it has been prepared.
    preparation: Option<Result<Preparation, ResetError>>,
    /// The blocks that QEMU maps: their names in the image, and in QEMU.
    pub mapped: Vec<(String, String)>,
    /// Whether it is decided by which transport memory goes.
    placed: bool,
    /// Set where the session began with a QEMU whose channel was lost.
    pub resuming: Option<Resuming>,
    halt: Halt,
    /// Whether the store of a snapshot that is far away answers.
    pub store: Option<StoreWatch>,
    /// Whether its disks follow once its memory is in place, and a successor is needed until they have.
    pub disks_follow: bool,
    /// The last memory that could not be read.
    unreadable: Option<PostcopyError>,
    /// Told last that this session needs no successor.
    pub keeper: Option<Keeper>,
    /// Dropped last: what QEMU leaves is seen by then.
    pub run: Option<Entry>,
}

/// What brings a guest's memory from here.
enum Source {
    Postcopy(PostcopySource),
    Eager(EagerSource),
}

impl Connection {
    pub fn new(
        qemu: Qemu,
        lifecycle: Lifecycle,
        image: Arc<Image>,
        delivery: Delivery,
        cancel: Cancellation,
    ) -> Connection {
        let events = qemu.qmp().map(Qmp::events);
        Connection {
            qemu,
            source: None,
            reports: Reports { events, ..Reports::default() },
            lifecycle,
            pages: Arc::new(Arc::clone(&image)),
            image,
            delivery,
            cancel,
            kept: None,
            confinement: Confinement::None,
            space: None,
            rtc: Rtc::default(),
            resettable: false,
            preparation: None,
            mapped: Vec::new(),
            placed: false,
            resuming: None,
            halt: Halt::default(),
            store: None,
            disks_follow: false,
            unreadable: None,
            keeper: None,
            run: None,
        }
    }

    /// Has a keeper start a successor, should this process be killed while the guest needs it.
    pub fn keep(&mut self, keeper: Keeper, kept: Kept) {
        (self.keeper, self.kept) = (Some(keeper), Some(kept));
    }

    /// Notes that the guest runs: a successor can go on from here.
    pub fn note_running(&mut self) {
        let is_served = matches!(self.source, Some(Source::Postcopy(_)));
        match &self.kept {
            Some(kept) if is_served || self.disks_follow => {
                if !is_served {
                    // All its memory is there already.
                    kept.ledger.set_resident();
                }
                // QEMU took longer to start than it does: this rarely waits.
                if let Some(keeper) = &mut self.keeper {
                    keeper.wait_started();
                }
                kept.ledger.set_running();
            }
            _ => self.keeper = None,
        }
    }

    /// The ledger of a session that needs a successor for its disks once all memory is in place.
    pub fn disks_ledger(&self) -> Option<Ledger> {
        let kept = self.kept.as_ref().filter(|_| self.disks_follow);
        kept.map(|kept| kept.ledger.clone())
    }

    /// Gives QEMU its guest, by this socket or else by one that it is handed by QMP.
    pub async fn begin(
        &mut self,
        contents: Contents,
        socket: Option<UnixStream>,
    ) -> Result<(), RevertError> {
        if let Some(socket) = socket {
            return self.send(contents, socket);
        }
        let (ours, theirs) = socket_pair()?;
        if let Some(kept) = &self.kept {
            kept.hold_stream(ours.as_fd()).map_err(PostcopyError::Duplicate)?;
        }
        let Some(qmp) = self.qemu.qmp().cloned() else { return self.send(contents, ours) };
        let capabilities = contents.capabilities();
        migrate_from(&qmp, capabilities, theirs, |capable| {
            let contents = match capable {
                Ok(()) => contents,
                Err(error) => contents.without_postcopy(&self.qemu, error)?,
            };
            self.send(contents, ours)
        })
        .await
    }

    /// Begins to send a guest's contents.
    fn send(&mut self, contents: Contents, socket: UnixStream) -> Result<(), RevertError> {
        match contents {
            Contents::Mapped(stream) => {
                stream.send(socket).map_err(PostcopyError::Thread)?;
                self.reports.poll = Some(tokio::time::interval(POLL));
            }
            Contents::Eager { stream, reason } => {
                let (source, reports) = stream.send(socket, reason)?;
                self.source = Some(Source::Eager(source));
                self.reports.source = Some(reports);
            }
            Contents::Postcopy { device_state, fill, .. } => {
                self.start_source(Beginning::New(device_state), socket, fill)?;
            }
        }
        Ok(())
    }

    /// Serves a guest that runs, in the place of a process that has died.
    pub fn take_over(
        &mut self,
        socket: UnixStream,
        userfaultfd: Option<OwnedFd>,
        fill: FillOptions,
    ) -> Result<(), PostcopyError> {
        self.start_source(Beginning::TakenOver(userfaultfd), socket, fill).map(drop)
    }

    /// Serves a guest that runs, in the place of a process of which nothing is left. Returns what
    /// wakes whoever waits for memory.
    pub fn take_up(
        &mut self,
        interrupted: Interrupted,
        socket: UnixStream,
        fill: FillOptions,
    ) -> Result<impl Fn() + Send + use<>, PostcopyError> {
        let source = self.start_source(Beginning::Interrupted(interrupted), socket, fill)?;
        Ok(source.waker())
    }

    fn start_source(
        &mut self,
        beginning: Beginning,
        socket: UnixStream,
        fill: FillOptions,
    ) -> Result<&PostcopySource, PostcopyError> {
        let options = PostcopyOptions {
            placement: self.delivery.placement,
            pid: self.qemu.pid(),
            fill,
            preload: self.lifecycle.preload(),
            standby: self.lifecycle.is_held(),
            record: match (self.delivery.hold, self.delivery.working_set) {
                (Some(hold), _) => hold,
                (None, true) => RECORD_WINDOW,
                (None, false) => Duration::ZERO,
            },
            space: self.space.clone(),
            fail_on_damage: self.delivery.fail_on_damage,
            kept: self.kept.clone(),
        };
        let pages = Arc::clone(&self.pages);
        let (source, reports) = PostcopySource::start(beginning, pages, socket, options)?;
        self.reports.source = Some(reports);
        match self.source.insert(Source::Postcopy(source)) {
            Source::Postcopy(source) => Ok(source),
            Source::Eager(_) => unreachable!("another has just been put there"),
        }
    }

    /// Goes on to the session's next state, doing what has to be done before, and telling how
    /// memory comes in.
    pub async fn advance(&mut self, on_event: OnEvent<'_>) -> Result<(), RevertError> {
        let mut tick = tokio::time::interval(self.delivery.progress_every.max(SHORTEST_TICK));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = None;
        // What has been seen by a future that was dropped is seen again, which does no harm.
        let mut store = self.store.clone();
        loop {
            self.confine();
            let next = tokio::select! {
                biased;
                next = self.next() => next?,
                _ = tick.tick(), if self.is_filling() => {
                    let now = self.progress();
                    if told.replace(now) != Some(now) {
                        on_event(RevertEvent::Progress(now));
                    }
                    continue;
                }
                answering = away::changed(&mut store) => {
                    self.store = store.clone();
                    self.tell_store(answering, on_event).await;
                    continue;
                }
            };
            match next {
                Next::Placing { placement, reason } => {
                    self.placed = true;
                    if let Some(run) = &self.run {
                        run.note(move |record| record.way = Some(placement.name().to_owned()));
                    }
                    on_event(RevertEvent::Placing { placement, reason });
                }
                Next::TakenOver => on_event(self.taken_over()),
                Next::Reconnected => self.reconnected().await?,
                Next::Continue => {
                    self.qemu.run_guest().await?;
                    self.lifecycle.hear(Told::Resumed)?;
                }
                Next::AskStatus => {
                    let told = self.ask_status().await?;
                    self.lifecycle.hear(told)?;
                }
                Next::Unreadable => self.tell_unreadable(on_event).await?,
                Next::GiveUp => {
                    return Err(self.unreadable.take().unwrap_or(PostcopyError::HungUp).into());
                }
                Next::Armed | Next::Running | Next::Resident => return Ok(()),
            }
        }
    }

    /// Enters the sandbox, where one is wanted, once the guest is served and nothing is left to be
    /// done that takes more rights.
    fn confine(&mut self) {
        let is_connected = self.resuming.is_none() || self.qemu.qmp().is_some();
        let is_time = self.placed && is_connected && self.serves_running();
        if !is_time || !matches!(self.confinement, Confinement::Wanted(_)) {
            return;
        }
        let pid = self.qemu.pid();
        // Where it can't be looked into, memory is not collapsed, and a successor goes without.
        let space = pid.and_then(|pid| AddressSpace::open(pid).ok()).map(Arc::new);
        self.space = space.or(self.space.take());
        self.prepare_reset();
        let Connection { confinement, qemu, space, image, delivery, kept, run, .. } = self;
        confinement.enter(&Confined {
            qemu,
            space: space.as_deref(),
            image,
            delivery,
            kept: kept.as_ref(),
            run: run.as_ref(),
        });
    }

    /// Prepares a reset inside QEMU, where one is wanted.
    fn prepare_reset(&mut self) {
        let (true, None, Some(pid)) = (self.resettable, &self.preparation, self.qemu.pid()) else {
            return;
        };
        self.preparation = Some(Preparation::new(pid, self.space.clone(), self.run.as_ref()));
    }

    /// What a reset inside QEMU needs; none where none is wanted.
    pub fn take_preparation(&mut self) -> Option<Result<Preparation, ResetError>> {
        self.prepare_reset();
        self.preparation.take()
    }

    /// How its memory came; none where that is no way from which it could be taken back.
    pub fn placed(&self) -> Option<Placed> {
        match &self.source {
            Some(Source::Postcopy(source)) => {
                let (uffd, addresses) = source.installed()?;
                Some(Placed::Installed { uffd, addresses })
            }
            None if !self.mapped.is_empty() => Some(Placed::Mapped(self.mapped.clone())),
            _ => None,
        }
    }

    /// That this process has taken the place of another.
    fn taken_over(&self) -> RevertEvent {
        let ledger = self.kept.as_ref().map(|kept| &kept.ledger);
        let restarts = ledger.map_or(0, Ledger::restarts);
        let (by, after_ms) = match &self.resuming {
            Some(resuming) => ("resume", resuming.began.elapsed().as_secs_f64() * 1e3),
            None => ("keeper", ledger.map_or(0.0, Ledger::died_ms_ago)),
        };
        RevertEvent::TakenOver { by: by.to_owned(), after_ms, restarts }
    }

    /// QEMU goes on by the new stream: what a successor needs is there, and the keeper holds it.
    async fn reconnected(&mut self) -> Result<(), RevertError> {
        let Some(resuming) = &mut self.resuming else { return Ok(()) };
        let Some(qmp) = resuming.connected().await? else { return Ok(()) };
        let pid = self.qemu.pid();
        if let (Some(kept), Some(Source::Postcopy(source)), Some(pid)) =
            (&self.kept, &self.source, pid)
        {
            let held = source.hold(kept).and_then(|()| kept.hold_orphan(pid, &qmp));
            held.map_err(PostcopyError::Duplicate)?;
        }
        self.qemu = Qemu::Theirs { qmp: Some(qmp), pid };
        Ok(())
    }

    /// Tells of memory that can't be read, and begins to try again; or of memory that can be
    /// read again, and has a guest run that was stopped for it.
    async fn tell_unreadable(&mut self, on_event: OnEvent<'_>) -> Result<(), RevertError> {
        let (memory, awaited) = match self.lifecycle.take_unreadable() {
            Some(Unreadable::PassedOver(error)) => (error, false),
            Some(Unreadable::Awaited(error)) => (error, true),
            Some(Unreadable::Over) => {
                on_event(RevertEvent::Repaired);
                self.run_again(on_event).await;
                return Ok(());
            }
            None => return Ok(()),
        };
        let (memory, error) = describe(&self.image, memory);
        self.unreadable = Some(error);
        let is_away = self.store.as_ref().is_some_and(StoreWatch::fails);
        let reason = if is_away { "store" } else { "unreadable" }.to_owned();
        on_event(match awaited {
            true => RevertEvent::Stopped { reason, memory: Some(memory), store: None },
            false => RevertEvent::Degraded(memory),
        });
        if let (Some(qmp), true) = (self.qemu.qmp(), awaited) {
            self.halt.stop(qmp, self.kept.as_ref().map(|kept| &kept.ledger));
        }
        if let Some(Source::Postcopy(source)) = &mut self.source {
            source.repair()?;
        }
        Ok(())
    }

    /// Notes that the store has ceased to answer, or answers again.
    async fn tell_store(&mut self, answering: Answering, on_event: OnEvent<'_>) {
        let ledger = self.kept.as_ref().map(|kept| &kept.ledger);
        let qemu = (self.qemu.qmp(), ledger);
        let can_run = away::note(answering, &mut self.halt, qemu, self.run.as_ref(), on_event);
        // Memory that it waits for as well is told when it has come.
        if can_run && !self.lifecycle.is_stopped() {
            on_event(RevertEvent::Repaired);
            self.run_again(on_event).await;
        }
    }

    /// Has a guest run again that QEMU was told to stop, since it waited for memory.
    pub async fn run_again(&mut self, on_event: OnEvent<'_>) {
        let ledger = self.kept.as_ref().map(|kept| &kept.ledger);
        if !self.halt.is_stopped(ledger) {
            return;
        }
        let Some(qmp) = self.qemu.last_qmp().await else { return };
        if let Err(error) = self.halt.run(&qmp, ledger).await {
            on_event(RevertEvent::Note {
                what: "the guest was stopped, and may stand still".to_owned(),
                why: format!("QEMU was not had to run it again: {error}"),
            });
        }
    }

    async fn next(&mut self) -> Result<Next, RevertError> {
        loop {
            if let Some(next) = self.lifecycle.next() {
                return Ok(next);
            }
            let told = self.listen().await?;
            self.lifecycle.hear(told)?;
        }
    }

    /// Waits for the next report of QEMU or the source. Safe to cancel.
    async fn listen(&mut self) -> Result<Told, RevertError> {
        let Connection { qemu, reports, lifecycle, resuming, .. } = self;
        let Reports { events, source, poll } = reports;
        let awaits_qemu = lifecycle.awaits_qemu();
        tokio::select! {
            told = resumed(events), if awaits_qemu => Ok(told?),
            told = migration(poll, qemu.qmp()), if awaits_qemu => Ok(told?),
            event = reported(source), if !lifecycle.is_finished() => Ok(Told::Source(event)),
            error = refused(resuming) => Err(error),
        }
    }

    async fn ask_status(&mut self) -> Result<Told, RevertError> {
        let (Some(qmp), Some(events)) = (self.qemu.qmp(), &mut self.reports.events) else {
            return Ok(Told::Resumed);
        };
        let status = qmp.status().await?;
        // It may have run and stand still again; its events came ahead of the answer.
        let has_run = tokio::time::timeout(Duration::ZERO, has_run(events)).await == Ok(true);
        Ok(Told::Status { status, has_run })
    }

    /// Lets a guest in standby go on, and its memory be filled.
    pub fn release(&mut self) -> Result<(), RevertError> {
        if let Some(Source::Postcopy(source)) = &self.source {
            source.release();
        }
        self.lifecycle.hear(Told::Released)
    }

    /// Fills memory at full speed from now on.
    pub fn hurry(&self) {
        if let Some(Source::Postcopy(source)) = &self.source {
            source.hurry();
        }
    }

    /// How far memory has come.
    pub fn progress(&self) -> Progress {
        let total = || self.image.manifest().blocks.iter().map(|block| block.pages()).sum();
        match &self.source {
            Some(Source::Postcopy(source)) => {
                let counts = source.memory().counts();
                Progress { pages: counts.present, total: counts.total, requests: counts.requests }
            }
            Some(Source::Eager(source)) => {
                Progress { pages: source.sent(), total: total(), requests: 0 }
            }
            None => {
                let total = total();
                let pages = if self.lifecycle.is_finished() { total } else { 0 };
                Progress { pages, total, requests: 0 }
            }
        }
    }

    /// What is to be collapsed once all memory is in place.
    pub fn collapsing(&self) -> Option<Collapsing> {
        let (pid, Some(Source::Postcopy(source))) = (self.qemu.pid()?, &self.source) else {
            return None;
        };
        let memory = source.proven_ranges();
        let wanted = self.delivery.collapse && !memory.is_empty();
        let space = self.space.clone();
        wanted.then_some(Collapsing { pid, space, memory, rate: self.delivery.fill_rate })
    }

    /// Whether memory comes in: what is served, once the guest runs.
    fn is_filling(&self) -> bool {
        match &self.source {
            Some(Source::Eager(_)) => !self.lifecycle.is_finished(),
            _ => self.lifecycle.is_running(),
        }
    }

    /// Whether the guest runs and is served.
    fn serves_running(&self) -> bool {
        matches!(self.source, Some(Source::Postcopy(_))) && self.lifecycle.is_running()
    }

    /// That the session was cancelled before its guest ran.
    pub fn cancelled(&self) -> RevertError {
        RevertError::Interrupted(match self.qemu.is_ours() {
            true => "the guest did not run yet; it was ended",
            false => "the guest did not run yet",
        })
    }

    /// Ends a session that has failed: its QEMU as well, if it is ours. Returns the error with
    /// what QEMU had to say.
    pub async fn fail(mut self, error: RevertError) -> RevertError {
        let error = match self.qemu.is_ours() {
            true => {
                let ends = error.is_end_of_qemu();
                let status = if ends { self.qemu.end_status().await } else { None };
                error.with_end_of_qemu(status, &self.qemu.words())
            }
            false if self.lifecycle.has_loaded() => error,
            false => refusal(error),
        };
        self.end().await;
        error
    }

    /// Ends a session: its QEMU as well, if it is ours.
    pub async fn end(&mut self) {
        self.qemu.kill().await;
        if let Some(run) = self.run.as_ref().filter(|_| self.qemu.is_ours()) {
            run.note(|record| record.qemu = None);
        }
        if let Some(Source::Postcopy(source)) = self.source.take() {
            source.abandon();
        }
        self.qemu.settle_overlays().await;
    }
}

/// What a QEMU of somebody else's means that hangs up while it is given the guest. Its own
/// words don't come to us.
fn refusal(error: RevertError) -> RevertError {
    let RevertError::Postcopy {
        error: PostcopyError::HungUp | PostcopyError::Opening(_) | PostcopyError::Stream(_),
        ..
    } = error
    else {
        return error;
    };
    let what = "QEMU refused the migration: it must be the machine that was saved, with the \
                capability `postcopy-ram` on unless its memory comes by `Placement::Eager`; its \
                standard error says more";
    let source = std::io::ErrorKind::ConnectionAborted.into();
    RevertError::Socket { what: what.into(), source }
}

/// The two ends of the migration stream.
pub(super) fn socket_pair() -> Result<(UnixStream, UnixStream), RevertError> {
    UnixStream::pair().map_err(|source| RevertError::Socket {
        what: "making a socket for the migration stream failed".into(),
        source,
    })
}

/// Waits until QEMU refuses a new stream.
async fn refused(resuming: &mut Option<Resuming>) -> RevertError {
    match resuming {
        Some(resuming) => resuming.refused().await,
        None => std::future::pending().await,
    }
}
