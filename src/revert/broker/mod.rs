//! The broker: a small process outside of the sandbox, which keeps the two rights that a page
//! server in it has given up and still needs at its end.
//!
//! - The image's working set is read and written: one file, named when the broker is started.
//!   What is written must be a working set.
//! - Memory of one QEMU, named when the broker is started, is collapsed into huge pages, which
//!   takes the right to trace it (process_madvise(2)). That changes nothing of what the memory
//!   holds.
//!
//! The broker reads no image and speaks to no QEMU. It ends when its connection does.

mod client;
mod frames;
mod run;

pub(super) use client::Broker;
pub use run::{Rights, run};
