//! Repositories: snapshots kept in any object store, deduplicated, found by name
//! (docs/repository-format.md).
//!
//! A repository knows files: an image, the images that it refers to, the files of its disks. Each is
//! cut into extents, named by their content, which lie in packs; a map says of which extents it
//! consists; a manifest, put last, makes a snapshot of them. Nothing here runs a guest.
//!
//! - `format`: the bytes of objects. No I/O.
//! - `keys`: closes and opens what is stored, encrypted or not.
//! - `signing`: who has signed a manifest.
//! - `lease`, `marks`: who is at work, and what will be removed.
//! - `remote`: a store's objects, with retries and typed errors.
//! - `reading`: a repository that is open; names; whole files brought back.
//! - `writing`: files cut into extents and pushed.
//! - `keeping`: what is kept, what goes, whether all is whole.
//!
//! Everything here blocks, in threads that are none of a runtime's.

mod access;
mod error;
mod format;
mod keeping;
mod keys;
#[cfg(feature = "internals")]
mod laboratory;
mod lease;
mod marks;
mod reading;
mod remote;
mod signing;
mod wrapping;
mod writing;

pub use access::{Access, KeySource};
pub use error::{RepositoryError, StoreError, StoreFailure};
pub use format::ids::{ExtentId, MapId, PackId, RepositoryId, SnapshotId};
pub use format::manifest::{FileRef, Role, SnapshotManifest};
pub use format::map::{Extent, FileMap, Inline};
pub use keeping::check::{CheckOptions, Checked, RepositoryDamage, check};
pub use keeping::copy::copy;
pub use keeping::diff::{Difference, diff};
pub use keeping::forget::{ForgetOptions, Looked, Retention, forget};
pub use keeping::prune::{PruneOptions, Pruned, prune};
pub use keeping::tag::tag;
#[cfg(feature = "internals")]
pub use laboratory::{left_lease, put_synthetic, read_hostile, seeds};
pub(crate) use lease::{Held, Lease};
pub use reading::list::{list, time_text};
pub use reading::name::{Moment, SnapshotName};
pub use reading::pull::{PullOptions, Pulled, PulledFile, pull};
pub use reading::repository::{Fetched, Repository, Snapshot};
pub use remote::{Address, StoreWait};
pub use wrapping::Recipients;
pub use writing::archive::{PackOptions, PackSource, PackedAt, pack, unpack};
pub(crate) use writing::push::check_words;
pub use writing::push::{PushOptions, Pushed, push};

use schemars::JsonSchema;
use serde::Serialize;

/// Bytes that move between files and a repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Moved {
    /// Bytes of files done.
    pub done: u64,
    /// Bytes of files in all.
    pub total: u64,
    /// Bytes sent to the repository, or fetched from it.
    pub sent: u64,
}
