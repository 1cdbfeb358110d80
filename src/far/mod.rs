//! Snapshots that are still in a repository, and read as they are needed (docs/disaster-recovery.md).
//!
//! - `cache`: what was fetched, on this host's disk, shared by all who read from afar.
//! - `file`: one file of a repository: what is missing is fetched, several requests at a time.
//! - `store`: that file as what holds an image.
//! - `nbd`: that file as a disk that QEMU reads.
//! - `watch`: whether the store answers.
//! - `options`: which snapshot, and how it is read.
//! - `snapshot`: an image, its parents and its disks, opened from afar.
//! - `again`: how another process opens it again.
//!
//! Nothing here runs a guest.

mod again;
mod cache;
mod fetch;
mod file;
mod latency;
mod nbd;
mod options;
mod snapshot;
mod store;
mod watch;

pub(crate) use again::FarAgain;
pub use cache::CacheOptions;
pub use options::FarOptions;
pub use snapshot::FarSnapshot;
pub use watch::Answering;
