//! Quiescing: qemu-guest-agent freezes the guest's file systems around the moment
//! (QEMU's "QEMU Guest Agent Protocol Reference").

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::SaveEvent;

/// How long the agent may take to answer at all.
const SYNC_TIMEOUT: Duration = Duration::from_secs(5);

/// How long freezing may take: file systems are written out first.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long thawing may take. The guest has waited long enough by then: it is told.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// Why file systems could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
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
    /// It refuses.
    #[error("the guest agent refused {command}: {reason}")]
    Refused {
        /// What it was asked.
        command: &'static str,
        /// Its words.
        reason: String,
    },
}

/// The file systems of a guest, frozen: to be thawed, whatever happens.
pub(super) struct Freeze {
    socket: PathBuf,
}

impl Freeze {
    /// Freezes all file systems that the agent can freeze. If that fails, they are
    /// thawed.
    pub async fn all(
        socket: &Path,
        on_event: &mut impl FnMut(SaveEvent),
    ) -> Result<Freeze, AgentError> {
        const COMMAND: &str = "guest-fsfreeze-freeze";
        let freeze = Freeze { socket: socket.to_owned() };
        let mut agent = Agent::connect(socket).await?;
        let frozen = agent.ask(COMMAND, FREEZE_TIMEOUT).await.and_then(|answer| {
            let refused = || AgentError::Refused {
                command: COMMAND,
                reason: format!("it answered {answer}"),
            };
            answer.as_u64().ok_or_else(refused)
        });
        match frozen {
            Ok(filesystems) => {
                on_event(SaveEvent::Frozen { filesystems });
                Ok(freeze)
            }
            Err(error) => {
                drop(agent);
                // It may have frozen some, or freeze them yet.
                let _ = freeze.thaw(&mut |_| {}).await;
                Err(error)
            }
        }
    }

    /// Thaws them. An agent that has frozen file systems of its own accord can't thaw
    /// less than all.
    pub async fn thaw(self, on_event: &mut impl FnMut(SaveEvent)) -> Result<(), AgentError> {
        let thawed = thaw(&self.socket).await;
        match &thawed {
            Ok(()) => on_event(SaveEvent::Thawed),
            Err(error) => tracing::warn!("the guest's file systems may still be frozen: {error}"),
        }
        thawed
    }
}

/// Asks the agent who it is, and whether it would freeze file systems. It freezes none.
pub(super) async fn check(socket: &Path) -> Result<String, AgentError> {
    const FREEZE: &str = "guest-fsfreeze-freeze";
    let mut agent = Agent::connect(socket).await?;
    let info = agent.ask("guest-info", SYNC_TIMEOUT).await?;
    let mut commands = info["supported_commands"].as_array().into_iter().flatten();
    if commands.any(|command| command["name"] == FREEZE && command["enabled"] == false) {
        let reason = "the guest's administrator has turned it off".to_owned();
        return Err(AgentError::Refused { command: FREEZE, reason });
    }
    Ok(format!("qemu-guest-agent {} answers", info["version"].as_str().unwrap_or_default()))
}

/// Thaws all file systems of a guest.
pub(super) async fn thaw(socket: &Path) -> Result<(), AgentError> {
    let mut agent = Agent::connect(socket).await?;
    agent.ask("guest-fsfreeze-thaw", THAW_TIMEOUT).await.map(drop)
}

/// A connection to an agent.
struct Agent {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects, and gets past whatever an earlier peer has left in the channel.
    async fn connect(socket: &Path) -> Result<Agent, AgentError> {
        let failed = |source| AgentError::Io { socket: socket.to_owned(), source };
        let stream = UnixStream::connect(socket).await.map_err(failed)?;
        let mut agent = Agent { socket: socket.to_owned(), stream: BufReader::new(stream) };
        let id = u64::from(std::process::id());
        // The agent's parser begins anew at this byte.
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
        match tokio::time::timeout(SYNC_TIMEOUT, synced).await {
            Ok(synced) => synced.map(|()| agent),
            Err(_) => Err(AgentError::Timeout {
                socket: socket.to_owned(),
                command: "guest-sync",
                after: SYNC_TIMEOUT,
            }),
        }
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

    /// The next answer; what is no JSON is none.
    async fn receive(&mut self) -> Result<Value, AgentError> {
        loop {
            let mut line = Vec::new();
            let read = (&mut self.stream).take(MAX_ANSWER).read_until(b'\n', &mut line).await;
            let read = match read {
                Ok(0) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                read => read,
            };
            read.map_err(|source| AgentError::Io { socket: self.socket.clone(), source })?;
            // A guest-sync-delimited of somebody else's leaves this byte.
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
