//! qemu-guest-agent, a program in the guest that is asked by a channel of QEMU's (QEMU's "QEMU
//! Guest Agent Protocol Reference").

mod client;
mod error;
mod program;

pub(crate) use client::Agent;
pub use error::AgentError;
