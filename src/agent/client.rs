//! A connection to the agent by the Unix socket of its channel.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use uuid::Uuid;

use super::AgentError;

/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// A connection to an agent.
pub(crate) struct Agent {
    socket: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Agent {
    /// Connects, and has the agent answer `within` that time.
    pub async fn connect(socket: &Path, within: Duration) -> Result<Agent, AgentError> {
        let mut agent = Agent::open(socket).await?;
        agent.sync(within).await?;
        Ok(agent)
    }

    /// Connects. Whether an agent is there is not known yet.
    pub async fn open(socket: &Path) -> Result<Agent, AgentError> {
        let failed = |source| AgentError::Io { socket: socket.to_owned(), source };
        let stream = UnixStream::connect(socket).await.map_err(failed)?;
        Ok(Agent { socket: socket.to_owned(), stream: BufReader::new(stream) })
    }

    /// Has the agent answer, and skips whatever an earlier connection has left in the channel.
    pub async fn sync(&mut self, within: Duration) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-sync";
        // Random, so that a late answer to an earlier question is not taken for ours. QMP's
        // integers have 63 bits.
        let id = Uuid::new_v4().as_u64_pair().0 >> 1;
        let synced = async {
            // This byte resets the agent's parser.
            let question = json_line(COMMAND, json!({ "id": id }));
            self.send(&[b"\xff", question.as_slice()].concat()).await?;
            // Others are answers to somebody else.
            while self.receive().await?["return"] != json!(id) {}
            Ok(())
        };
        match tokio::time::timeout(within, synced).await {
            Ok(synced) => synced,
            Err(_) => Err(self.timeout(COMMAND, within)),
        }
    }

    /// Carries out a command.
    pub async fn ask(
        &mut self,
        command: &'static str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, AgentError> {
        let asked = async {
            self.send(&json_line(command, arguments)).await?;
            self.receive().await
        };
        let answer = match tokio::time::timeout(within, asked).await {
            Ok(answer) => answer?,
            Err(_) => return Err(self.timeout(command, within)),
        };
        match (answer.get("return"), &answer["error"]["desc"]) {
            (Some(value), _) => Ok(value.clone()),
            (None, reason) => {
                let reason = reason.as_str().map_or_else(|| answer.to_string(), str::to_owned);
                Err(AgentError::Refused { command, reason })
            }
        }
    }

    fn timeout(&self, command: &'static str, after: Duration) -> AgentError {
        AgentError::Timeout { socket: self.socket.clone(), command, after }
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
