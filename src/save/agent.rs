//! Quiescing: qemu-guest-agent freezes the guest's file systems around the moment
//! (QEMU's "QEMU Guest Agent Protocol Reference").

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::Instant;
use uuid::Uuid;

use crate::kind::{Details, ErrorKind};
use crate::libvirt::LibvirtError;

/// How long to wait for the agent.
pub(super) struct Patience {
    /// Until it answers at all.
    answer: Duration,
    /// Until it has frozen: file systems are written out first.
    pub freeze: Duration,
    /// Until it has thawed.
    thaw: Duration,
    /// Until it can be told to thaw: an agent that is still busy freezing, or whose guest
    /// stands still, does not answer.
    persist: Duration,
}

/// The patience of a save: after that, the user is told.
pub(super) const PATIENCE: Patience = Patience {
    answer: Duration::from_secs(5),
    freeze: Duration::from_secs(30),
    thaw: Duration::from_secs(10),
    persist: Duration::from_secs(60),
};

/// The time between two attempts to reach an agent.
const RETRY_EVERY: Duration = Duration::from_millis(200);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// Why file systems could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The socket can't be used.
    #[error("can't talk to the guest agent at {}: {source}", .socket.display())]
    Io {
        /// The socket.
        socket: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// It does not answer.
    #[error(
        "the guest agent at {} did not answer {command} within {after:?}: is qemu-guest-agent \
         running in the guest?", .socket.display()
    )]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// What it was asked.
        command: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// libvirt, which has the agent's channel, can't reach it.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The guest was to be frozen through libvirt, and is none of libvirt's.
    #[error(
        "the guest's agent can be reached through libvirt only where `SaveOptions::guest` is a domain"
    )]
    NoDomain,
    /// No agent in the domain's guest has opened its channel.
    #[error(
        "no agent answers libvirt: the domain {domain} needs a channel of the name \
         org.qemu.guest_agent.0, and its guest a running qemu-guest-agent"
    )]
    Disconnected {
        /// The domain.
        domain: String,
    },
    /// It refuses.
    #[error("the guest agent refused {command}: {reason}")]
    Refused {
        /// What it was asked.
        command: &'static str,
        /// Its words.
        reason: String,
    },
}

impl AgentError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::AgentFailed
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            AgentError::Io { socket, .. } | AgentError::Timeout { socket, .. } => Some(socket),
            AgentError::Refused { .. }
            | AgentError::Libvirt(_)
            | AgentError::NoDomain
            | AgentError::Disconnected { .. } => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

impl AgentError {
    /// Whether another attempt may work: not if the agent has refused, nor if nobody listens
    /// at its socket, as when QEMU has ended.
    fn may_pass(&self) -> bool {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match self {
            AgentError::Refused { .. }
            | AgentError::NoDomain
            | AgentError::Disconnected { .. }
            | AgentError::Libvirt(LibvirtError::ShutOff { .. }) => false,
            AgentError::Libvirt(_) => true,
            AgentError::Io { source, .. } => !matches!(source.kind(), ConnectionRefused | NotFound),
            AgentError::Timeout { .. } => true,
        }
    }
}

/// Asks the agent who it is, and whether it would freeze file systems. It freezes none.
pub(super) async fn check(socket: &Path, patience: &Patience) -> Result<String, AgentError> {
    const FREEZE: &str = "guest-fsfreeze-freeze";
    let mut agent = Agent::connect(socket, patience).await?;
    let info = agent.ask("guest-info", patience.answer).await?;
    let mut commands = info["supported_commands"].as_array().into_iter().flatten();
    if commands.any(|command| command["name"] == FREEZE && command["enabled"] == false) {
        let reason = "the guest's administrator has turned it off".to_owned();
        return Err(AgentError::Refused { command: FREEZE, reason });
    }
    Ok(format!("qemu-guest-agent {} answers", info["version"].as_str().unwrap_or_default()))
}

/// Thaws all file systems of a guest: the agent can't thaw less than all.
pub(super) async fn thaw(socket: &Path, patience: &Patience) -> Result<(), AgentError> {
    persist(patience, || async { Agent::connect(socket, patience).await?.thaw().await }).await
}

/// Tries to thaw until it works or `patience` is over. An agent that was asked to freeze does so
/// even if nobody waits for it any more, and does not answer before it has finished.
pub(super) async fn persist<F>(patience: &Patience, thaw: impl Fn() -> F) -> Result<(), AgentError>
where
    F: Future<Output = Result<(), AgentError>>,
{
    let end = Instant::now() + patience.persist;
    loop {
        match thaw().await {
            Err(error) if error.may_pass() && Instant::now() < end => {
                tracing::info!("{error}; trying again to thaw");
                tokio::time::sleep(RETRY_EVERY).await;
            }
            done => return done,
        }
    }
}

/// A connection to an agent.
pub(super) struct Agent<'a> {
    socket: PathBuf,
    patience: &'a Patience,
    stream: BufReader<UnixStream>,
}

impl<'a> Agent<'a> {
    /// Connects, and skips whatever an earlier connection has left in the channel.
    pub async fn connect(socket: &Path, patience: &'a Patience) -> Result<Agent<'a>, AgentError> {
        let failed = |source| AgentError::Io { socket: socket.to_owned(), source };
        let stream = UnixStream::connect(socket).await.map_err(failed)?;
        let mut agent =
            Agent { socket: socket.to_owned(), patience, stream: BufReader::new(stream) };
        // Random, so that a late answer to an earlier connection is not taken for ours. QMP's
        // integers have 63 bits.
        let id = Uuid::new_v4().as_u64_pair().0 >> 1;
        // This byte resets the agent's parser.
        agent
            .send(&[b"\xff", json_line("guest-sync", json!({ "id": id })).as_slice()].concat())
            .await?;
        let synced = async {
            loop {
                match agent.receive().await {
                    Ok(answer) if answer["return"] == json!(id) => return Ok(()),
                    // An answer to somebody else.
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
        };
        match tokio::time::timeout(patience.answer, synced).await {
            Ok(synced) => synced.map(|()| agent),
            Err(_) => Err(AgentError::Timeout {
                socket: socket.to_owned(),
                command: "guest-sync",
                after: patience.answer,
            }),
        }
    }

    /// Freezes all file systems that the agent can freeze, and returns how many those are.
    /// If that fails, they may be frozen all the same, or may be frozen later.
    pub async fn freeze(mut self) -> Result<u64, AgentError> {
        const COMMAND: &str = "guest-fsfreeze-freeze";
        let answer = self.ask(COMMAND, self.patience.freeze).await?;
        let refused =
            || AgentError::Refused { command: COMMAND, reason: format!("it answered {answer}") };
        answer.as_u64().ok_or_else(refused)
    }

    async fn thaw(mut self) -> Result<(), AgentError> {
        self.ask("guest-fsfreeze-thaw", self.patience.thaw).await.map(drop)
    }

    /// Carries out a command without arguments.
    async fn ask(&mut self, command: &'static str, after: Duration) -> Result<Value, AgentError> {
        let asked = async {
            self.send(&json_line(command, Value::Null)).await?;
            self.receive().await
        };
        let answer = match tokio::time::timeout(after, asked).await {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(AgentError::Timeout { socket: self.socket.clone(), command, after });
            }
        };
        match (answer.get("return"), &answer["error"]["desc"]) {
            (Some(value), _) => Ok(value.clone()),
            (None, reason) => {
                let reason = reason.as_str().map_or_else(|| answer.to_string(), str::to_owned);
                Err(AgentError::Refused { command, reason })
            }
        }
    }

    async fn send(&mut self, line: &[u8]) -> Result<(), AgentError> {
        let sent = self.stream.get_mut().write_all(line).await;
        sent.map_err(|source| AgentError::Io { socket: self.socket.clone(), source })
    }

    /// The next answer. Lines that are not JSON are skipped.
    async fn receive(&mut self) -> Result<Value, AgentError> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.stream).take(MAX_ANSWER).read_until(b'\n', &mut line).await;
            let read = match read {
                Ok(0) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => read,
            };
            read.map_err(|source| AgentError::Io { socket: self.socket.clone(), source })?;
            // The answer to another client's guest-sync-delimited begins with this byte.
            let line = line.strip_prefix(b"\xff").unwrap_or(&line);
            if let Ok(answer) = serde_json::from_slice(line) {
                return Ok(answer);
            }
        }
    }
}

fn json_line(command: &str, arguments: Value) -> Vec<u8> {
    let mut request = json!({ "execute": command });
    if !arguments.is_null() {
        request["arguments"] = arguments;
    }
    format!("{request}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    /// An agent as qemu-ga is: it carries out one command after the other, whoever has sent
    /// it, and answers whoever is there then. It freezes only when told to go on. Returns
    /// the commands that it has carried out, when the last one was to thaw.
    fn busy_agent(
        listener: UnixListener,
        go_on: std::sync::mpsc::Receiver<()>,
    ) -> std::io::Result<Vec<String>> {
        let (commands, heard) = std::sync::mpsc::channel();
        let peer = std::sync::Arc::new(std::sync::Mutex::new(None));
        let current = std::sync::Arc::clone(&peer);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                *current.lock().unwrap() = stream.try_clone().ok();
                for line in std::io::BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    let line = line.strip_prefix(b"\xff").unwrap_or(&line);
                    let _ = commands.send(serde_json::from_slice::<Value>(line).unwrap());
                }
            }
        });
        let mut done = Vec::new();
        for request in heard {
            let command = request["execute"].as_str().unwrap().to_owned();
            if command == "guest-fsfreeze-freeze" {
                let _ = go_on.recv();
            }
            let result = request["arguments"].get("id").cloned().unwrap_or(json!(1));
            if let Some(peer) = &mut *peer.lock().unwrap() {
                // It may have hung up.
                let _ = peer.write_all(format!("{}\n", json!({ "return": result })).as_bytes());
            }
            done.push(command);
            if done.last().is_some_and(|command| command == "guest-fsfreeze-thaw") {
                break;
            }
        }
        Ok(done)
    }

    #[tokio::test]
    async fn what_is_frozen_late_is_thawed_later() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (go_on, told) = std::sync::mpsc::channel();
        let agent = std::thread::spawn(move || busy_agent(listener, told));

        let waits_little_for_freezing = Patience { freeze: SHORT, ..PATIENCE };
        let agent_of_ours = Agent::connect(&socket, &waits_little_for_freezing).await.unwrap();
        let frozen = agent_of_ours.freeze().await;
        assert!(
            matches!(frozen, Err(AgentError::Timeout { command, .. }) if command.contains("freeze"))
        );
        // It freezes only now that somebody has tried in vain to thaw.
        let tries_once = Patience { answer: SHORT, persist: Duration::ZERO, ..PATIENCE };
        let thawed = thaw(&socket, &tries_once).await;
        assert!(matches!(thawed, Err(AgentError::Timeout { command: "guest-sync", .. })));
        go_on.send(()).unwrap();
        thaw(&socket, &PATIENCE).await.unwrap();
        let done = agent.join().unwrap().unwrap();
        let frozen = done.iter().position(|command| command == "guest-fsfreeze-freeze");
        assert!(frozen.is_some_and(|at| at < done.len() - 1), "{done:?}");
    }

    #[tokio::test]
    async fn an_agent_that_is_gone_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let error = thaw(&socket, &PATIENCE).await.unwrap_err();
        assert!(matches!(error, AgentError::Io { .. }) && !error.may_pass());
    }
}
