//! The snapshot image: a machine's memory and state in one file, written once,
//! any page of it found in two look-ups and one read.
//!
//! `docs/format.md` draws the file byte by byte; `layout` is the same in code.
//! [`ImageWriter`] writes an image in one pass, [`Image`] reads one and is a
//! [`PageSource`](crate::page::PageSource), [`verify()`] checks one as a whole.
//!
//! Checksums (xxh3-64) protect against damage, not against forgery: who can write
//! to an image can make it say anything. So whatever is read is checked before it
//! is used, and nothing in a file makes this module panic or take memory without
//! bound.

mod dedupe;
mod delta;
mod error;
mod flat;
mod flatten;
mod layer;
mod layout;
mod lineage;
mod manifest;
mod pack;
mod pieces;
mod pipeline;
mod reader;
mod sink;
mod tail;
mod target;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_of_chains;
mod verify;
mod writer;

pub use error::ImageError;
pub use flat::{flatten_flat, verify_flat};
pub use flatten::flatten;
pub use layout::{
    MAX_CHUNK_PAGES, MAX_CHUNKS, MAX_LAYERS, MAX_MANIFEST_BYTES, MAX_PAGES, MAX_SECTION_BYTES,
    VERSION,
};
pub use lineage::{Overview, check_parent, look};
pub use manifest::{Details, LayerRef, MAX_BLOCKS, MAX_NAME_BYTES, Manifest, Sections};
pub use reader::Image;
pub use target::check_target;
pub(crate) use target::{Target, check_replaces_none};
pub use verify::{
    Damage, DamagedRange, MAX_DAMAGES, MAX_RANGES, VerifyReport, verify, verify_chain,
};
pub use writer::{CacheUse, Compression, ImageWriter, Saved, WriterOptions, WriterStats};
