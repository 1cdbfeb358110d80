//! The bytes on disk, written once: `docs/format.md` draws what stands here.
//!
//! All integers are little-endian. Nothing in this module does I/O.

use crate::identity::Identity;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::image::format::error::ImageError;
use crate::page::PAGE_SIZE;

/// The first bytes of every image, of whatever version.
pub const MAGIC: [u8; 8] = *b"SNAPBACK";
/// The version of the format that is written and read here.
pub const VERSION: u32 = 1;
/// Incompatible feature: pages may lie in other images, which the manifest lists.
pub const LAYERS: u64 = 1;
/// Feature bits known here that a reader must know to read the image.
pub const KNOWN_INCOMPATIBLE: u64 = LAYERS;

/// Length of the superblock in bytes; the data region starts behind it.
pub const SUPERBLOCK_BYTES: usize = 4096;

// Offsets within the superblock, in bytes. Magic, version and the checksum's
// place and kind stay the same in every version.
/// [`MAGIC`].
pub const MAGIC_OFFSET: usize = 0;
/// u32: [`VERSION`].
pub const VERSION_OFFSET: usize = 8;
/// u32: the most pages a chunk holds, a power of two.
pub const CHUNK_PAGES_OFFSET: usize = 12;
/// u64: feature bits that a reader may ignore.
pub const COMPATIBLE_OFFSET: usize = 16;
/// u64: feature bits that a reader must know, or refuse the image.
pub const INCOMPATIBLE_OFFSET: usize = 24;
/// u64: length of the whole file in bytes.
pub const FILE_LEN_OFFSET: usize = 32;
/// 16 bytes: the image's identity.
pub const IDENTITY_OFFSET: usize = 40;
/// u64: number of chunks.
pub const CHUNK_COUNT_OFFSET: usize = 56;
/// u64: number of target pages of all blocks.
pub const PAGE_COUNT_OFFSET: usize = 64;
/// [`REGIONS`] records of [`REGION_BYTES`] each.
pub const REGIONS_OFFSET: usize = 72;
/// u64: xxh3-64 of all bytes before it. What lies between the regions and here
/// is written as zeros and ignored.
pub const SUPERBLOCK_CHECKSUM_OFFSET: usize = SUPERBLOCK_BYTES - 8;

/// Number of regions.
pub const REGIONS: usize = 7;
/// Length of a region's record: u64 file offset, u64 length, u64 checksum
/// (0 where the region's pieces or chunks carry their own).
pub const REGION_BYTES: usize = 24;

const _: () = assert!(REGIONS_OFFSET + REGIONS * REGION_BYTES <= SUPERBLOCK_CHECKSUM_OFFSET);

/// Length of a piece of the chunk table or of the page index, in bytes.
pub const PIECE_BYTES: usize = 4096;
/// Offset in a piece of its u64 checksum; the entries lie before it.
pub const PIECE_CHECKSUM_OFFSET: usize = PIECE_BYTES - 8;

/// Length of an entry of the chunk table in bytes.
pub const CHUNK_ENTRY_BYTES: usize = 24;
/// u64: where the chunk is stored, in bytes from the start of the file.
pub const CHUNK_FILE_OFFSET: usize = 0;
/// u32: stored length in bytes.
pub const CHUNK_STORED_LEN_OFFSET: usize = 8;
/// u8: [`Codec`].
pub const CHUNK_CODEC_OFFSET: usize = 12;
/// u8: number of pages in the chunk.
pub const CHUNK_PAGES_IN_OFFSET: usize = 13;
/// u64: xxh3-64 of the uncompressed bytes. The u16 before it is reserved.
pub const CHUNK_CHECKSUM_OFFSET: usize = 16;

/// Length of an entry of the page index in bytes.
pub const PAGE_ENTRY_BYTES: usize = 8;
/// u8: 0 missing, 1 zero, 2 stored.
pub const PAGE_KIND_OFFSET: usize = 0;
/// u8: the page's place in its chunk, in pages.
pub const PAGE_SLOT_OFFSET: usize = 1;
/// u8: whose chunk it is: 0 is this image, n the manifest's nth layer.
pub const PAGE_LAYER_OFFSET: usize = 2;
/// 40 bits: the chunk's number.
pub const PAGE_CHUNK_OFFSET: usize = 3;

/// Most pages a chunk may hold.
pub const MAX_CHUNK_PAGES: usize = 64;
/// Most target pages an image may have (256 TiB of guest memory). It bounds what
/// opening a hostile sparse file allocates.
pub const MAX_PAGES: u64 = 1 << 36;
/// Most chunks an image may have.
pub const MAX_CHUNKS: u64 = 1 << 36;
/// Most other images that an image may refer to.
pub const MAX_LAYERS: usize = 255;
/// Longest manifest, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;
/// Longest section, in bytes.
pub const MAX_SECTION_BYTES: u64 = 1 << 30;

/// The regions of an image, in the order of their records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// The chunks.
    Data = 0,
    /// The chunk table.
    ChunkTable = 1,
    /// The page index.
    PageIndex = 2,
    /// The manifest.
    Manifest = 3,
    /// The migration stream's header and configuration section.
    Config = 4,
    /// The device state sections.
    Devices = 5,
    /// The description of the device state.
    Vmdesc = 6,
}

impl Region {
    /// All of them, in order.
    pub const ALL: [Region; REGIONS] = [
        Region::Data,
        Region::ChunkTable,
        Region::PageIndex,
        Region::Manifest,
        Region::Config,
        Region::Devices,
        Region::Vmdesc,
    ];

    /// What a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Region::Data => "data",
            Region::ChunkTable => "chunk table",
            Region::PageIndex => "page index",
            Region::Manifest => "manifest",
            Region::Config => "config section",
            Region::Devices => "device state section",
            Region::Vmdesc => "vmdesc section",
        }
    }

    /// The seed of the region's checksums. It depends on the image and on the
    /// region, so that bytes of another image or region do not pass.
    pub fn seed(self, identity: Identity) -> u64 {
        let mut key = [0; 17];
        key[..16].copy_from_slice(identity.as_bytes());
        key[16] = self as u8;
        xxh3_64(&key)
    }

    /// The checksum of the region as a whole (manifest and sections).
    pub fn checksum(self, identity: Identity, bytes: &[u8]) -> u64 {
        xxh3_64_with_seed(bytes, self.seed(identity))
    }

    /// For the two tables: bytes per entry. 0 for the others.
    const fn entry_bytes(self) -> usize {
        match self {
            Region::ChunkTable => CHUNK_ENTRY_BYTES,
            Region::PageIndex => PAGE_ENTRY_BYTES,
            _ => 0,
        }
    }

    /// For the two tables: entries per piece.
    pub const fn entries_per_piece(self) -> u64 {
        (PIECE_CHECKSUM_OFFSET / self.entry_bytes()) as u64
    }
}

/// Where a region lies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Checksum of the whole region, or 0 where its parts carry their own.
    pub checksum: u64,
}

impl Extent {
    /// The offset of the byte behind the last one, unless that overflows.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }
}

/// The superblock's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The most pages a chunk holds.
    pub chunk_pages: u32,
    /// Feature bits that a reader must know.
    pub incompatible: u64,
    /// Length of the whole file in bytes.
    pub file_len: u64,
    /// The image's identity.
    pub identity: Identity,
    /// Number of chunks.
    pub chunk_count: u64,
    /// Number of target pages of all blocks.
    pub page_count: u64,
    /// Where the regions lie, in the order of [`Region::ALL`].
    pub regions: [Extent; REGIONS],
}

impl Superblock {
    /// Where a region lies.
    pub fn region(&self, region: Region) -> Extent {
        self.regions[region as usize]
    }

    /// The superblock's bytes.
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut out = [0; SUPERBLOCK_BYTES];
        put(&mut out, MAGIC_OFFSET, &MAGIC);
        put(&mut out, VERSION_OFFSET, &VERSION.to_le_bytes());
        put(&mut out, CHUNK_PAGES_OFFSET, &self.chunk_pages.to_le_bytes());
        // No features of this kind yet.
        put(&mut out, COMPATIBLE_OFFSET, &0u64.to_le_bytes());
        put(&mut out, INCOMPATIBLE_OFFSET, &self.incompatible.to_le_bytes());
        put(&mut out, FILE_LEN_OFFSET, &self.file_len.to_le_bytes());
        put(&mut out, IDENTITY_OFFSET, self.identity.as_bytes());
        put(&mut out, CHUNK_COUNT_OFFSET, &self.chunk_count.to_le_bytes());
        put(&mut out, PAGE_COUNT_OFFSET, &self.page_count.to_le_bytes());
        for (number, extent) in self.regions.iter().enumerate() {
            let at = REGIONS_OFFSET + number * REGION_BYTES;
            put(&mut out, at, &extent.offset.to_le_bytes());
            put(&mut out, at + 8, &extent.len.to_le_bytes());
            put(&mut out, at + 16, &extent.checksum.to_le_bytes());
        }
        seal_superblock(&mut out);
        out
    }

    /// Reads a superblock and checks all that can be checked without the rest of
    /// the image. `name` is the image's, for the errors.
    ///
    /// # Errors
    /// Another file, an unfinished image, damage, a version or a feature that is
    /// not known, or values that contradict each other.
    pub fn decode(bytes: &[u8; SUPERBLOCK_BYTES], name: &str) -> Result<Superblock, ImageError> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(ImageError::Unfinished(name.to_owned()));
        }
        if bytes[MAGIC_OFFSET..MAGIC_OFFSET + 8] != MAGIC {
            return Err(ImageError::NotAnImage(name.to_owned()));
        }
        let damaged = |problem: String| ImageError::damaged(name, "superblock", problem);
        if xxh3_64(&bytes[..SUPERBLOCK_CHECKSUM_OFFSET])
            != get_u64(bytes, SUPERBLOCK_CHECKSUM_OFFSET)
        {
            return Err(damaged("its checksum does not match".into()));
        }
        let version = get_u32(bytes, VERSION_OFFSET);
        if version > VERSION {
            let image = name.to_owned();
            return Err(ImageError::NewerVersion { image, version, known: VERSION });
        }
        if version == 0 {
            return Err(damaged("version 0 does not exist".into()));
        }
        let incompatible = get_u64(bytes, INCOMPATIBLE_OFFSET);
        let unknown = incompatible & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Err(ImageError::UnknownFeatures { image: name.to_owned(), bits: unknown });
        }
        let mut identity = [0; 16];
        identity.copy_from_slice(&bytes[IDENTITY_OFFSET..IDENTITY_OFFSET + 16]);
        let regions = std::array::from_fn(|number| {
            let at = REGIONS_OFFSET + number * REGION_BYTES;
            Extent {
                offset: get_u64(bytes, at),
                len: get_u64(bytes, at + 8),
                checksum: get_u64(bytes, at + 16),
            }
        });
        let superblock = Superblock {
            chunk_pages: get_u32(bytes, CHUNK_PAGES_OFFSET),
            incompatible,
            file_len: get_u64(bytes, FILE_LEN_OFFSET),
            identity: Identity::from_bytes(identity),
            chunk_count: get_u64(bytes, CHUNK_COUNT_OFFSET),
            page_count: get_u64(bytes, PAGE_COUNT_OFFSET),
            regions,
        };
        superblock.check().map_err(damaged)?;
        Ok(superblock)
    }

    /// Checks that the values fit each other; says what does not.
    fn check(&self) -> Result<(), String> {
        if !self.chunk_pages.is_power_of_two() || self.chunk_pages as usize > MAX_CHUNK_PAGES {
            return Err(format!("{} pages per chunk are not possible", self.chunk_pages));
        }
        if self.page_count > MAX_PAGES || self.chunk_count > MAX_CHUNKS {
            return Err(format!(
                "{} pages in {} chunks exceed the format's limits",
                self.page_count, self.chunk_count
            ));
        }
        for region in Region::ALL {
            let Extent { offset, len, .. } = self.region(region);
            let end = self.region(region).end();
            if offset < SUPERBLOCK_BYTES as u64 || end.is_none_or(|end| end > self.file_len) {
                return Err(format!(
                    "the {} ({len} bytes at {offset:#x}) does not lie within the file",
                    region.name()
                ));
            }
            let wanted = match region {
                Region::Data => len,
                Region::ChunkTable => table_bytes(region, self.chunk_count),
                Region::PageIndex => table_bytes(region, self.page_count),
                Region::Manifest => len.min(MAX_MANIFEST_BYTES),
                Region::Config | Region::Devices | Region::Vmdesc => len.min(MAX_SECTION_BYTES),
            };
            if len != wanted {
                return Err(format!(
                    "the {} has {len} bytes where {wanted} are wanted or allowed",
                    region.name()
                ));
            }
        }
        Ok(())
    }
}

/// Writes the superblock's checksum over what stands before it.
pub fn seal_superblock(bytes: &mut [u8; SUPERBLOCK_BYTES]) {
    let checksum = xxh3_64(&bytes[..SUPERBLOCK_CHECKSUM_OFFSET]);
    put(bytes, SUPERBLOCK_CHECKSUM_OFFSET, &checksum.to_le_bytes());
}

/// Length in bytes of a table of so many entries, at most [`MAX_PAGES`].
pub fn table_bytes(region: Region, entries: u64) -> u64 {
    entries.div_ceil(region.entries_per_piece()) * PIECE_BYTES as u64
}

/// The checksum of a piece. The seed is its region's ([`Region::seed`]); the
/// piece's number is mixed in so that a piece from elsewhere does not pass.
pub fn piece_checksum(seed: u64, number: u64, piece: &[u8; PIECE_BYTES]) -> u64 {
    xxh3_64_with_seed(&piece[..PIECE_CHECKSUM_OFFSET], seed.wrapping_add(number))
}

/// How a chunk's bytes are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    #[default]
    Plain = 0,
    /// As one zstd frame (RFC 8878), shorter than the bytes themselves.
    Zstd = 1,
}

/// An entry of the chunk table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Where the chunk is stored, in bytes from the start of the file.
    pub offset: u64,
    /// Stored length in bytes.
    pub stored_len: u32,
    /// How it is stored.
    pub codec: Codec,
    /// Number of pages in it.
    pub pages: u8,
    /// xxh3-64 of the uncompressed bytes.
    pub checksum: u64,
}

impl ChunkEntry {
    /// Length of the uncompressed bytes.
    pub fn plain_len(&self) -> usize {
        usize::from(self.pages) * PAGE_SIZE
    }

    /// The entry's bytes.
    pub fn encode(&self) -> [u8; CHUNK_ENTRY_BYTES] {
        let mut out = [0; CHUNK_ENTRY_BYTES];
        put(&mut out, CHUNK_FILE_OFFSET, &self.offset.to_le_bytes());
        put(&mut out, CHUNK_STORED_LEN_OFFSET, &self.stored_len.to_le_bytes());
        out[CHUNK_CODEC_OFFSET] = self.codec as u8;
        out[CHUNK_PAGES_IN_OFFSET] = self.pages;
        put(&mut out, CHUNK_CHECKSUM_OFFSET, &self.checksum.to_le_bytes());
        out
    }

    /// Reads an entry and checks it against what the superblock says.
    ///
    /// # Errors
    /// Says what is wrong with the entry.
    pub fn decode(
        bytes: &[u8; CHUNK_ENTRY_BYTES],
        superblock: &Superblock,
    ) -> Result<ChunkEntry, String> {
        let codec = match bytes[CHUNK_CODEC_OFFSET] {
            0 => Codec::Plain,
            1 => Codec::Zstd,
            other => return Err(format!("codec {other} is not known")),
        };
        let entry = ChunkEntry {
            offset: get_u64(bytes, CHUNK_FILE_OFFSET),
            stored_len: get_u32(bytes, CHUNK_STORED_LEN_OFFSET),
            codec,
            pages: bytes[CHUNK_PAGES_IN_OFFSET],
            checksum: get_u64(bytes, CHUNK_CHECKSUM_OFFSET),
        };
        if entry.pages == 0 || u32::from(entry.pages) > superblock.chunk_pages {
            return Err(format!(
                "it has {} pages, where a chunk has 1 to {}",
                entry.pages, superblock.chunk_pages
            ));
        }
        let len = entry.stored_len as usize;
        let fits = match codec {
            Codec::Plain => len == entry.plain_len(),
            Codec::Zstd => len > 0 && len < entry.plain_len(),
        };
        if !fits {
            return Err(format!("{len} stored bytes do not suit its {} pages", entry.pages));
        }
        let data = superblock.region(Region::Data);
        let end = entry.offset.checked_add(len as u64);
        // Superblock::check has seen that the region's own end does not overflow.
        if entry.offset < data.offset || end.is_none_or(|end| end > data.offset + data.len) {
            return Err(format!("{len} stored bytes do not lie within the data region"));
        }
        Ok(entry)
    }
}

/// An entry of the page index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageEntry {
    /// The page was never written. A finished image has no such page.
    Missing,
    /// All zeros.
    Zero,
    /// A page of a chunk.
    Stored {
        /// Whose chunk: 0 is this image, n the manifest's nth layer.
        layer: u8,
        /// The chunk's number there, less than 2^40.
        chunk: u64,
        /// The place in the chunk, in pages.
        slot: u8,
    },
}

impl PageEntry {
    /// The raw entry of a missing page.
    pub const MISSING: u64 = 0;
    /// The raw entry of a zero page.
    pub const ZERO: u64 = 1;

    /// The raw entry; its bytes are those of the number, little-endian.
    pub fn encode(self) -> u64 {
        match self {
            PageEntry::Missing => PageEntry::MISSING,
            PageEntry::Zero => PageEntry::ZERO,
            PageEntry::Stored { layer, chunk, slot } => {
                2 | u64::from(slot) << (8 * PAGE_SLOT_OFFSET)
                    | u64::from(layer) << (8 * PAGE_LAYER_OFFSET)
                    | chunk << (8 * PAGE_CHUNK_OFFSET)
            }
        }
    }

    /// Reads a raw entry.
    ///
    /// # Errors
    /// Says what is wrong with the entry.
    pub fn decode(raw: u64) -> Result<PageEntry, String> {
        let bytes = raw.to_le_bytes();
        let kind = bytes[PAGE_KIND_OFFSET];
        match kind {
            0 | 1 if raw != u64::from(kind) => Err(format!("entry {raw:#x} has stray bits")),
            0 => Ok(PageEntry::Missing),
            1 => Ok(PageEntry::Zero),
            2 => Ok(PageEntry::Stored {
                layer: bytes[PAGE_LAYER_OFFSET],
                chunk: raw >> (8 * PAGE_CHUNK_OFFSET),
                slot: bytes[PAGE_SLOT_OFFSET],
            }),
            _ => Err(format!("kind {kind} is not known")),
        }
    }
}

/// Copies bytes into a place. The place is one of the constants above.
pub fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The u32 at a place, which is one of the constants above.
pub fn get_u32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

/// The u64 at a place, which is one of the constants above.
pub fn get_u64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}
