//! What is done for a guest of a pool as soon as it runs: its agent is told, and the pool's command
//! run.

use std::sync::{Arc, Mutex};

use tokio::sync::broadcast;
use tokio::task::JoinHandle;

use super::event::{PoolEvent, SetupState, SetupView};
use super::handle::Handle;
use super::saved::StateDirectory;
use super::stage::AgentWay;
use super::template::{Setup, Template};
use crate::cancel::Cancellation;
use crate::host::shell::ShellCommand;
use crate::revert::{AgentOptions, FirstBreath, RevertEvent, environment};

/// The guest that is set up, and who is told of it.
pub(super) struct SetUp {
    pub handle: Arc<Handle>,
    pub template: Arc<Template>,
    pub state: Arc<StateDirectory>,
    pub events: broadcast::Sender<PoolEvent>,
}

impl SetUp {
    fn start(&self, command: &str) -> ShellCommand {
        let (identity, now) = (&self.handle.place.identity, self.handle.now());
        let clone = Some((now.name.as_str(), identity.directory.as_path()));
        let qmp = self.template.qmp(identity);
        ShellCommand::start(command, environment(clone, Some(now.qemu), Some(&qmp), &now.ports))
    }

    /// Waits for the end of the command.
    async fn end(&self, hook: Option<ShellCommand>, cancel: &Cancellation) -> Result<(), String> {
        let Some(hook) = hook else { return Ok(()) };
        let began = hook.began;
        let failed = hook.end(cancel).await.err().map(|error| error.to_string());
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let (id, pool) = self.whose();
        self.tell(PoolEvent::Hook { id, pool, failed: failed.clone(), ms });
        failed.map_or(Ok(()), |why| Err(format!("hook_running: {why}")))
    }

    async fn tell_agent(
        &self,
        options: &AgentOptions,
        AgentWay { socket, unplugged }: AgentWay,
        cancel: &Cancellation,
    ) -> Result<(), String> {
        let Some(socket) = socket else { return Ok(()) };
        let breath = FirstBreath::begin(options, &socket, unplugged).await;
        let problem = Mutex::new(None);
        breath
            .draw(cancel, |event| {
                let RevertEvent::Agent { did, failed, took_ms: ms, left } = event else { return };
                if let (Some(why), Ok(mut problem)) = (&failed, problem.lock()) {
                    *problem = Some(format!("the guest's agent: {did}: {why}"));
                }
                let (id, pool) = self.whose();
                self.tell(PoolEvent::Agent { id, pool, did, failed, ms, left });
            })
            .await;
        problem.into_inner().ok().flatten().map_or(Ok(()), Err)
    }

    /// Notes what has come of it.
    fn note(&self, done: Result<(), String>) {
        let (state, problem) = match done {
            Ok(()) => (SetupState::Done, None),
            Err(why) => (SetupState::Failed, Some(why)),
        };
        self.handle.now().setup = Some(SetupView { state, problem });
        if let Err(error) = self.state.set_guest(&self.handle.saved(&self.template)) {
            tracing::warn!("a daemon after this one won't know all of a guest: {error}");
        }
    }

    fn whose(&self) -> (String, String) {
        (self.handle.place.id.clone(), self.handle.pool.clone())
    }

    fn tell(&self, event: PoolEvent) {
        // Nobody may listen.
        let _ = self.events.send(event);
    }
}

/// A guest that is being set up. Dropping it ends that.
pub(super) struct UnderWay {
    cancel: Cancellation,
    task: Option<JoinHandle<()>>,
}

impl UnderWay {
    /// Begins, for a guest that runs, whose agent is told in this way.
    pub fn begin(setup: Setup, of: SetUp, way: AgentWay) -> UnderWay {
        let cancel = Cancellation::new();
        let task = tokio::spawn({
            let cancel = cancel.clone();
            async move {
                // At once, as others are told by it that the guest runs.
                let hook = setup.hook.as_deref().map(|command| of.start(command));
                let (agent, hook) =
                    tokio::join!(of.tell_agent(&setup.agent, way, &cancel), of.end(hook, &cancel));
                of.note(agent.and(hook));
            }
        });
        UnderWay { cancel, task: Some(task) }
    }

    /// Ends it, and returns once nothing is done any more.
    pub async fn end(mut self) {
        self.cancel.request();
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.cancel.request();
    }
}
