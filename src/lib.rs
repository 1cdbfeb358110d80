//! Instant snapshot and instant revert for QEMU virtual machines.

pub mod bench;
pub mod cancel;
pub mod cli;
pub mod doctor;
pub mod exchange;
pub mod guest;
pub mod host;
pub mod image;
pub mod machine;
pub mod memory;
pub mod page;
pub mod qmp;
mod rate;
pub mod revert;
pub mod save;
pub mod transport;
pub mod wire;
