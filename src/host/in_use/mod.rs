//! What is in use on this host right now, read from /proc (proc(5)) and /sys. Nothing is
//! connected to or opened for that, which could disturb what we only ask about.
//!
//! Processes of other users can't be looked into without root. That one of them has bound a port
//! is seen all the same; which files it has open is not.

mod files;
mod owner;
mod ports;
mod sockets;
mod table;
mod taps;

pub use files::{Holder, has_open, holders, is_open_elsewhere};
pub use owner::Owner;
pub use ports::{Port, Protocol, ReservedPort, bound_over, reserve_port};
pub use sockets::{Address, is_listening};
pub use table::ReadError;
pub use taps::{Attached, attached};
