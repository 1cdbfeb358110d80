//! One guest of a pool: its session, in a task of its own that obeys commands.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::error::PoolError;
use super::figures::Counted;
use super::handle::{Command, Handle, Now, ResetDone};
use super::saved::{SavedGuest, StateDirectory};
use super::stage::{Adopted, Stage, end, launch, to_the_end};
use super::template::{Place, Template};
use crate::host::pidfd::Pidfd;
use crate::page::PAGE_SIZE;
use crate::revert::session::{Armed, Running};
use crate::revert::{ResetWay, RevertError, RevertEvent};
use crate::runs::ProcessId;

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

/// How a stage was left.
enum Left {
    /// The guest is no more.
    Ended(Ended),
    /// It is to go back to its image in a new process. The old one has ended.
    Replace { began: Instant, why: String, reply: oneshot::Sender<Result<ResetDone, RevertError>> },
}

/// Why a guest is no more, and who waits for that.
struct Ended {
    why: &'static str,
    reply: Option<oneshot::Sender<()>>,
}

/// Its QEMU has ended by itself, or could not go on.
const BY_ITSELF: Ended = Ended { why: "ended", reply: None };

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
        if let Err(error) = common.state.set_guest(&handle.saved(&common.template)) {
            armed.end().await;
            common.state.forget(&handle.place.id);
            return Err(error);
        }
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
        let left = match self.until_taken(armed).await {
            Ok(running) => self.run_on(running).await,
            Err(ended) => Left::Ended(ended),
        };
        self.until_gone(left).await
    }

    /// Lives on as one that was taken by a daemon before this one. Returns why it is no more.
    pub async fn live(mut self, adopted: Adopted) -> &'static str {
        let left = self.hold(Stage::Adopted(adopted)).await;
        self.until_gone(left).await
    }

    /// Returns it once it runs.
    async fn until_taken(&mut self, armed: Armed) -> Result<Running, Ended> {
        let command = tokio::select! {
            command = self.commands.recv() => command,
            () = armed.ended() => None,
        };
        match command {
            Some(Command::Take { began, name, reply }) => match armed.run(&mut |_| {}).await {
                Ok(running) => {
                    self.note_taken(began, name);
                    // Ahead of the answer: a daemon after this one must not end what was promised.
                    self.save();
                    let _ = reply.send(Ok(()));
                    Ok(running)
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    Err(BY_ITSELF)
                }
            },
            Some(Command::Release { why, reply }) => {
                armed.end().await;
                Err(Ended { why, reply: Some(reply) })
            }
            // None asks for a reset of a guest that was not taken.
            Some(Command::Reset { .. }) | None => {
                armed.end().await;
                Err(BY_ITSELF)
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

    /// Goes on from where a stage was left, until the guest is no more. Returns why it is.
    async fn until_gone(&mut self, mut left: Left) -> &'static str {
        loop {
            let (began, why, reply) = match left {
                Left::Ended(ended) => return self.clean_up(ended).await,
                Left::Replace { began, why, reply } => (began, why, reply),
            };
            left = match self.replace().await {
                Ok(running) => {
                    let took = began.elapsed();
                    self.note_reset(false, took);
                    let how = ResetWay::NewProcess;
                    let _ = reply.send(Ok(ResetDone { how, pages: None, took, why: Some(why) }));
                    self.save();
                    self.run_on(running).await
                }
                Err(error) => {
                    let _ = reply.send(Err(error));
                    Left::Ended(BY_ITSELF)
                }
            };
        }
    }

    /// Has all memory of a guest that runs be brought, and holds it from then on.
    async fn run_on(&mut self, running: Running) -> Left {
        match self.fill(running).await {
            Ok(stage) => self.hold(stage).await,
            Err(left) => left,
        }
    }

    /// Brings all memory of a guest that runs.
    async fn fill(&mut self, running: Running) -> Result<Stage, Left> {
        let resettable = self.common.template.is_resettable();
        let handle = Arc::clone(&self.handle);
        let mut filling = Box::pin(to_the_end(running, resettable, move |event| {
            let id = &handle.place.id;
            match event {
                RevertEvent::Progress(progress) => handle.now().progress = Some(progress),
                RevertEvent::Degraded(memory) => {
                    tracing::warn!("guest {id}: memory can't be read: {}", memory.why);
                }
                RevertEvent::Stopped { reason, memory } => {
                    tracing::warn!("guest {id} was stopped ({reason}): {}", memory.why);
                }
                RevertEvent::Repaired => tracing::warn!("guest {id}: all memory can be read again"),
                _ => {}
            }
        }));
        loop {
            let command = tokio::select! {
                biased;
                command = self.commands.recv() => command,
                filled = &mut filling => {
                    let Ok((stage, progress)) = filled else { return Err(Left::Ended(BY_ITSELF)) };
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
                    return Err(Left::Ended(Ended { why, reply: Some(reply) }));
                }
                Some(Command::Take { .. }) => {}
                None => return Err(Left::Ended(BY_ITSELF)),
            }
        }
    }

    /// Does what is asked for of a guest that has all its memory, until it is no more.
    async fn hold(&mut self, mut stage: Stage) -> Left {
        loop {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = stage.ended() => return Left::Ended(BY_ITSELF),
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
                                return Left::Ended(BY_ITSELF);
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
                    return Left::Ended(Ended { why, reply: Some(reply) });
                }
                Some(Command::Take { .. }) => {}
                None => return Left::Ended(BY_ITSELF),
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

    async fn clean_up(&self, ended: Ended) -> &'static str {
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
        // Whoever asked may look whether it is all gone.
        if let Some(reply) = ended.reply {
            let _ = reply.send(());
        }
        ended.why
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
