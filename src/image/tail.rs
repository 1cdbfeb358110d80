//! What a writer appends behind the data region: the tables, the manifest and the
//! sections.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use uuid::Uuid;

use super::layout::{
    Extent, PIECE_BYTES, PIECE_CHECKSUM_OFFSET, REGIONS, Region, SUPERBLOCK_BYTES, piece_checksum,
    put,
};

/// Writes what lies behind the data region.
pub(super) struct Tail<'a> {
    out: BufWriter<&'a File>,
    identity: Uuid,
    at: u64,
    regions: [Extent; REGIONS],
}

impl<'a> Tail<'a> {
    /// Starts behind the last chunk.
    pub fn new(mut file: &'a File, identity: Uuid, data_end: u64) -> io::Result<Tail<'a>> {
        let mut regions = [Extent::default(); REGIONS];
        let start = SUPERBLOCK_BYTES as u64;
        regions[Region::Data as usize] =
            Extent { offset: start, len: data_end - start, checksum: 0 };
        let at = data_end.next_multiple_of(PIECE_BYTES as u64);
        file.seek(SeekFrom::Start(at))?;
        Ok(Tail { out: BufWriter::with_capacity(1 << 20, file), identity, at, regions })
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
        let mut seal = |out: &mut BufWriter<&File>, piece: &mut [u8; PIECE_BYTES]| {
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
    pub fn finish(mut self) -> io::Result<([Extent; REGIONS], u64)> {
        self.out.flush()?;
        Ok((self.regions, self.at))
    }
}
