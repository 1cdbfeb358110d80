//! Why the guest's agent fails.

use std::path::PathBuf;
use std::time::Duration;

use crate::kind::{Details, ErrorKind};
use crate::libvirt::LibvirtError;

/// Why the guest's agent did not do what it was asked.
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
    /// The command line has no channel of an agent's.
    #[error(
        "the recorded command line has no channel of the name org.qemu.guest_agent.0 on a Unix \
         socket: name the socket of the guest's agent with `AgentOptions::socket`"
    )]
    NoChannel,
    /// A guest that stays paused can't do what its agent is told.
    #[error("the guest stays paused, so that its agent can't be told anything")]
    Paused,
    /// A guest without network cards was to get new addresses for them.
    #[error(
        "the machine has no network card to which `AgentOptions::new_macs` could give an address"
    )]
    NoCard,
    /// No interface in the guest has the address of its card.
    #[error("no network interface in the guest has the address {address}: is its driver loaded?")]
    NoInterface {
        /// The card's address.
        address: String,
    },
    /// A program in the guest did not end well.
    #[error("the guest's command `{command}` ended with {ended}{said}")]
    Program {
        /// The command.
        command: String,
        /// How it ended.
        ended: String,
        /// What it wrote to its standard error; empty or with a leading separator.
        said: String,
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
        match self {
            AgentError::NoChannel | AgentError::Paused => ErrorKind::OptionsInvalid,
            AgentError::NoCard => ErrorKind::NoSuchDevice,
            _ => ErrorKind::AgentFailed,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            AgentError::Io { socket, .. } | AgentError::Timeout { socket, .. } => Some(socket),
            _ => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

impl AgentError {
    /// Whether another attempt may work: not if the agent has refused, nor if nobody listens
    /// at its socket, as when QEMU has ended.
    pub(crate) fn may_pass(&self) -> bool {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match self {
            AgentError::Refused { .. }
            | AgentError::NoChannel
            | AgentError::Paused
            | AgentError::NoCard
            | AgentError::NoInterface { .. }
            | AgentError::Program { .. }
            | AgentError::NoDomain
            | AgentError::Disconnected { .. }
            | AgentError::Libvirt(LibvirtError::ShutOff { .. }) => false,
            AgentError::Libvirt(_) => true,
            AgentError::Io { source, .. } => !matches!(source.kind(), ConnectionRefused | NotFound),
            AgentError::Timeout { .. } => true,
        }
    }
}
