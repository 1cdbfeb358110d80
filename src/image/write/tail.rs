//! What a writer appends behind the data region: the tables, the manifest and the
//! sections.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::identity::Identity;

use crate::image::format::error::ImageError;
use crate::image::format::layout::{
    ChunkEntry, Extent, LAYERS, MAX_MANIFEST_BYTES, MAX_SECTION_BYTES, PIECE_BYTES,
    PIECE_CHECKSUM_OFFSET, REGIONS, Region, SUPERBLOCK_BYTES, Superblock, piece_checksum, put,
    table_bytes,
};
use crate::image::format::manifest::{Manifest, Sections};
use crate::image::write::sink::Sink;
use crate::image::write::target::Target;

/// Writes the regions behind the data region.
pub(in crate::image) struct Tail {
    out: BufWriter<Sink>,
    identity: Identity,
    at: u64,
    regions: [Extent; REGIONS],
}

impl Tail {
    /// Starts behind the last chunk.
    pub fn new(mut sink: Sink, identity: Identity) -> Tail {
        let data_end = sink.at();
        let mut regions = [Extent::default(); REGIONS];
        let start = SUPERBLOCK_BYTES as u64;
        regions[Region::Data as usize] =
            Extent { offset: start, len: data_end - start, checksum: 0 };
        let at = data_end.next_multiple_of(PIECE_BYTES as u64);
        sink.skip_to(at);
        Tail { out: BufWriter::with_capacity(1 << 20, sink), identity, at, regions }
    }

    /// A table, in pieces that carry their own checksums.
    pub fn table<const N: usize>(
        &mut self,
        region: Region,
        entries: impl Iterator<Item = [u8; N]>,
    ) -> io::Result<()> {
        let seed = region.seed(self.identity);
        let mut number = 0;
        let mut piece = [0; PIECE_BYTES];
        let mut filled = 0;
        let mut seal = |out: &mut BufWriter<Sink>, piece: &mut [u8; PIECE_BYTES]| {
            let checksum = piece_checksum(seed, number, piece);
            put(piece, PIECE_CHECKSUM_OFFSET, &checksum.to_le_bytes());
            number += 1;
            let written = out.write_all(piece);
            *piece = [0; PIECE_BYTES];
            written
        };
        for entry in entries {
            if filled + N > PIECE_CHECKSUM_OFFSET {
                seal(&mut self.out, &mut piece)?;
                filled = 0;
            }
            put(&mut piece, filled, &entry);
            filled += N;
        }
        if filled > 0 {
            seal(&mut self.out, &mut piece)?;
        }
        self.place(region, number * PIECE_BYTES as u64, 0);
        Ok(())
    }

    /// A table of which nothing is written: a hole in the file, whose checksums are wrong.
    pub fn absent_table(&mut self, region: Region, entries: u64) -> io::Result<()> {
        self.place(region, table_bytes(region, entries), 0);
        self.out.flush()?;
        self.out.get_mut().skip_to(self.at);
        Ok(())
    }

    /// A region with one checksum for the whole.
    pub fn whole(&mut self, region: Region, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.place(region, bytes.len() as u64, region.checksum(self.identity, bytes));
        Ok(())
    }

    fn place(&mut self, region: Region, len: u64, checksum: u64) {
        self.regions[region as usize] = Extent { offset: self.at, len, checksum };
        self.at += len;
    }

    /// Where all regions lie, and the length of the file.
    pub fn finish(self) -> io::Result<([Extent; REGIONS], u64)> {
        let sink = self.out.into_inner().map_err(|error| error.into_error())?;
        sink.finish()?;
        Ok((self.regions, self.at))
    }
}

/// What stands behind the chunks.
pub(in crate::image) struct Parts<'a> {
    pub manifest: &'a Manifest,
    pub sections: &'a Sections,
    pub chunks: &'a [ChunkEntry],
    pub index: Index<'a>,
    /// The most pages that a chunk holds.
    pub chunk_pages: u32,
}

/// Where pages are.
pub(in crate::image) enum Index<'a> {
    Entries(&'a [u64]),
    /// Of so many pages, none of which can be found.
    Absent(u64),
}

/// Writes the regions behind the chunks, where `sink` stands, and then the superblock. Makes
/// the file durable and gives it its name. Returns its length in bytes.
pub(in crate::image) fn finish(
    target: Target,
    sink: Sink,
    parts: Parts<'_>,
) -> Result<u64, ImageError> {
    let file_len = write(target.file(), target.path(), sink, parts)?;
    target.commit()?;
    Ok(file_len)
}

/// Writes them to a file that needs neither. `path` is what errors call it.
pub(in crate::image) fn write(
    file: &File,
    path: &Path,
    sink: Sink,
    parts: Parts<'_>,
) -> Result<u64, ImageError> {
    let Parts { manifest, sections, chunks, index, chunk_pages } = parts;
    let io = |e| ImageError::io("write", path, e);
    let incompatible = if manifest.layers.is_empty() { 0 } else { LAYERS };
    let identity = manifest.identity;
    let manifest = serde_json::to_vec(manifest).map_err(|e| io(e.into()))?;

    let mut tail = Tail::new(sink, identity);
    tail.table(Region::ChunkTable, chunks.iter().map(|entry| entry.encode())).map_err(io)?;
    let page_count = match index {
        Index::Entries(index) => {
            let entries = index.iter().map(|raw| raw.to_le_bytes());
            tail.table(Region::PageIndex, entries).map_err(io)?;
            index.len() as u64
        }
        Index::Absent(pages) => {
            tail.absent_table(Region::PageIndex, pages).map_err(io)?;
            pages
        }
    };
    for (region, bytes, limit) in [
        (Region::Manifest, &manifest, MAX_MANIFEST_BYTES),
        (Region::Config, &sections.config, MAX_SECTION_BYTES),
        (Region::Devices, &sections.devices, MAX_SECTION_BYTES),
        (Region::Vmdesc, &sections.vmdesc, MAX_SECTION_BYTES),
    ] {
        let len = bytes.len() as u64;
        if len > limit {
            return Err(ImageError::TooLarge { what: region.name(), len, limit });
        }
        tail.whole(region, bytes).map_err(io)?;
    }
    let (regions, file_len) = tail.finish().map_err(io)?;
    let superblock = Superblock {
        chunk_pages,
        incompatible,
        file_len,
        identity,
        chunk_count: chunks.len() as u64,
        page_count,
        regions,
    };
    file.write_all_at(&superblock.encode(), 0).map_err(io)?;
    Ok(file_len)
}
