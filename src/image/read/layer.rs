//! A layer: one store with chunks. An image has its own, and one for each image that it
//! refers to.

use xxhash_rust::xxh3::xxh3_64;

use crate::identity::Identity;
use crate::image::format::error::ImageError;
use crate::image::format::flat::check_places;
use crate::image::format::layout::{
    ChunkEntry, Codec, LAYERS, Region, SUPERBLOCK_BYTES, Superblock,
};
use crate::image::format::manifest::{Manifest, check_blocks, check_layers};
use crate::image::read::frame::check_header;
use crate::image::read::table::Table;
use crate::image::store::Store;
use crate::page::{ChunkId, PAGE_SIZE};

/// Bits of a [`ChunkId`] that are the chunk's number; those above are its layer's.
const CHUNK_BITS: u32 = 56;

/// The chunk of that number in an image's nth layer, 0 being its own.
pub(in crate::image) fn chunk_id(layer: u8, number: u64) -> ChunkId {
    ChunkId(u64::from(layer) << CHUNK_BITS | number)
}

/// The layer and the number of a chunk.
pub(in crate::image) fn layer_and_number(chunk: ChunkId) -> (u8, u64) {
    ((chunk.0 >> CHUNK_BITS) as u8, chunk.0 & ((1 << CHUNK_BITS) - 1))
}

/// An open image, as far as its chunks are concerned.
pub(in crate::image) struct Layer {
    pub store: Box<dyn Store>,
    pub superblock: Superblock,
    pub chunks: Table,
}

/// What the file of an image consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The image.
    pub identity: Identity,
    /// Length of the file.
    pub len: u64,
    /// Where its chunks lie. Everything else is needed to open it.
    pub data: std::ops::Range<u64>,
    /// Whether its pages lie as they do in memory.
    pub flat: bool,
}

impl Layer {
    /// What it consists of.
    pub fn shape(&self) -> Result<Shape, ImageError> {
        let Superblock { identity, file_len: len, .. } = self.superblock;
        let data = self.superblock.region(Region::Data);
        // The superblock has been checked: it lies in the file.
        let data = data.offset..data.offset + data.len;
        Ok(Shape { identity, len, data, flat: !self.manifest()?.flat.is_empty() })
    }

    /// Opens an image for its chunks. Reads the superblock, nothing else.
    ///
    /// # Errors
    /// What can't be read, is no image, is truncated, damaged, or of a later version.
    pub fn open(store: Box<dyn Store>) -> Result<Layer, ImageError> {
        let (name, found) = (store.name(), store.len());
        let truncated = |expected| {
            let image = name.to_owned();
            ImageError::Truncated { image, found, expected }
        };
        if found < SUPERBLOCK_BYTES as u64 {
            return Err(truncated(SUPERBLOCK_BYTES as u64));
        }
        let mut bytes = [0; SUPERBLOCK_BYTES];
        store.read_at(&mut bytes, 0).map_err(|error| {
            let image = name.to_owned();
            ImageError::Read { image, position: 0, error }
        })?;
        let superblock = Superblock::decode(&bytes, name)?;
        if found < superblock.file_len {
            return Err(truncated(superblock.file_len));
        }
        if found > superblock.file_len {
            let problem = format!("{found} bytes where {} belong to it", superblock.file_len);
            return Err(ImageError::damaged(name, "file length", problem));
        }
        let chunks = Table::new(Region::ChunkTable, &superblock);
        Ok(Layer { store, superblock, chunks })
    }

    /// Reads from another object from now on, if a copy of this image lies under its name by now.
    pub fn look_again(&self) {
        self.store.look_again(&|other| {
            let mut bytes = [0; SUPERBLOCK_BYTES];
            let read = other.read_at(&mut bytes, 0);
            let superblock = read.ok().and_then(|()| Superblock::decode(&bytes, "").ok());
            superblock.as_ref() == Some(&self.superblock)
        });
    }

    /// What error messages call it.
    pub fn name(&self) -> &str {
        self.store.name()
    }

    /// Reads and verifies the manifest, and checks it against the superblock.
    pub fn manifest(&self) -> Result<Manifest, ImageError> {
        let superblock = &self.superblock;
        let bytes = self.read_whole(Region::Manifest)?;
        let damaged = |problem: String| ImageError::damaged(self.name(), "manifest", problem);
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        let pages = check_blocks(&manifest.blocks).map_err(damaged)?;
        if pages != superblock.page_count {
            return Err(damaged(format!(
                "its blocks have {pages} pages, the page index has {}",
                superblock.page_count
            )));
        }
        if manifest.identity != superblock.identity {
            return Err(damaged("it belongs to another image".into()));
        }
        check_places(&manifest, superblock).map_err(damaged)?;
        check_layers(&manifest, superblock.incompatible & LAYERS != 0).map_err(damaged)?;
        Ok(manifest)
    }

    /// A chunk's entry in the table.
    pub fn chunk(&self, number: u64) -> Result<ChunkEntry, ImageError> {
        if number >= self.chunks.entries() {
            let problem = format!("it does not exist, there are {}", self.chunks.entries());
            return Err(ImageError::damaged(self.name(), format!("chunk {number}"), problem));
        }
        let raw = self.chunks.entry(number, &*self.store)?;
        self.decode_chunk(number, &raw)
    }

    /// Reads a chunk's entry from the table's bytes.
    pub fn decode_chunk(&self, number: u64, raw: &[u8; 24]) -> Result<ChunkEntry, ImageError> {
        ChunkEntry::decode(raw, &self.superblock).map_err(|problem| {
            ImageError::damaged(self.name(), format!("chunk table entry {number}"), problem)
        })
    }

    /// Reads and verifies a region that has one checksum for the whole. Its length,
    /// which [`Superblock::decode`] has bounded, is what this allocates.
    pub fn read_whole(&self, region: Region) -> Result<Vec<u8>, ImageError> {
        let extent = self.superblock.region(region);
        let damaged = |problem: String| {
            let place = format!("{} at file offset {:#x}", region.name(), extent.offset);
            ImageError::damaged(self.name(), place, problem)
        };
        let mut bytes = vec![0; extent.len as usize];
        self.store
            .read_at(&mut bytes, extent.offset)
            .map_err(|e| damaged(format!("can't read: {e}")))?;
        if region.checksum(self.superblock.identity, &bytes) != extent.checksum {
            return Err(damaged("its checksum does not match".into()));
        }
        Ok(bytes)
    }
}

/// Reads uncompressed chunks that lie back to back at once into `out`, which has their
/// length. Returns how many of them, from the first on, are what they should be.
pub(in crate::image) fn read_plain(layer: &Layer, chunks: &[ChunkEntry], out: &mut [u8]) -> usize {
    let start = chunks.first().map_or(0, |chunk| chunk.offset);
    if layer.store.read_at(out, start).is_err() {
        return 0;
    }
    let mut rest = &*out;
    let is_right = |chunk: &&ChunkEntry| {
        let (bytes, behind) = rest.split_at(chunk.plain_len());
        rest = behind;
        xxh3_64(bytes) == chunk.checksum
    };
    chunks.iter().take_while(is_right).count()
}

/// Reads chunks, with a buffer for one.
pub(in crate::image) struct Buffers {
    plain: Box<[u8]>,
    opener: Opener,
}

/// Reads chunks, with a buffer for the stored form of one.
struct Opener {
    stored: Box<[u8]>,
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Buffers {
    /// Buffers for chunks of so many pages. The error names `image`.
    pub fn new(chunk_pages: usize, image: &str) -> Result<Buffers, ImageError> {
        let len = chunk_pages * PAGE_SIZE;
        let zstd = zstd::bulk::Decompressor::new()
            .map_err(|error| ImageError::Decompressor { image: image.to_owned(), error })?;
        let opener = Opener { stored: vec![0; len].into(), zstd };
        Ok(Buffers { plain: vec![0; len].into(), opener })
    }

    /// Reads, decompresses and verifies a chunk of at most as many pages as fit.
    pub fn read(
        &mut self,
        layer: &Layer,
        chunk: u64,
        entry: &ChunkEntry,
    ) -> Result<&[u8], ImageError> {
        // ChunkEntry::decode has seen that neither length exceeds the buffers'.
        let plain = &mut self.plain[..entry.plain_len()];
        self.opener.read(layer, chunk, entry, plain)?;
        Ok(plain)
    }

    /// Does the same straight into `out`, which has the chunk's length.
    pub fn read_to(
        &mut self,
        layer: &Layer,
        chunk: u64,
        entry: &ChunkEntry,
        out: &mut [u8],
    ) -> Result<(), ImageError> {
        self.opener.read(layer, chunk, entry, out)
    }

    /// The bytes of the chunk that [`Buffers::read`] read last, and behind them those of
    /// earlier ones.
    pub fn plain(&self) -> &[u8] {
        &self.plain
    }
}

impl Opener {
    /// Reads, decompresses and verifies a chunk into `plain`, which has its length.
    fn read(
        &mut self,
        layer: &Layer,
        chunk: u64,
        entry: &ChunkEntry,
        plain: &mut [u8],
    ) -> Result<(), ImageError> {
        let failed = |problem: String| ImageError::Chunk {
            image: layer.name().to_owned(),
            chunk,
            offset: entry.offset,
            problem,
        };
        let stored = match entry.codec {
            Codec::Plain => &mut *plain,
            Codec::Zstd => &mut self.stored[..entry.stored_len as usize],
        };
        layer
            .store
            .read_at(stored, entry.offset)
            .map_err(|e| failed(format!("can't read {} bytes: {e}", entry.stored_len)))?;
        if entry.codec == Codec::Zstd {
            let stored = &self.stored[..entry.stored_len as usize];
            check_header(stored).map_err(|problem| failed(problem.to_owned()))?;
            let len = self
                .zstd
                .decompress_to_buffer(stored, plain)
                .map_err(|e| failed(format!("can't decompress {} bytes: {e}", entry.stored_len)))?;
            if len != entry.plain_len() {
                let due = entry.plain_len();
                return Err(failed(format!("decompressed to {len} bytes, not to {due}")));
            }
        }
        if xxh3_64(plain) != entry.checksum {
            return Err(failed("its checksum does not match".into()));
        }
        Ok(())
    }
}
