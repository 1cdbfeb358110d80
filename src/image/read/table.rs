//! The chunk table and the page index, read piece by piece as they are touched.

use std::sync::OnceLock;

use crate::image::format::error::ImageError;
use crate::image::format::layout::{
    PIECE_BYTES, PIECE_CHECKSUM_OFFSET, Region, Superblock, get_u64, piece_checksum,
};
use crate::image::store::Store;

/// Pieces per shelf, and shelves per rack. Each is made when the first of its pieces is
/// touched, so that opening an image does not cost by its size: 24 bytes per rack, which
/// of the page index is half a TiB of guest memory.
const SHELF: u64 = 512;

/// A verified piece.
pub(in crate::image) type Piece = [u8; PIECE_BYTES];
type Shelf = Box<[OnceLock<Box<Piece>>]>;
type Rack = Box<[OnceLock<Shelf>]>;

/// So many places, all empty.
fn empty<T>(count: u64) -> Box<[OnceLock<T>]> {
    (0..count).map(|_| OnceLock::new()).collect()
}

/// A table in an image, and those of its pieces that have been read and verified.
///
/// Pieces are read, not mapped: a file that is truncated or a disk that fails is an
/// error that can be handled instead of a SIGBUS, and a piece that was verified can't
/// change any more, whoever writes to the file. A piece
/// is read once; threads that meet on it may both read it, and one copy stays.
pub(in crate::image) struct Table {
    region: Region,
    /// Where it starts in the image, in bytes.
    offset: u64,
    entries: u64,
    seed: u64,
    racks: Box<[OnceLock<Rack>]>,
}

impl Table {
    /// The chunk table or the page index of an image.
    pub fn new(region: Region, superblock: &Superblock) -> Table {
        let entries = match region {
            Region::ChunkTable => superblock.chunk_count,
            _ => superblock.page_count,
        };
        let pieces = entries.div_ceil(region.entries_per_piece());
        Table {
            region,
            offset: superblock.region(region).offset,
            entries,
            seed: region.seed(superblock.identity),
            racks: empty(pieces.div_ceil(SHELF * SHELF)),
        }
    }

    /// Number of entries.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Number of pieces.
    pub fn pieces(&self) -> u64 {
        self.entries.div_ceil(self.region.entries_per_piece())
    }

    /// The numbers of the entries in a piece.
    pub fn entries_of(&self, piece: u64) -> std::ops::Range<u64> {
        let per_piece = self.region.entries_per_piece();
        piece * per_piece..((piece + 1) * per_piece).min(self.entries)
    }

    /// An entry's bytes. `number` must be less than [`Table::entries`].
    pub fn entry<const N: usize>(
        &self,
        number: u64,
        store: &dyn Store,
    ) -> Result<[u8; N], ImageError> {
        let piece = number / self.region.entries_per_piece();
        Ok(self.entry_in(self.piece(piece, store)?, number))
    }

    /// An entry's bytes within its piece.
    pub fn entry_in<const N: usize>(&self, piece: &Piece, number: u64) -> [u8; N] {
        let at = (number % self.region.entries_per_piece()) as usize * N;
        let mut entry = [0; N];
        entry.copy_from_slice(&piece[at..at + N]);
        entry
    }

    fn piece(&self, number: u64, store: &dyn Store) -> Result<&Piece, ImageError> {
        let rack = self.racks[(number / SHELF / SHELF) as usize].get_or_init(|| empty(SHELF));
        let shelf = rack[(number / SHELF % SHELF) as usize].get_or_init(|| empty(SHELF));
        let slot = &shelf[(number % SHELF) as usize];
        match slot.get() {
            Some(piece) => Ok(piece),
            None => {
                let piece = self.load(number, store)?;
                Ok(slot.get_or_init(|| piece))
            }
        }
    }

    /// Reads and verifies a piece without keeping it. `number` must be less than
    /// [`Table::pieces`].
    pub fn load(&self, number: u64, store: &dyn Store) -> Result<Box<Piece>, ImageError> {
        let offset = self.offset + number * PIECE_BYTES as u64;
        let damaged = |problem: String| {
            let place = format!("{} piece {number} at file offset {offset:#x}", self.region.name());
            ImageError::damaged(store.name(), place, problem)
        };
        let mut piece = Box::new([0; PIECE_BYTES]);
        store.read_at(&mut *piece, offset).map_err(|e| damaged(format!("can't read: {e}")))?;
        if piece_checksum(self.seed, number, &piece) != get_u64(&*piece, PIECE_CHECKSUM_OFFSET) {
            return Err(damaged("its checksum does not match".into()));
        }
        Ok(piece)
    }
}
