//! The snapshot image: a machine's memory and state in one file, written once,
//! any page of it found in two look-ups and one read.
//!
//! [`ImageWriter`] writes an image in one pass, [`Image`] reads one and is a
//! [`PageSource`](crate::page::PageSource), [`verify()`] checks one as a whole.
//!
//! - `format`: the bytes, as `docs/format.md` draws them, and the errors. No I/O.
//! - `store`: where the bytes lie, read in ranges. A file, so far.
//! - `read`: images over a store: tables, layers, a cursor over all pages, checks.
//! - `write`: new images, always in files.
//!
//! The reading side knows nothing of the writing side, and neither of QEMU.
//!
//! Checksums (xxh3-64) protect against damage, not against forgery: whoever can write
//! to an image can make it say anything. So everything that is read is checked before it
//! is used, and nothing in a file makes this module panic or allocate without bound.

mod format;
pub(crate) mod journeys;
mod read;
mod store;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_bits;
#[cfg(test)]
mod tests_of_chains;
#[cfg(test)]
mod tests_of_stores;
mod write;

pub use format::error::ImageError;
pub use format::manifest::{Details, LayerRef, Manifest, Sections};
pub(crate) use read::cursor::{Cursor, Held, Piece};
pub use read::exposure::exposure;
pub use read::flat::verify_flat;
pub use read::image::Image;
pub use read::lineage::{Overview, inspect};
#[cfg(any(test, feature = "internals"))]
pub use read::verify::verify;
pub use read::verify::{Damage, DamagedRange, VerifyReport, verify_chain};
pub(crate) use store::{Neighbour, Store};
pub(crate) use write::delta::{Inherited, ParentPages};
#[cfg(any(test, feature = "internals"))]
pub use write::flatten::flatten;
#[cfg(any(test, feature = "internals"))]
pub use write::options::CacheUse;
#[cfg(feature = "internals")]
pub use write::options::WriterStats;
pub use write::options::{Compression, Layout, Saved, WriterOptions};
pub use write::parent::check_parent;
pub(crate) use write::skeleton::skeleton;
pub use write::target::check_target;
pub(crate) use write::target::{Target, check_replaces_none};
pub use write::writer::ImageWriter;
