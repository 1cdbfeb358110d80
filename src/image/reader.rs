//! Opening an image, and reading what lies in it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::error::ImageError;
use super::layout::{ChunkEntry, Codec, PageEntry, Region, SUPERBLOCK_BYTES, Superblock};
use super::manifest::{Manifest, Sections, check_blocks};
use super::pieces::Table;
use super::writer::no_such_page;
use crate::page::{
    Block, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, SourceError,
};

/// An open image.
///
/// It keeps what has been touched of the page index and the chunk table: 8 bytes
/// per target page and 24 bytes per chunk at most. `Arc<Image>` is a
/// [`PageSource`].
pub struct Image {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) superblock: Superblock,
    manifest: Manifest,
    /// Each block's first entry in the page index.
    starts: Vec<u64>,
    pub(super) chunks: Table,
    pub(super) pages: Table,
}

impl Image {
    /// Opens an image. Reads the superblock and the manifest, nothing else: it
    /// takes as long for 512 GiB as for 512 MiB.
    ///
    /// # Errors
    /// A file that can't be read, is no image, is truncated, damaged, or of a
    /// later version. The message says which and what to do.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Image>, ImageError> {
        let path = path.as_ref();
        let io = |e| ImageError::io("open", path, e);
        // Without O_NONBLOCK a FIFO of that name would block here (fifo(7)).
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(path)
            .map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(ImageError::NotRegular(path.to_owned()));
        }
        let found = metadata.len();
        let truncated = |expected| ImageError::Truncated { path: path.to_owned(), found, expected };
        if found < SUPERBLOCK_BYTES as u64 {
            return Err(truncated(SUPERBLOCK_BYTES as u64));
        }
        let mut bytes = [0; SUPERBLOCK_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(|e| ImageError::io("read", path, e))?;
        let superblock = Superblock::decode(&bytes, path)?;
        if found < superblock.file_len {
            return Err(truncated(superblock.file_len));
        }
        if found > superblock.file_len {
            let problem = format!("{found} bytes where {} belong to it", superblock.file_len);
            return Err(ImageError::damaged(path, "file length", problem));
        }
        let manifest = read_manifest(&file, path, &superblock)?;
        let starts = manifest
            .blocks
            .iter()
            .scan(0, |next, block| {
                let start = *next;
                *next += block.pages();
                Some(start)
            })
            .collect();
        Ok(Arc::new(Image {
            path: path.to_owned(),
            chunks: Table::new(Region::ChunkTable, &superblock),
            pages: Table::new(Region::PageIndex, &superblock),
            file,
            superblock,
            manifest,
            starts,
        }))
    }

    /// What the image says of itself and of the machine.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its identity, different for every image written.
    pub fn identity(&self) -> Uuid {
        self.superblock.identity
    }

    /// Length of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.superblock.file_len
    }

    /// Number of chunks.
    pub fn chunk_count(&self) -> u64 {
        self.superblock.chunk_count
    }

    /// Reads and verifies the parts of the migration stream that are not RAM.
    ///
    /// # Errors
    /// When one can't be read or its checksum does not match.
    pub fn sections(&self) -> Result<Sections, ImageError> {
        let read = |region| read_whole(&self.file, &self.path, &self.superblock, region);
        Ok(Sections {
            config: read(Region::Config)?,
            devices: read(Region::Devices)?,
            vmdesc: read(Region::Vmdesc)?,
        })
    }

    /// Where a page is stored. Costs two look-ups, and the first time in each
    /// 4 KiB of the tables a read and a checksum.
    ///
    /// # Errors
    /// A page that does not exist, or damage where the tables speak of it.
    pub fn find(&self, page: Page) -> Result<Location, ImageError> {
        let number = page.block.index();
        let blocks = &self.manifest.blocks;
        let start = match (blocks.get(number), self.starts.get(number)) {
            (Some(block), Some(start)) if page.number < block.pages() => start,
            _ => return Err(no_such_page(blocks, page)),
        };
        let raw = self.pages.entry(start + page.number, &self.file, &self.path)?;
        self.check_entry(raw, |chunk| self.chunk(chunk)).map_err(|problem| {
            let place = format!(
                "page index of block {:?}, offset {:#x}",
                blocks[number].name,
                page.offset()
            );
            ImageError::damaged(&self.path, place, problem)
        })
    }

    /// The block that an entry of the page index belongs to, and the block's first
    /// entry.
    pub(super) fn block_of(&self, entry: u64) -> Option<(&Block, u64)> {
        // The last block that starts at or before the entry; empty blocks before
        // it may start there too.
        let number = self.starts.partition_point(|start| *start <= entry).checked_sub(1)?;
        self.manifest.blocks.get(number).zip(self.starts.get(number).copied())
    }

    /// Makes a page's entry in the index its location. `chunk` looks up a chunk's
    /// entry.
    pub(super) fn check_entry(
        &self,
        raw: [u8; 8],
        chunk: impl FnOnce(u64) -> Result<ChunkEntry, ImageError>,
    ) -> Result<Location, String> {
        match PageEntry::decode(u64::from_le_bytes(raw))? {
            PageEntry::Zero => Ok(Location::Zero),
            PageEntry::Missing => Err("the page was never written".into()),
            PageEntry::Stored { chunk: number, .. } if number >= self.chunks.entries() => {
                Err(format!("chunk {number} does not exist, there are {}", self.chunks.entries()))
            }
            PageEntry::Stored { chunk: number, slot } => {
                let pages = chunk(number).map_err(|e| e.to_string())?.pages;
                if slot >= pages {
                    return Err(format!("chunk {number} has {pages} pages, not a page {slot}"));
                }
                Ok(Location::Stored { chunk: ChunkId(number), slot: usize::from(slot) })
            }
        }
    }

    /// A chunk's entry in the table.
    fn chunk(&self, number: u64) -> Result<ChunkEntry, ImageError> {
        if number >= self.chunks.entries() {
            let problem = format!("it does not exist, there are {}", self.chunks.entries());
            return Err(ImageError::damaged(&self.path, format!("chunk {number}"), problem));
        }
        let raw = self.chunks.entry(number, &self.file, &self.path)?;
        self.decode_chunk(number, &raw)
    }

    /// Reads a chunk's entry from the table's bytes.
    pub(super) fn decode_chunk(
        &self,
        number: u64,
        raw: &[u8; 24],
    ) -> Result<ChunkEntry, ImageError> {
        ChunkEntry::decode(raw, &self.superblock).map_err(|problem| {
            ImageError::damaged(&self.path, format!("chunk table entry {number}"), problem)
        })
    }

    /// Reads, verifies and drops a section or the manifest.
    pub(super) fn check_whole(&self, region: Region) -> Result<(), ImageError> {
        read_whole(&self.file, &self.path, &self.superblock, region).map(drop)
    }
}

impl PageSource for Arc<Image> {
    fn blocks(&self) -> &[Block] {
        &self.manifest.blocks
    }

    fn chunk_pages(&self) -> usize {
        self.superblock.chunk_pages as usize
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        Ok(self.find(page)?)
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        let buffers = Buffers::new(self)?;
        Ok(Box::new(Reader { image: Arc::clone(self), buffers }))
    }
}

/// One thread's reader of an image's chunks.
struct Reader {
    image: Arc<Image>,
    buffers: Buffers,
}

impl ChunkReader for Reader {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        let entry = self.image.chunk(chunk.0)?;
        Ok(self.buffers.read(&self.image, chunk.0, &entry)?)
    }

    fn read_to(&mut self, chunk: ChunkId, out: &mut [u8]) -> Result<bool, SourceError> {
        let entry = self.image.chunk(chunk.0)?;
        if entry.plain_len() != out.len() {
            return Ok(false);
        }
        self.buffers.opener.read(&self.image, chunk.0, &entry, out)?;
        Ok(true)
    }
}

/// Room for one chunk, and what reads it.
pub(super) struct Buffers {
    plain: Box<[u8]>,
    opener: Opener,
}

/// Room for one chunk as it is stored, and a decompressor.
struct Opener {
    stored: Box<[u8]>,
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Buffers {
    /// Buffers for the largest chunk of an image.
    pub fn new(image: &Image) -> Result<Buffers, ImageError> {
        let len = image.superblock.chunk_pages as usize * PAGE_SIZE;
        let zstd = zstd::bulk::Decompressor::new()
            .map_err(|e| ImageError::io("make a decompressor for", &image.path, e))?;
        let opener = Opener { stored: vec![0; len].into(), zstd };
        Ok(Buffers { plain: vec![0; len].into(), opener })
    }

    /// Reads, decompresses and verifies a chunk.
    pub fn read(
        &mut self,
        image: &Image,
        chunk: u64,
        entry: &ChunkEntry,
    ) -> Result<&[u8], ImageError> {
        // ChunkEntry::decode has seen that neither length exceeds the buffers'.
        let plain = &mut self.plain[..entry.plain_len()];
        self.opener.read(image, chunk, entry, plain)?;
        Ok(plain)
    }
}

impl Opener {
    /// Reads, decompresses and verifies a chunk into `plain`, which has its length.
    fn read(
        &mut self,
        image: &Image,
        chunk: u64,
        entry: &ChunkEntry,
        plain: &mut [u8],
    ) -> Result<(), ImageError> {
        let failed = |problem: String| ImageError::Chunk {
            path: image.path.clone(),
            chunk,
            offset: entry.offset,
            problem,
        };
        let stored = match entry.codec {
            Codec::Plain => &mut *plain,
            Codec::Zstd => &mut self.stored[..entry.stored_len as usize],
        };
        image
            .file
            .read_exact_at(stored, entry.offset)
            .map_err(|e| failed(format!("can't read {} bytes: {e}", entry.stored_len)))?;
        if entry.codec == Codec::Zstd {
            let stored = &self.stored[..entry.stored_len as usize];
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

/// Reads and verifies the manifest, and holds it against the superblock.
fn read_manifest(
    file: &File,
    path: &Path,
    superblock: &Superblock,
) -> Result<Manifest, ImageError> {
    let bytes = read_whole(file, path, superblock, Region::Manifest)?;
    let damaged = |problem: String| ImageError::damaged(path, "manifest", problem);
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
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
    Ok(manifest)
}

/// Reads and verifies a region that has one checksum for the whole. Its length,
/// which [`Superblock::decode`] has bounded, is what this allocates.
fn read_whole(
    file: &File,
    path: &Path,
    superblock: &Superblock,
    region: Region,
) -> Result<Vec<u8>, ImageError> {
    let extent = superblock.region(region);
    let damaged = |problem: String| {
        let place = format!("{} at file offset {:#x}", region.name(), extent.offset);
        ImageError::damaged(path, place, problem)
    };
    let mut bytes = vec![0; extent.len as usize];
    file.read_exact_at(&mut bytes, extent.offset)
        .map_err(|e| damaged(format!("can't read: {e}")))?;
    if region.checksum(superblock.identity, &bytes) != extent.checksum {
        return Err(damaged("its checksum does not match".into()));
    }
    Ok(bytes)
}
