//! Instant snapshot and instant revert for QEMU virtual machines.

pub mod machine;
pub mod page;
