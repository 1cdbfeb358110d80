//! Instant snapshot and instant revert for QEMU virtual machines.

pub mod bench;
pub mod cli;
pub mod exchange;
pub mod image;
pub mod interrupt;
pub mod machine;
pub mod memory;
pub mod page;
mod program;
pub mod qmp;
pub mod revert;
pub mod save;
pub mod uffd;
pub mod vm;
pub mod wire;
