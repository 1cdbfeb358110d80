//! Making chunks of groups of pages: the work of one packing thread.

use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::image::format::error::ImageError;
use crate::image::format::layout::{ChunkEntry, Codec, PageEntry};
use crate::image::write::dedupe::{Known, Number};
use crate::image::write::delta::{Base, Comparer};
use crate::image::write::options::Compression;
use crate::page::{PAGE_SIZE, Page};

/// Room for one chunk.
pub(in crate::image) type Buffer = Box<[u8]>;

/// Pages of one aligned group, to be stored.
pub(in crate::image) struct Job {
    /// Its number, unique within the image.
    pub number: u64,
    /// The group's first page, and its entry in the page index.
    pub page: Page,
    pub first: usize,
    /// Which pages of the group they are.
    pub mask: u64,
    /// The group's pages, each in its place.
    pub buffer: Buffer,
}

/// What became of a job's pages.
pub(in crate::image) struct Stored {
    /// The job's number.
    pub job: u64,
    /// The group's first entry in the page index.
    pub first: usize,
    /// Pages that lie in other images: places in the group, and entries.
    pub elsewhere: Vec<(u8, PageEntry)>,
    /// Places of the other pages.
    pub mask: u64,
    /// The chunk that holds these, one after the other in their order.
    pub chunk: u64,
    /// Whether that chunk was known before.
    pub again: bool,
}

impl Stored {
    /// The pages' places in the page index, each with its entry there.
    pub fn entries(&self) -> impl Iterator<Item = (usize, PageEntry)> {
        let own = |(slot, place)| (place, PageEntry::Stored { layer: 0, chunk: self.chunk, slot });
        let elsewhere = self.elsewhere.iter().map(|(place, entry)| (usize::from(*place), *entry));
        let entries = (0..).zip(bits(self.mask)).map(own).chain(elsewhere);
        entries.map(|(place, entry)| (self.first + place, entry))
    }
}

/// The places of the bits that are set, in order.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = mask.trailing_zeros() as usize;
        (mask != 0).then(|| {
            mask &= mask - 1;
            place
        })
    })
}

/// A chunk to be written.
pub(in crate::image) struct NewChunk {
    /// Its entry in the chunk table, which lacks only the offset.
    pub entry: ChunkEntry,
    /// Its stored bytes, as long as the entry says.
    pub buffer: Buffer,
    /// Its number, and the pages that it is made of.
    pub stored: Stored,
}

/// A buffer that goes back to the caller, and what became of the pages in it.
pub(in crate::image) struct Returned {
    pub buffer: Buffer,
    pub stored: Stored,
}

/// What packing a job has led to.
pub(in crate::image) enum Packed {
    /// A new chunk, to be written.
    New(NewChunk),
    /// Nothing to write: all pages are stored already.
    Known(Returned),
}

/// What the packing threads share.
pub(in crate::image) struct Packing {
    compression: Compression,
    /// The size of a group in bytes.
    pub chunk_bytes: usize,
    /// The image on top of which this one is written.
    base: Option<Arc<Base>>,
    known: Known,
}

impl Packing {
    pub fn new(compression: Compression, chunk_bytes: usize, base: Option<&Arc<Base>>) -> Packing {
        Packing { compression, chunk_bytes, base: base.cloned(), known: Known::new() }
    }
}

/// Packs, deduplicates, checksums and compresses chunks: the state of one thread.
pub(in crate::image) struct Packer {
    common: Arc<Packing>,
    comparer: Option<Comparer>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    /// Room for the compressed bytes, exchanged for the chunk's own buffer.
    scratch: Buffer,
}

impl Packer {
    pub fn new(common: &Arc<Packing>, path: &Path) -> Result<Packer, ImageError> {
        let failed = |e| ImageError::io("make a compressor for", path, e);
        let (zstd, room) = match common.compression {
            Compression::None => (None, 0),
            Compression::Zstd(level) => {
                let zstd = zstd::bulk::Compressor::new(level).map_err(failed)?;
                (Some(zstd), common.chunk_bytes)
            }
        };
        let comparer = common.base.as_ref().map(Comparer::new).transpose()?;
        Ok(Packer { common: Arc::clone(common), comparer, zstd, scratch: vec![0; room].into() })
    }

    pub fn pack(&mut self, job: Job) -> Packed {
        let Job { number: job, page, first, mask, mut buffer } = job;
        let (mask, elsewhere) = self.find_elsewhere(page, mask, &buffer);
        let mut stored = Stored { job, first, elsewhere, mask, chunk: 0, again: false };
        let pages = pull_together(&mut buffer, mask);
        if pages == 0 {
            return Packed::Known(Returned { buffer, stored });
        }
        let plain = &buffer[..pages * PAGE_SIZE];
        match self.common.known.number(plain) {
            Number::New(number) => stored.chunk = number,
            Number::Again(number) => {
                (stored.chunk, stored.again) = (number, true);
                return Packed::Known(Returned { buffer, stored });
            }
        }
        let mut entry = ChunkEntry {
            offset: 0,
            stored_len: plain.len() as u32,
            codec: Codec::Plain,
            pages: pages as u8,
            checksum: xxh3_64(plain),
        };
        if let Some(zstd) = &mut self.zstd {
            // The output may have one byte less than the input: compression fails where it
            // would gain nothing, and the chunk is stored plain.
            let room = &mut self.scratch[..plain.len() - 1];
            if let Ok(packed_len) = zstd.compress_to_buffer(plain, room) {
                entry.stored_len = packed_len as u32;
                entry.codec = Codec::Zstd;
                std::mem::swap(&mut buffer, &mut self.scratch);
            }
        }
        Packed::New(NewChunk { entry, buffer, stored })
    }

    /// Looks up the pages of a group in the base image. Returns the places of those that
    /// it does not hold, and the entries of those that it does.
    fn find_elsewhere(
        &mut self,
        first: Page,
        mask: u64,
        buffer: &[u8],
    ) -> (u64, Vec<(u8, PageEntry)>) {
        let (mut rest, mut elsewhere) = (mask, Vec::new());
        let Some(comparer) = &mut self.comparer else { return (rest, elsewhere) };
        for place in bits(mask) {
            let page = Page { number: first.number + place as u64, ..first };
            let bytes = &buffer[place * PAGE_SIZE..(place + 1) * PAGE_SIZE];
            if let Some(entry) = comparer.same(page, bytes) {
                rest &= !(1 << place);
                elsewhere.push((place as u8, entry));
            }
        }
        (rest, elsewhere)
    }
}

/// Moves the pages of the mask to the front, in order. Returns their number.
fn pull_together(buffer: &mut [u8], mask: u64) -> usize {
    let mut pages = 0;
    for place in bits(mask) {
        if place != pages {
            let page = place * PAGE_SIZE..(place + 1) * PAGE_SIZE;
            buffer.copy_within(page, pages * PAGE_SIZE);
        }
        pages += 1;
    }
    pages
}
