//! What the kernel tells and does. Nothing here knows of QEMU or of images.

pub mod in_use;
pub mod memory;
pub mod pidfd;
pub mod procfs;
pub mod program;
pub mod uffd;
