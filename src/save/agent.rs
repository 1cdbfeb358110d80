//! Quiescing: qemu-guest-agent freezes the guest's file systems around the moment.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::agent::{Agent, AgentError};

/// How long to wait for the agent.
pub(super) struct Patience {
    /// Until it answers at all.
    pub answer: Duration,
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

/// Asks the agent who it is, and whether it would freeze file systems. It freezes none.
pub(super) async fn check(socket: &Path, patience: &Patience) -> Result<String, AgentError> {
    const FREEZE: &str = "guest-fsfreeze-freeze";
    let mut agent = Agent::connect(socket, patience.answer).await?;
    let info = agent.ask("guest-info", Value::Null, patience.answer).await?;
    let mut commands = info["supported_commands"].as_array().into_iter().flatten();
    if commands.any(|command| command["name"] == FREEZE && command["enabled"] == false) {
        let reason = "the guest's administrator has turned it off".to_owned();
        return Err(AgentError::Refused { command: FREEZE, reason });
    }
    Ok(format!("qemu-guest-agent {} answers", info["version"].as_str().unwrap_or_default()))
}

/// Thaws all file systems of a guest: the agent can't thaw less than all.
pub(super) async fn thaw(socket: &Path, patience: &Patience) -> Result<(), AgentError> {
    persist(patience, || async {
        let mut agent = Agent::connect(socket, patience.answer).await?;
        agent.ask("guest-fsfreeze-thaw", Value::Null, patience.thaw).await.map(drop)
    })
    .await
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

/// Freezes all file systems that the agent can freeze, and returns how many those are.
/// If that fails, they may be frozen all the same, or may be frozen later.
pub(super) async fn freeze(mut agent: Agent, patience: &Patience) -> Result<u64, AgentError> {
    const COMMAND: &str = "guest-fsfreeze-freeze";
    let answer = agent.ask(COMMAND, Value::Null, patience.freeze).await?;
    let refused =
        || AgentError::Refused { command: COMMAND, reason: format!("it answered {answer}") };
    answer.as_u64().ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, Write};
    use std::os::unix::net::UnixListener;

    use serde_json::json;

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
        let agent_of_ours = Agent::connect(&socket, PATIENCE.answer).await.unwrap();
        let frozen = freeze(agent_of_ours, &waits_little_for_freezing).await;
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
