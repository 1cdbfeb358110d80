//! A guest goes back to its image inside its own QEMU, which keeps its process, its monitor, its
//! ports and its network.
//!
//! Three things go back:
//!
//! - **memory**: whatever was written since the image's moment. A [`Tracker`] has all of it
//!   write-protected through QEMU's userfaultfd, hears of each page's first write, and sets aside
//!   what was in it. Going back writes those pages, and nothing else. Of memory that is mapped from
//!   a flat image the kernel tells what was written ([`MappedMemory`]), and QEMU loads the blocks
//!   that are not mapped;
//! - **disks**: each is an overlay with an internal snapshot of its empty state;
//! - **devices**: QEMU's `snapshot-load` takes their state from an internal snapshot of any qcow2
//!   node, and need not find RAM there. [`Rewinder`] gives it a file in memory that holds the
//!   devices of the image ([`StateFile`]), and has it go to the overlays' snapshots in the same
//!   command.
//!
//! Whoever tracks can be killed at any time: the userfaultfd closes with its last holder, the
//! kernel then takes all protection off, and the guest runs on untracked.

mod compare;
mod dirty;
mod error;
mod faults;
mod given_back;
mod mapped;
mod memory;
mod obstacles;
mod requests;
mod rewind;
mod shared;
mod state_file;
mod streams;
mod tracker;
mod undo;
mod write_back;

pub use error::ResetError;
pub(crate) use mapped::MappedMemory;
pub(crate) use memory::GuestMemory;
pub(crate) use requests::{Asked, Request, Requests, SOCKET, Tracked, ask};
pub use requests::{Reset, ResetOutcome, ResetWay};
pub(crate) use rewind::Rewinder;
pub(crate) use state_file::StateFile;
pub(crate) use tracker::Tracker;
pub(crate) use undo::Undo;
