//! What carries commands to a QEMU: its control socket, or whoever holds that.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde_json::Value;

/// Carries commands to one QEMU, and delivers what QEMU sends to an [`Inbox`](super::Inbox).
/// Dropping it closes the connection.
pub trait Transport: fmt::Debug + Send + Sync {
    /// Sends a command behind those that were sent before, without waiting. Its answer is
    /// delivered with its id. Returns `false` once nothing can be sent any more.
    fn send(&self, command: Outgoing) -> bool;

    /// The control socket itself, where this holds one.
    fn socket(&self) -> Option<BorrowedFd<'_>>;
}

/// A command on its way to QEMU.
#[derive(Debug)]
pub struct Outgoing {
    /// The number of the command: one of its connection.
    pub id: u64,
    /// The command with its arguments, without the number.
    pub request: Value,
    /// The descriptor that goes with it.
    pub fd: Option<OwnedFd>,
}
