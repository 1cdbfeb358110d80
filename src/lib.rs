//! Instant snapshot and instant revert for QEMU virtual machines.

pub mod image;
pub mod machine;
pub mod memory;
pub mod page;
pub mod qmp;
pub mod uffd;
pub mod vm;
pub mod wire;
