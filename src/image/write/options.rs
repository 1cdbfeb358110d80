//! How an image is written, and what came of it.

use std::time::Duration;

use crate::identity::Identity;

use crate::image::format::error::ImageError;
use crate::image::format::layout::MAX_CHUNK_PAGES;

/// Whether and how chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// Not at all: fastest to save and to revert.
    None,
    /// zstd at a level of -7 (fastest) to 22 (smallest). A chunk that does not
    /// get smaller is stored plain.
    Zstd(i32),
}

/// What becomes of the host's page cache while an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheUse {
    /// The image stays in the cache as long as half of the host's memory is unused. Beyond
    /// that it takes 256 MiB at most, and displaces no other file.
    WhatIsFree,
    /// The image does not stay in the cache.
    #[cfg_attr(not(any(test, feature = "internals")), expect(dead_code, reason = "for benches"))]
    Drop,
    /// The kernel decides, as for any file.
    Keep,
}

/// How an image lays out the pages of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// In chunks, one behind the other in any order: as small as possible.
    Packed,
    /// As they lie in memory, uncompressed, with holes for zeros: QEMU can map them.
    Flat,
}

/// How an image is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriterOptions {
    /// Whether and how chunks are compressed.
    pub compression: Compression,
    /// Pages per chunk: a power of two from 1 to 64.
    pub chunk_pages: usize,
    /// Replace an existing file.
    pub force: bool,
    /// Bytes of page contents that may be buffered before
    /// [`ImageWriter::page`](crate::image::ImageWriter::page) waits for the disk. Raised to four
    /// chunks, and two more for each worker, which the threads need.
    pub memory: usize,
    /// Threads that checksum and compress, 1 to 64; one more thread writes.
    pub workers: usize,
    /// The most bytes a second that are written to the file; no limit without.
    pub bandwidth: Option<u64>,
    /// What becomes of the host's page cache.
    pub cache: CacheUse,
}

impl Default for WriterOptions {
    /// Plain chunks of 16 KiB, 64 MiB of buffers, a worker for each processor up
    /// to 4, no overwriting, no limit to the rate, unused memory for the page cache.
    fn default() -> WriterOptions {
        WriterOptions {
            compression: Compression::None,
            chunk_pages: 4,
            force: false,
            memory: 64 << 20,
            workers: std::thread::available_parallelism().map_or(1, |n| n.get().min(4)),
            bandwidth: None,
            cache: CacheUse::WhatIsFree,
        }
    }
}

impl WriterOptions {
    /// Checks the ranges that the format and this program allow.
    ///
    /// # Errors
    /// [`ImageError::Options`], which names the option and its range.
    pub(in crate::image) fn check(&self) -> Result<(), ImageError> {
        let WriterOptions { compression, chunk_pages, workers, .. } = *self;
        if !chunk_pages.is_power_of_two() || chunk_pages > MAX_CHUNK_PAGES {
            return Err(ImageError::Options(format!(
                "{chunk_pages} pages per chunk: it must be a power of two from 1 to {MAX_CHUNK_PAGES}"
            )));
        }
        if !(1..=64).contains(&workers) {
            return Err(ImageError::Options(format!("{workers} workers: it must be 1 to 64")));
        }
        match compression {
            Compression::Zstd(level) if !(-7..=22).contains(&level) => {
                Err(ImageError::Options(format!("zstd level {level}: it must be -7 to 22")))
            }
            _ => Ok(()),
        }
    }
}

/// How far a writer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriterStats {
    /// Distinct pages added so far that are not all zeros.
    pub data_pages: u64,
    /// Distinct pages added so far that are all zeros.
    pub zero_pages: u64,
    /// Bytes of chunks written to the file so far (not necessarily to the disk).
    pub written_bytes: u64,
    /// Bytes of buffers in use, at most `WriterOptions::memory` (or the floor
    /// that is stated there).
    pub buffered_bytes: usize,
    /// Time that [`ImageWriter::page`](crate::image::ImageWriter::page) has waited for buffers.
    pub stalled: Duration,
}

/// A finished image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Saved {
    /// The image's identity.
    pub identity: Identity,
    /// Number of pages stored.
    pub data_pages: u64,
    /// Number of pages that are all zeros.
    pub zero_pages: u64,
    /// Number of pages, among those stored, whose chunk was stored already when they were
    /// added. A page that was added twice may count twice.
    pub repeated_pages: u64,
    /// Number of pages, among those stored, that lie in other images.
    pub parent_pages: u64,
    /// Length of the file in bytes.
    pub image_bytes: u64,
}
