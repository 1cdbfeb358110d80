//! One guest of a pool: its session, in a task of its own that obeys commands.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::spawn_blocking;

use super::error::PoolError;
use super::event::{PoolEvent, SetupView};
use super::figures::Counted;
use super::handle::{Command, Handle, Now, ResetDone};
use super::saved::{SavedGuest, StateDirectory};
use super::setup::{SetUp, UnderWay};
use super::stage::{Adopted, AgentWay, Stage, Waiting, end, launch, to_the_end};
use super::template::{Place, Template};
use crate::host::pidfd::Pidfd;
use crate::host::procfs::own_memory;
use crate::page::PAGE_SIZE;
use crate::reset::{Request, ResetOutcome};
use crate::revert::session::{Reset, Running};
use crate::revert::{CloneIdentity, ResetWay, RevertError, RevertEvent};
use crate::runs::ProcessId;

/// A guest's own task.
pub(super) struct Guest {
    pub handle: Arc<Handle>,
    commands: mpsc::UnboundedReceiver<Command>,
    common: Common,
    /// What is done for it as it runs, if something is.
    setup: Option<UnderWay>,
    /// The socket of its agent's channel, where that is told something.
    agent_socket: Option<PathBuf>,
}

/// What all guests of a pool have in common.
#[derive(Clone)]
pub(super) struct Common {
    pub template: Arc<Template>,
    pub state: Arc<StateDirectory>,
    pub counted: Arc<Counted>,
    pub events: broadcast::Sender<PoolEvent>,
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
    ) -> Result<(Guest, Waiting), PoolError> {
        // Known ahead of its QEMU, should this process be killed meanwhile.
        common.state.set_guest(&SavedGuest::planned(pool, &place, &common.template))?;
        let waiting = match launch(&common.template, &place).await {
            Ok(waiting) => waiting,
            Err(source) => {
                common.state.forget(&place.id);
                return Err(PoolError::Revert { pool: pool.to_owned(), source: source.into() });
            }
        };
        let armed = &waiting.armed;
        let now = Now {
            name: place.identity.name.clone(),
            qemu: armed.pid().unwrap_or_default(),
            ports: armed.reach().ports,
            taken: None,
            ms: None,
            resettable: false,
            resets: 0,
            progress: Some(armed.progress()),
            setup: None,
        };
        let waits_with = armed.pid().map_or(0, own_memory);
        let (handle, commands) = Handle::new(pool, place, waits_with, now);
        if let Err(error) = common.state.set_guest(&handle.saved(&common.template)) {
            waiting.armed.end().await;
            common.state.forget(&handle.place.id);
            return Err(error);
        }
        common.counted.count(|figures| figures.armed += 1);
        Ok((Guest { handle, commands, common, setup: None, agent_socket: None }, waiting))
    }

    /// Takes a guest up that a daemon before this one has handed out, if it lives.
    pub fn adopt(saved: &SavedGuest, common: Common) -> Option<(Guest, Adopted)> {
        let guest = Guest::known(saved, common)?;
        let qemu = saved.qemu.and_then(ProcessId::living)?;
        let pidfd = Pidfd::open(qemu).ok()?;
        // Held by the descriptor now: is it still the same?
        saved.qemu.and_then(ProcessId::living)?;
        let adopted = Adopted { id: saved.id.clone(), qemu: Arc::new(pidfd) };
        Some((guest, adopted))
    }

    /// A guest that a daemon before this one has handed out, whose QEMU need not live.
    pub fn known(saved: &SavedGuest, common: Common) -> Option<Guest> {
        let identity = common.template.identity(saved.number);
        if identity.directory != saved.directory {
            // The template was changed since.
            return None;
        }
        let place = Place { id: saved.id.clone(), identity, ports: BTreeMap::new() };
        let now = Now {
            name: saved.name.clone(),
            qemu: saved.qemu.map_or(0, ProcessId::number),
            ports: saved.ports.clone(),
            taken: Some(UNIX_EPOCH + Duration::from_millis(saved.taken_unix_ms)),
            ms: None,
            resettable: false,
            resets: saved.resets,
            progress: None,
            setup: saved.setup.clone().map(SetupView::abandoned),
        };
        let (handle, commands) = Handle::new(&saved.pool, place, 0, now);
        Some(Guest { handle, commands, common, setup: None, agent_socket: None })
    }

    /// Waits to be taken, and lives on as [`live`](Guest::live). Returns why it is no more.
    pub async fn wait(mut self, waiting: Waiting) -> &'static str {
        let left = match self.until_taken(waiting).await {
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

    /// Lives on as one that a daemon before this one was taking back to its image when it was killed:
    /// it is taken back by a new process. Its QEMU has ended. Returns why it is no more.
    pub async fn live_again(mut self) -> &'static str {
        self.save_resetting();
        let why = "the daemon was killed while it was reset".to_owned();
        let (reply, _) = oneshot::channel();
        self.until_gone(Left::Replace { began: Instant::now(), why, reply }).await
    }

    /// Returns it once it runs.
    async fn until_taken(&mut self, waiting: Waiting) -> Result<Running, Ended> {
        let Waiting { armed, agent } = waiting;
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
                    self.set_up(agent);
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
        now.setup = self.expected_setup();
        drop(now);
        self.common.counted.take(took);
    }

    /// How what is done for it stands when it has just begun to run.
    fn expected_setup(&self) -> Option<SetupView> {
        self.common.template.has_setup().then(SetupView::pending)
    }

    /// Begins to do what is done for a guest that has just begun to run.
    fn set_up(&mut self, agent: AgentWay) {
        if !self.common.template.has_setup() {
            return;
        }
        let Common { template, state, events, .. } = self.common.clone();
        // Whoever has taken it may have given it another name.
        let name = self.handle.name();
        let identity = CloneIdentity { name, ..self.handle.place.identity.clone() };
        let setup = template.setup(&identity);
        self.agent_socket.clone_from(&agent.socket);
        let handle = Arc::clone(&self.handle);
        let of = SetUp { handle, template, state, events };
        self.setup = Some(UnderWay::begin(setup, of, agent));
    }

    /// Ends what is done for it: it is about to be no more, or as it was at its image's moment.
    async fn end_setup(&mut self) {
        if let Some(setup) = self.setup.take() {
            setup.end().await;
        }
    }

    fn save(&self) {
        self.write_down(self.handle.saved(&self.common.template));
    }

    /// Notes that it is going back to its image: what there is of it from now on, until
    /// [`save`](Guest::save), belongs to two moments.
    fn save_resetting(&self) {
        let saved = self.handle.saved(&self.common.template);
        self.write_down(SavedGuest { resetting: true, ..saved });
    }

    fn write_down(&self, saved: SavedGuest) {
        if let Err(error) = self.common.state.set_guest(&saved) {
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
                Ok((running, agent)) => {
                    let took = began.elapsed();
                    self.note_reset(false, took);
                    let how = ResetWay::NewProcess;
                    let _ = reply.send(Ok(ResetDone { how, pages: None, took, why: Some(why) }));
                    self.save();
                    self.set_up(agent);
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
                RevertEvent::Stopped { reason, memory, store } => {
                    let why = memory.map(|memory| memory.why).or(store).unwrap_or_default();
                    tracing::warn!("guest {id} was stopped ({reason}): {why}");
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
                    self.end_setup().await;
                    self.save_resetting();
                    end(filling).await;
                    let why = "its memory was not complete yet".to_owned();
                    return Err(Left::Replace { began, why, reply });
                }
                Some(Command::Release { why, reply }) => {
                    self.end_setup().await;
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
                    if asked.request == Request::Reset {
                        // What is done for a guest behind a reset is known here alone.
                        let why = "its pool's daemon is to be asked for that".to_owned();
                        asked.answer(&ResetOutcome::Refused { why }).await;
                    } else if let Stage::Resettable(resettable) = &mut stage {
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
                    self.end_setup().await;
                    let new_macs = self.common.template.gives_new_macs();
                    self.save_resetting();
                    let why = match stage.reset(new_macs).await {
                        Ok((Reset { pages, took_ms, .. }, unplugged)) => {
                            let took = Duration::from_secs_f64(took_ms / 1e3);
                            self.note_reset(true, took);
                            self.save();
                            let how = ResetWay::InPlace;
                            let done = ResetDone { how, pages: Some(pages), took, why: None };
                            let _ = reply.send(Ok(done));
                            let socket = self.agent_socket.clone();
                            self.set_up(AgentWay { socket, unplugged });
                            stage.prepare().await;
                            continue;
                        }
                        Err(why) => why,
                    };
                    end(stage).await;
                    return Left::Replace { began, why, reply };
                }
                Some(Command::Release { why, reply }) => {
                    self.end_setup().await;
                    end(stage).await;
                    return Left::Ended(Ended { why, reply: Some(reply) });
                }
                Some(Command::Take { .. }) => {}
                None => return Left::Ended(BY_ITSELF),
            }
        }
    }

    fn note_reset(&self, in_place: bool, took: Duration) {
        let mut now = self.handle.now();
        now.resets += 1;
        now.setup = self.expected_setup();
        drop(now);
        self.common.counted.reset(in_place, took);
    }

    /// Starts the guest anew under the same name and with the same ports. Its QEMU has ended, and that
    /// it is going back is written down.
    async fn replace(&mut self) -> Result<(Running, AgentWay), RevertError> {
        self.handle.now().resettable = false;
        self.remove_directory().await;
        let ports = self.handle.now().ports.clone();
        let place = Place { ports, ..self.handle.place.clone() };
        let Waiting { armed, agent } = launch(&self.common.template, &place).await?;
        let running = armed.run(&mut |_| {}).await?;
        let mut now = self.handle.now();
        now.qemu = running.pid().unwrap_or_default();
        now.progress = Some(running.progress());
        drop(now);
        Ok((running, agent))
    }

    async fn clean_up(&mut self, ended: Ended) -> &'static str {
        self.end_setup().await;
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
