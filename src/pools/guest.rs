//! One guest of a pool: its session, in a task of its own that obeys commands.

use std::collections::BTreeMap;
use std::future::Future;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::error::PoolError;
use super::event::GuestView;
use super::figures::Counted;
use super::saved::{SavedGuest, StateDirectory};
use super::template::{Place, Template};
use crate::cancel::Cancellation;
use crate::host::pidfd::Pidfd;
use crate::page::PAGE_SIZE;
use crate::revert::session::{Armed, Planned, Resettable, Resident, Running};
use crate::revert::{Progress, ResetWay, RevertError, RevertEvent};
use crate::runs::{self, ProcessId};

/// How long a QEMU that was killed may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// What a guest is told.
pub(super) enum Command {
    /// To run, for whoever asked at `began`.
    Take { began: Instant, name: Option<String>, reply: oneshot::Sender<Result<(), RevertError>> },
    /// To go back to its image.
    Reset { reply: oneshot::Sender<Result<ResetDone, RevertError>> },
    /// To end.
    Release { why: &'static str, reply: oneshot::Sender<()> },
}

/// What a reset has done.
pub(super) struct ResetDone {
    pub how: ResetWay,
    pub pages: Option<u64>,
    pub took: Duration,
    pub why: Option<String>,
}

/// A guest, as others see it.
pub(super) struct Handle {
    pub place: Place,
    pub pool: String,
    now: Mutex<Now>,
    commands: mpsc::UnboundedSender<Command>,
}

/// What changes of a guest.
struct Now {
    name: String,
    qemu: i32,
    ports: BTreeMap<u16, u16>,
    /// When it was taken, if it was.
    taken: Option<SystemTime>,
    ms: Option<f64>,
    resettable: bool,
    resets: u64,
    progress: Option<Progress>,
}

impl Handle {
    fn new(
        pool: &str,
        place: Place,
        now: Now,
    ) -> (Arc<Handle>, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let handle = Handle { place, pool: pool.to_owned(), now: Mutex::new(now), commands };
        (Arc::new(handle), receiver)
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.now().name.clone()
    }

    /// When it was taken.
    pub fn taken(&self) -> Option<SystemTime> {
        self.now().taken
    }

    /// As it is now.
    pub fn view(&self, template: &Template) -> GuestView {
        let now = self.now();
        let age = now.taken.and_then(|taken| taken.elapsed().ok()).unwrap_or_default();
        let share = |progress: Progress| progress.pages as f64 / progress.total.max(1) as f64;
        GuestView {
            id: self.place.id.clone(),
            pool: self.pool.clone(),
            name: now.name.clone(),
            qemu_pid: now.qemu,
            qmp: Some(template.qmp(&self.place.identity)),
            dir: self.place.identity.directory.clone(),
            ports: now.ports.iter().map(|(old, new)| (old.to_string(), *new)).collect(),
            ms: now.ms,
            age_s: age.as_secs_f64(),
            resettable: now.resettable,
            resets: now.resets,
            present: now.progress.map(share),
        }
    }

    /// Has it run; returns once QEMU says that it does. Nothing where it has ended.
    pub async fn take(
        &self,
        began: Instant,
        name: Option<String>,
    ) -> Option<Result<(), RevertError>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Take { began, name, reply }).ok()?;
        answer.await.ok()
    }

    /// Has it go back to its image. Nothing where it has ended.
    pub async fn reset(&self) -> Option<Result<ResetDone, RevertError>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Reset { reply }).ok()?;
        answer.await.ok()
    }

    /// Has it end, and returns once it has.
    pub async fn release(&self, why: &'static str) {
        let (reply, answer) = oneshot::channel();
        // One that has ended already hears nothing.
        if self.commands.send(Command::Release { why, reply }).is_ok() {
            let _ = answer.await;
        }
    }

    /// As it is written down.
    fn saved(&self, template: &Template) -> SavedGuest {
        let now = self.now();
        let taken = now.taken.and_then(|taken| taken.duration_since(UNIX_EPOCH).ok());
        SavedGuest {
            name: now.name.clone(),
            ports: now.ports.clone(),
            qemu: ProcessId::of(now.qemu),
            taken: now.taken.is_some(),
            taken_unix_ms: taken.unwrap_or_default().as_millis() as u64,
            resets: now.resets,
            ..SavedGuest::planned(&self.pool, &self.place, template)
        }
    }
}

impl SavedGuest {
    /// One whose QEMU is about to be started.
    fn planned(pool: &str, place: &Place, template: &Template) -> SavedGuest {
        SavedGuest {
            id: place.id.clone(),
            pool: pool.to_owned(),
            number: place.identity.number,
            name: place.identity.name.clone(),
            directory: place.identity.directory.clone(),
            qmp: template.qmp(&place.identity),
            ports: place.ports.clone(),
            qemu: None,
            taken: false,
            taken_unix_ms: 0,
            resets: 0,
        }
    }
}

/// A guest's own task.
pub(super) struct Guest {
    pub handle: Arc<Handle>,
    commands: mpsc::UnboundedReceiver<Command>,
    common: Common,
}

/// What all guests of a pool have in common.
#[derive(Clone)]
pub(super) struct Common {
    pub template: Arc<Template>,
    pub state: Arc<StateDirectory>,
    pub counted: Arc<Counted>,
}

/// What a guest is, once it was taken.
enum Stage {
    Resident(Box<Resident>),
    Resettable(Box<Resettable>),
    /// One that a daemon before this one has taken: it is served by the successor of that, or has
    /// all its memory.
    Adopted(Adopted),
}

/// How a stage was left.
enum Left {
    /// The guest is no more.
    Ended(&'static str),
    /// It is to go back to its image in a new process. The old one has ended.
    Replace { began: Instant, why: String, reply: oneshot::Sender<Result<ResetDone, RevertError>> },
}

impl Guest {
    /// Brings a guest to where it waits to be taken.
    pub async fn arm(
        pool: &str,
        place: Place,
        common: Common,
    ) -> Result<(Guest, Armed), PoolError> {
        // Known ahead of its QEMU, should this process be killed meanwhile.
        common.state.set_guest(&SavedGuest::planned(pool, &place, &common.template))?;
        let armed = match launch(&common.template, &place).await {
            Ok(armed) => armed,
            Err(source) => {
                common.state.forget(&place.id);
                return Err(PoolError::Revert { pool: pool.to_owned(), source: source.into() });
            }
        };
        let now = Now {
            name: place.identity.name.clone(),
            qemu: armed.pid().unwrap_or_default(),
            ports: armed.reach().ports,
            taken: None,
            ms: None,
            resettable: false,
            resets: 0,
            progress: Some(armed.progress()),
        };
        let (handle, commands) = Handle::new(pool, place, now);
        common.state.set_guest(&handle.saved(&common.template))?;
        common.counted.count(|figures| figures.armed += 1);
        Ok((Guest { handle, commands, common }, armed))
    }

    /// Takes a guest up that a daemon before this one has handed out, if it lives.
    pub fn adopt(saved: &SavedGuest, common: Common) -> Option<(Guest, Adopted)> {
        let qemu = saved.qemu.and_then(ProcessId::living)?;
        let pidfd = Pidfd::open(qemu).ok()?;
        // Held by the descriptor now: is it still the same?
        saved.qemu.and_then(ProcessId::living)?;
        let identity = common.template.identity(saved.number);
        if identity.directory != saved.directory {
            // The template was changed since.
            return None;
        }
        let place = Place { id: saved.id.clone(), identity, ports: BTreeMap::new() };
        let now = Now {
            name: saved.name.clone(),
            qemu,
            ports: saved.ports.clone(),
            taken: Some(UNIX_EPOCH + Duration::from_millis(saved.taken_unix_ms)),
            ms: None,
            resettable: false,
            resets: saved.resets,
            progress: None,
        };
        let (handle, commands) = Handle::new(&saved.pool, place, now);
        let adopted = Adopted { id: saved.id.clone(), qemu: Arc::new(pidfd) };
        Some((Guest { handle, commands, common }, adopted))
    }

    /// Waits to be taken, and lives on as [`live`](Guest::live). Returns why it is no more.
    pub async fn wait(mut self, armed: Armed) -> &'static str {
        let why = match self.until_taken(armed).await {
            Ok(running) => self.live_from(Ok(running)).await,
            Err(why) => why,
        };
        self.clean_up().await;
        why
    }

    /// Lives on as one that was taken by a daemon before this one. Returns why it is no more.
    pub async fn live(mut self, adopted: Adopted) -> &'static str {
        let why = self.live_from(Err(adopted)).await;
        self.clean_up().await;
        why
    }

    /// Returns it once it runs.
    async fn until_taken(&mut self, armed: Armed) -> Result<Running, &'static str> {
        let command = tokio::select! {
            command = self.commands.recv() => command,
            () = armed.ended() => None,
        };
        match command {
            Some(Command::Take { began, name, reply }) => {
                match armed.run(&mut |_| {}).await {
                    Ok(running) => {
                        self.note_taken(began, name);
                        let _ = reply.send(Ok(()));
                        self.save();
                        Ok(running)
                    }
                    Err(error) => {
                        let _ = reply.send(Err(error));
                        Err("ended")
                    }
                }
            }
            Some(Command::Release { why, reply }) => {
                armed.end().await;
                let _ = reply.send(());
                Err(why)
            }
            // None asks for a reset of a guest that was not taken.
            Some(Command::Reset { .. }) | None => {
                armed.end().await;
                Err("ended")
            }
        }
    }

    fn note_taken(&self, began: Instant, name: Option<String>) {
        let took = began.elapsed();
        let mut now = self.handle.now();
        if let Some(name) = name {
            now.name = name;
        }
        now.taken = Some(SystemTime::now());
        now.ms = Some(took.as_secs_f64() * 1e3);
        self.common.counted.take(took);
    }

    fn save(&self) {
        if let Err(error) = self.common.state.set_guest(&self.handle.saved(&self.common.template)) {
            tracing::warn!("a daemon after this one won't know all of a guest: {error}");
        }
    }

    async fn live_from(&mut self, from: Result<Running, Adopted>) -> &'static str {
        let mut from = from;
        loop {
            let left = match from {
                Ok(running) => match self.fill(running).await {
                    Ok(stage) => self.hold(stage).await,
                    Err(left) => left,
                },
                Err(adopted) => self.hold(Stage::Adopted(adopted)).await,
            };
            let (began, why, reply) = match left {
                Left::Ended(why) => return why,
                Left::Replace { began, why, reply } => (began, why, reply),
            };
            match self.replace().await {
                Ok(running) => {
                    let took = began.elapsed();
                    self.note_reset(false, took);
                    let how = ResetWay::NewProcess;
                    let _ = reply.send(Ok(ResetDone { how, pages: None, took, why: Some(why) }));
                    self.save();
                    from = Ok(running);
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    return "ended";
                }
            }
        }
    }

    /// Brings all memory of a guest that runs.
    async fn fill(&mut self, running: Running) -> Result<Stage, Left> {
        let resettable = self.common.template.is_resettable();
        let handle = Arc::clone(&self.handle);
        let mut filling = Box::pin(to_the_end(running, resettable, move |event| {
            let progress = match event {
                RevertEvent::Progress(progress) => progress,
                _ => return,
            };
            handle.now().progress = Some(progress);
        }));
        loop {
            let command = tokio::select! {
                biased;
                command = self.commands.recv() => command,
                filled = &mut filling => {
                    let Ok((stage, progress)) = filled else { return Err(Left::Ended("ended")) };
                    let mut now = self.handle.now();
                    now.progress = Some(progress);
                    now.resettable = matches!(stage, Stage::Resettable(_));
                    return Ok(stage);
                }
            };
            let began = Instant::now();
            match command {
                Some(Command::Reset { reply }) => {
                    end(filling).await;
                    let why = "its memory was not complete yet".to_owned();
                    return Err(Left::Replace { began, why, reply });
                }
                Some(Command::Release { why, reply }) => {
                    end(filling).await;
                    return Err(self.released(why, reply).await);
                }
                Some(Command::Take { .. }) => {}
                None => return Err(Left::Ended("ended")),
            }
        }
    }

    /// Does what is asked for of a guest that has all its memory, until it is no more.
    async fn hold(&mut self, mut stage: Stage) -> Left {
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = stage.ended() => return Left::Ended("ended"),
                asked = stage.asked() => {
                    if let Stage::Resettable(resettable) = &mut stage {
                        match resettable.answer(asked, &mut |_| {}).await {
                            Ok(true) => {}
                            Ok(false) => {
                                stage = stage.untracked();
                                self.handle.now().resettable = false;
                            }
                            Err(error) => {
                                tracing::warn!("guest {}: {error}", self.handle.place.id);
                                return Left::Ended("ended");
                            }
                        }
                    }
                    continue;
                }
            };
            let began = Instant::now();
            match command {
                Some(Command::Reset { reply }) => {
                    let why = match stage.reset().await {
                        Ok((pages, took)) => {
                            self.note_reset(true, took);
                            let how = ResetWay::InPlace;
                            let done = ResetDone { how, pages: Some(pages), took, why: None };
                            let _ = reply.send(Ok(done));
                            stage.prepare().await;
                            continue;
                        }
                        Err(why) => why,
                    };
                    end(stage).await;
                    return Left::Replace { began, why, reply };
                }
                Some(Command::Release { why, reply }) => {
                    end(stage).await;
                    return self.released(why, reply).await;
                }
                Some(Command::Take { .. }) => {}
                None => return Left::Ended("ended"),
            }
        }
    }

    fn note_reset(&self, in_place: bool, took: Duration) {
        self.handle.now().resets += 1;
        self.common.counted.reset(in_place, took);
    }

    /// Starts the guest anew under the same name and with the same ports. Its QEMU has ended.
    async fn replace(&mut self) -> Result<Running, RevertError> {
        self.handle.now().resettable = false;
        self.remove_directory().await;
        let ports = self.handle.now().ports.clone();
        let place = Place { ports, ..self.handle.place.clone() };
        let armed = launch(&self.common.template, &place).await?;
        let running = armed.run(&mut |_| {}).await?;
        let mut now = self.handle.now();
        now.qemu = running.pid().unwrap_or_default();
        now.progress = Some(running.progress());
        drop(now);
        Ok(running)
    }

    async fn released(&self, why: &'static str, reply: oneshot::Sender<()>) -> Left {
        // Whoever asked may look whether it is all gone.
        self.remove_directory().await;
        self.common.state.forget(&self.handle.place.id);
        let _ = reply.send(());
        Left::Ended(why)
    }

    async fn clean_up(&self) {
        self.remove_directory().await;
        self.common.state.forget(&self.handle.place.id);
        let progress = self.handle.now().progress;
        self.common.counted.count(|figures| {
            figures.released += 1;
            if let Some(progress) = progress {
                figures.faults += progress.requests;
                figures.bytes += progress.pages * PAGE_SIZE as u64;
            }
        });
    }

    async fn remove_directory(&self) {
        let directory = self.handle.place.identity.directory.clone();
        let removed = spawn_blocking(move || match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!("removing `{}` failed: {error}", directory.display());
            }
            _ => {}
        });
        let _ = removed.await;
    }
}

/// The QEMU of a guest that a daemon before this one has handed out. Dropping it ends it, with
/// whoever serves it, and removes its record.
pub(super) struct Adopted {
    id: String,
    qemu: Arc<Pidfd>,
}

impl Drop for Adopted {
    fn drop(&mut self) {
        // Its record may be gone with its last server.
        let stopped = runs::find(&self.id).and_then(|run| run.stop());
        if let Err(error) = stopped {
            tracing::debug!("guest {}: {error}", self.id);
        }
        let _ = self.qemu.kill();
        if !self.qemu.wait_end(END_TIMEOUT) {
            tracing::warn!("the QEMU of guest {} was killed, but does not end", self.id);
        }
    }
}

/// Waits until a process has ended that is not our child.
async fn gone(process: &Pidfd) {
    // Readable once it has (pidfd_open(2)).
    // SAFETY: the descriptor is borrowed from `process`, which outlives this future, and with it
    // what is registered here: nobody closes it, or opens another of its number, before.
    let readable = unsafe {
        AsyncFd::register_with_interest(process.as_fd(), Interest::READABLE)
    };
    match readable {
        Ok(readable) => _ = readable.readable().await,
        Err(error) => {
            tracing::warn!("the end of a guest won't be noticed: {error}");
            std::future::pending().await
        }
    }
}

impl Stage {
    /// Waits until its QEMU has ended.
    fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let (ours, adopted) = match self {
            Stage::Resident(resident) => (Some(resident.ended()), None),
            Stage::Resettable(resettable) => (Some(resettable.resident().ended()), None),
            Stage::Adopted(adopted) => (None, Some(Arc::clone(&adopted.qemu))),
        };
        async move {
            match (ours, adopted) {
                (Some(ended), _) => ended.await,
                (None, Some(process)) => gone(&process).await,
                (None, None) => std::future::pending().await,
            }
        }
    }

    /// Waits until another process asks for something. Safe to cancel.
    async fn asked(&self) -> crate::reset::Asked {
        match self {
            Stage::Resettable(resettable) => resettable.asked().await,
            Stage::Resident(_) | Stage::Adopted(_) => std::future::pending().await,
        }
    }

    /// One whose writes are tracked no more.
    fn untracked(self) -> Stage {
        match self {
            Stage::Resettable(resettable) => Stage::Resident(resettable.into_resident().into()),
            other => other,
        }
    }

    /// Takes the guest back inside its QEMU: returns the pages that were written back, and how long
    /// it took. Else why that can't be.
    async fn reset(&mut self) -> Result<(u64, Duration), String> {
        match self {
            Stage::Resettable(resettable) => match resettable.rewind().await {
                Ok(reset) => Ok((reset.pages, Duration::from_secs_f64(reset.took_ms / 1e3))),
                Err(error) => Err(error.to_string()),
            },
            Stage::Resident(_) => Err("its writes are not tracked".to_owned()),
            Stage::Adopted(_) => Err("the daemon that tracked its writes was ended".to_owned()),
        }
    }

    /// Makes ready for the next reset, while the guest runs.
    async fn prepare(&mut self) {
        if let Stage::Resettable(resettable) = self {
            resettable.prepare().await;
        }
    }
}

/// Ends the QEMU of what is dropped. That waits for processes and threads, which a thread of the
/// runtime should not.
async fn end<T: Send + 'static>(session: T) {
    let _ = spawn_blocking(move || drop(session)).await;
}

/// Brings a guest to where it waits to run.
async fn launch(template: &Template, place: &Place) -> Result<Armed, RevertError> {
    let options = template.options(place);
    let tell = &mut |event| match event {
        RevertEvent::Note { what, why } => tracing::debug!("guest {}: {what}: {why}", place.id),
        RevertEvent::Warning { says } => tracing::debug!("guest {}: {says}", place.id),
        _ => {}
    };
    let image = template.image.open();
    let planned = Planned::of(image, &options, Cancellation::new(), tell).await?;
    planned.launch(tell).await?.arm(tell).await
}

/// Brings all memory of a guest, and begins to track its writes where it is to be resettable.
async fn to_the_end(
    running: Running,
    resettable: bool,
    mut on_event: impl FnMut(RevertEvent) + Send + 'static,
) -> Result<(Stage, Progress), RevertError> {
    let resident = running.fill(&mut on_event).await?;
    let progress = resident.outcome().progress;
    if !resettable {
        return Ok((Stage::Resident(resident.into()), progress));
    }
    Ok(match Resettable::track(resident).await {
        Ok(resettable) => (Stage::Resettable(resettable.into()), progress),
        Err(not) => {
            tracing::debug!("a guest can't be reset inside its QEMU: {}", not.error);
            (Stage::Resident(not.resident.into()), progress)
        }
    })
}
