//! How an image is written, and what came of it.

use std::time::Duration;

use uuid::Uuid;

use crate::image::format::error::ImageError;
use crate::image::format::layout::MAX_CHUNK_PAGES;

/// Whether and how chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: fastest to save and to revert.
    None,
    /// zstd at a level of -7 (fastest) to 22 (smallest). A chunk that does not
    /// get smaller is stored plain.
    Zstd(i32),
}

/// What becomes of the host's page cache while an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheUse {
    /// The image stays in it as long as there is memory that nobody uses; beyond that, it
    /// takes 256 MiB at most, and no other file has to give way.
    WhatIsFree,
    /// The image does not stay in it.
    Drop,
    /// The kernel decides, as for any file.
    Keep,
}

/// How an image lays out the pages of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// In chunks, one behind the other in whatever order suits: as small as it gets.
    Packed,
    /// As they lie in memory, not compressed, with holes for zeros: it can be mapped.
    Flat,
}

/// How an image is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterOptions {
    /// Whether and how chunks are compressed.
    pub compression: Compression,
    /// Pages per chunk: a power of two from 1 to 64.
    pub chunk_pages: usize,
    /// Replace an existing file.
    pub force: bool,
    /// Bytes of page contents that may be buffered before [`ImageWriter::page`](super::ImageWriter::page)
    /// waits for the disk. Raised to what the threads need to keep going: four
    /// chunks, and two more for each worker.
    pub memory: usize,
    /// Threads that checksum and compress, 1 to 64; one more thread writes.
    pub workers: usize,
    /// The most bytes a second that are written to the file; as many as can be without.
    pub bandwidth: Option<u64>,
    /// What becomes of the host's page cache.
    pub cache: CacheUse,
}

impl Default for WriterOptions {
    /// Plain chunks of 16 KiB, 64 MiB of buffers, a worker for each processor up
    /// to 4, no overwriting, no limit to the rate, the page cache's free room.
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
    /// Checks what the format and this program allow.
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
pub struct WriterStats {
    /// Distinct pages given so far that are not all zeros.
    pub data_pages: u64,
    /// Distinct pages given so far that are all zeros.
    pub zero_pages: u64,
    /// Bytes of chunks written to the file so far (not necessarily to the disk).
    pub written_bytes: u64,
    /// Bytes of buffers in use, at most `WriterOptions::memory` (or the floor
    /// that is stated there).
    pub buffered_bytes: usize,
    /// Time that [`ImageWriter::page`](super::ImageWriter::page) has waited because that bound was reached.
    pub stalled: Duration,
}

/// A finished image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// The image's identity.
    pub identity: Uuid,
    /// Number of pages stored.
    pub data_pages: u64,
    /// Number of pages that are all zeros.
    pub zero_pages: u64,
    /// Number of pages, among those stored, that were given when their chunk was there
    /// already. A page that was given twice may count twice.
    pub repeated_pages: u64,
    /// Number of pages, among those stored, that lie in other images.
    pub parent_pages: u64,
    /// Length of the file in bytes.
    pub image_bytes: u64,
}
