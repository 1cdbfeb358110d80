//! The layout of a mapped-ram file: an ordinary stream in which every block's entry
//! in the block list is followed by a header, a bitmap and room for all its pages
//! (QEMU's `docs/devel/migration/mapped-ram.rst`; `struct MappedRamHeader` in
//! `migration/ram.c`). A bit of the bitmap is set for a page that is in the file;
//! other pages are zeros.

use std::io::Read;

use super::config::marked_mapped_ram;
use super::input::Input;
use super::source::{push_end_of_ram_section, push_name, push_ram_start};
use super::{WireError, end_of_ram, tail};
use crate::page::{Block, PAGE_SIZE};

/// `MAPPED_RAM_HDR_VERSION`.
const VERSION: u32 = 1;

/// Length of a block's header in bytes; it is packed.
const HEADER_BYTES: u64 = 28;

/// `MAPPED_RAM_FILE_OFFSET_ALIGNMENT`: where pages may begin.
const ALIGNMENT: u64 = 1 << 20;

/// Where a block's memory lies in a mapped-ram file, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedBlock {
    /// Of the bitmap: 64-bit words in the byte order of the host that wrote it, which
    /// is little-endian here; [`MappedBlock::bitmap_bytes`] long.
    pub bitmap_offset: u64,
    /// Of the block's first page.
    pub pages_offset: u64,
}

impl MappedBlock {
    /// Length in bytes of the bitmap of a block of `len` bytes.
    pub fn bitmap_bytes(len: u64) -> u64 {
        (len / PAGE_SIZE as u64).div_ceil(64) * 8
    }

    /// Reads the header of a block of `len` bytes, and passes over all its pages.
    pub(super) fn read<R: Read>(input: &mut Input<R>, len: u64) -> Result<MappedBlock, WireError> {
        let inside = "a mapped-ram header";
        let at = input.at();
        let (version, page_size) = (input.u32(inside)?, input.u64(inside)?);
        let (bitmap_offset, pages_offset) = (input.u64(inside)?, input.u64(inside)?);
        if version != VERSION || page_size != PAGE_SIZE as u64 {
            let what =
                format!("a mapped-ram header of version {version} with pages of {page_size} bytes");
            return Err(WireError::Unsupported { at, what });
        }
        let behind = pages_offset.checked_add(len);
        let bitmap_end = bitmap_offset.checked_add(Self::bitmap_bytes(len));
        match (behind, bitmap_end) {
            (Some(behind), Some(bitmap_end))
                if bitmap_offset >= at && bitmap_end <= pages_offset =>
            {
                input.skip_to(behind, "the stream behind a block's pages")?;
                Ok(MappedBlock { bitmap_offset, pages_offset })
            }
            _ => {
                let what = format!(
                    "a block's bitmap at byte {bitmap_offset} and its pages at byte \
                     {pages_offset} do not follow one another"
                );
                Err(WireError::Malformed { at, what })
            }
        }
    }
}

/// A mapped-ram file to be written: all of it but pages and bitmaps.
#[derive(Debug)]
pub struct MappedLayout {
    /// Where each block's memory goes.
    pub blocks: Vec<MappedBlock>,
    /// The stream: offsets in the file, and the bytes that belong there.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Length of the file in bytes.
    pub len: u64,
}

impl MappedLayout {
    /// Lays out a file of these blocks, with the parts of an ordinary stream.
    pub fn new(config: &[u8], blocks: &[Block], devices: &[u8], vmdesc: &[u8]) -> MappedLayout {
        let mut layout = MappedLayout { blocks: Vec::new(), pieces: Vec::new(), len: 0 };
        let mut bytes = marked_mapped_ram(config);
        push_ram_start(&mut bytes, blocks);
        let mut start = 0;
        for block in blocks {
            push_name(&mut bytes, &block.name);
            bytes.extend_from_slice(&block.len.to_be_bytes());
            let bitmap_offset = start + bytes.len() as u64 + HEADER_BYTES;
            let bitmap_end = bitmap_offset + MappedBlock::bitmap_bytes(block.len);
            let pages_offset = bitmap_end.next_multiple_of(ALIGNMENT);
            bytes.extend_from_slice(&VERSION.to_be_bytes());
            for word in [PAGE_SIZE as u64, bitmap_offset, pages_offset] {
                bytes.extend_from_slice(&word.to_be_bytes());
            }
            layout.blocks.push(MappedBlock { bitmap_offset, pages_offset });
            layout.pieces.push((start, std::mem::take(&mut bytes)));
            start = pages_offset + block.len;
        }
        push_end_of_ram_section(&mut bytes);
        bytes.extend(end_of_ram());
        bytes.extend(tail(devices, vmdesc));
        layout.len = start + bytes.len() as u64;
        layout.pieces.push((start, bytes));
        layout
    }
}
