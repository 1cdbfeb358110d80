//! What a guest's agent is told as soon as the guest runs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::cards::{Card, Unplugged};
use super::event::RevertEvent;
use super::options::AgentOptions;
use crate::agent::{Agent, AgentError};
use crate::cancel::Cancellation;
use crate::qmp::Qmp;

/// How long an attempt to have the agent answer takes, and how many there are. What is sent ahead
/// of the moment at which the guest opens its end of the channel is lost.
const ATTEMPT: Duration = Duration::from_secs(5);
const ATTEMPTS: u32 = 12;

/// Something that an agent is told.
enum Task {
    RenewAddress(Card, Qmp),
    SetTime,
    Run(String),
}

impl Task {
    /// What it is called in events.
    fn name(&self) -> String {
        match self {
            Task::RenewAddress(card, _) => format!("address of {}: {}", card.name, card.new),
            Task::SetTime => "guest-set-time".to_owned(),
            Task::Run(command) => command.clone(),
        }
    }

    async fn carry_out(&self, agent: &mut Agent) -> Result<(), String> {
        let done = match self {
            Task::RenewAddress(card, qmp) => return card.renew(agent, qmp).await,
            Task::SetTime => agent.set_time().await,
            Task::Run(command) => agent.run(command).await,
        };
        done.map_err(|error| error.to_string())
    }
}

/// The socket of the agent's channel where there is something to tell it: the one that was given,
/// or else the one on the command line of a QEMU of ours.
///
/// # Errors
/// When there is neither, or the guest will stay `paused`.
pub(super) fn socket(
    options: &AgentOptions,
    recorded: Option<&Path>,
    paused: bool,
) -> Result<Option<PathBuf>, AgentError> {
    match (options.is_empty(), options.socket.as_deref().or(recorded)) {
        (true, _) => Ok(None),
        (false, _) if paused => Err(AgentError::Paused),
        (false, None) => Err(AgentError::NoChannel),
        (false, Some(socket)) => Ok(Some(socket.to_owned())),
    }
}

/// An agent that is connected, with what it is to be told.
pub(crate) struct FirstBreath {
    agent: Result<Agent, AgentError>,
    tasks: Vec<Task>,
}

impl FirstBreath {
    /// Connects. From within the sandbox that can't be done any more.
    pub async fn begin(
        options: &AgentOptions,
        socket: &Path,
        unplugged: Option<Unplugged>,
    ) -> FirstBreath {
        let cards = unplugged.into_iter().flat_map(|Unplugged { cards, qmp }| {
            cards.into_iter().map(move |card| Task::RenewAddress(card, qmp.clone()))
        });
        let set_time = options.set_time.then_some(Task::SetTime);
        let tasks = cards.chain(set_time).chain(options.commands.iter().cloned().map(Task::Run));
        FirstBreath { agent: Agent::open(socket).await, tasks: tasks.collect() }
    }

    /// Tells the agent one thing after the other, up to the first that fails. The first request of
    /// `cancel` ends that.
    pub async fn draw(self, cancel: &Cancellation, on_event: impl Fn(RevertEvent)) {
        let FirstBreath { mut agent, tasks } = self;
        let mut left = tasks.len();
        let mut synced = false;
        for task in tasks {
            let began = Instant::now();
            let told = async {
                let agent = agent.as_mut().map_err(|error| error.to_string())?;
                if !synced {
                    reach(agent).await.map_err(|error| error.to_string())?;
                }
                task.carry_out(agent).await
            };
            let failed = tokio::select! {
                told = told => told.err(),
                () = cancel.requested() => Some("interrupted".to_owned()),
            };
            synced = true;
            left -= 1;
            let (did, has_failed) = (task.name(), failed.is_some());
            let took_ms = began.elapsed().as_secs_f64() * 1e3;
            on_event(RevertEvent::Agent { did, failed, took_ms, left: left as u64 });
            if has_failed {
                return;
            }
        }
    }
}

/// Waits until the agent answers.
async fn reach(agent: &mut Agent) -> Result<(), AgentError> {
    for _ in 1..ATTEMPTS {
        match agent.sync(ATTEMPT).await {
            Err(AgentError::Timeout { .. }) => {}
            reached => return reached,
        }
    }
    agent.sync(ATTEMPT).await
}
