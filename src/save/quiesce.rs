//! Who freezes the guest's file systems: its agent, by a socket of its own or through libvirt.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::agent::{self, PATIENCE};
use super::options::Quiesce;
use crate::agent::{Agent, AgentError};
use crate::libvirt::Domain;

/// The agent that is to freeze a guest, reached and ready.
pub(super) enum Freezer {
    Socket(PathBuf, Agent),
    Domain(Domain),
}

impl Freezer {
    /// Reaches it. Nothing is frozen yet.
    pub async fn reach(quiesce: &Quiesce, domain: Option<&Domain>) -> Result<Freezer, AgentError> {
        match (quiesce, domain) {
            (Quiesce::Socket(socket), _) => {
                let agent = Agent::connect(socket, PATIENCE.answer).await?;
                Ok(Freezer::Socket(absolute(socket), agent))
            }
            (Quiesce::Libvirt, Some(domain)) => Ok(Freezer::Domain(domain.clone())),
            (Quiesce::Libvirt, None) => Err(AgentError::NoDomain),
        }
    }

    /// What the journal says of a guest that it has frozen.
    pub fn frozen(&self) -> Frozen {
        match self {
            Freezer::Socket(socket, _) => Frozen::Socket(socket.clone()),
            Freezer::Domain(domain) => Frozen::Domain { domain: domain.uuid().to_owned() },
        }
    }

    /// Freezes all file systems that the agent can freeze, and returns how many those are. If
    /// that fails, they may be frozen all the same, or may be frozen later.
    pub async fn freeze(self) -> Result<u64, AgentError> {
        match self {
            Freezer::Socket(_, agent) => agent::freeze(agent, &PATIENCE).await,
            Freezer::Domain(domain) => {
                match tokio::time::timeout(PATIENCE.freeze, domain.freeze()).await {
                    Ok(frozen) => Ok(frozen?),
                    Err(_) => Err(AgentError::Disconnected { domain: domain.name().to_owned() }),
                }
            }
        }
    }
}

/// The agent of a guest that may be frozen, as a journal tells it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Frozen {
    /// The agent's socket, absolute: `recover` may be called in another working directory.
    Socket(PathBuf),
    /// libvirt's domain, by its UUID.
    Domain { domain: String },
}

impl Frozen {
    /// Thaws all file systems.
    pub async fn thaw(&self, domain: Option<&Domain>) -> Result<(), AgentError> {
        match (self, domain) {
            (Frozen::Socket(socket), _) => agent::thaw(socket, &PATIENCE).await,
            (Frozen::Domain { .. }, Some(domain)) => {
                agent::persist(&PATIENCE, || async { Ok(domain.thaw().await?) }).await
            }
            (Frozen::Domain { .. }, None) => Err(AgentError::NoDomain),
        }
    }
}

/// Asks the agent whether it could freeze file systems. It freezes none.
pub(super) async fn check(
    quiesce: &Quiesce,
    domain: Option<&Domain>,
) -> Result<String, AgentError> {
    match (quiesce, domain) {
        (Quiesce::Socket(socket), _) => agent::check(socket, &PATIENCE).await,
        (Quiesce::Libvirt, None) => Err(AgentError::NoDomain),
        (Quiesce::Libvirt, Some(domain)) => match domain.agent_is_connected().await? {
            true => Ok("an agent is connected to libvirt".to_owned()),
            false => Err(AgentError::Disconnected { domain: domain.name().to_owned() }),
        },
    }
}

fn absolute(socket: &Path) -> PathBuf {
    std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned())
}
