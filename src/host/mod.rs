//! What the kernel tells and does. Nothing here knows of QEMU or of images.

pub mod huge_pages;
pub mod in_use;
pub mod memory;
pub mod packets;
mod page_size;
pub mod paths;
pub mod pidfd;
pub mod procfs;
pub mod program;
pub mod rights;
pub mod sandbox;
pub mod shared_memory;
pub mod shell;
pub mod uffd;

pub use page_size::{PageSizeError, check_page_size};
