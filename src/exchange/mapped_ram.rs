//! mapped-ram files, which QEMU 9.0 and later writes and reads: every page has its
//! place in the file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::output::Output;
use super::pages::for_each;
use super::{ExchangeError, Watch};
use crate::image::{Image, ImageWriter, Piece};
use crate::page::{BlockId, PAGE_SIZE, Page, Run};
use crate::wire::{MappedLayout, StreamBlock};

/// Blocks up to this many pages (16 MiB) have all their pages marked as being in the
/// file, zeros as holes: among them are those that QEMU fills when it starts, and QEMU
/// up to 10.0 does not clear pages that are not in the file.
const SMALL_PAGES: u64 = 4096;

/// Pages read in one call, at most.
const RUN_PAGES: u64 = 256;

/// Bytes of a bitmap read in one call, at most: 64 KiB speak of 2 GiB of memory.
const BITMAP_BYTES: usize = 64 << 10;

/// Writes an image as a mapped-ram file.
pub(super) fn write(
    image: &Arc<Image>,
    output: &Output,
    watch: &mut Watch<'_>,
) -> Result<(), ExchangeError> {
    let sections = image.sections()?;
    let blocks = &image.manifest().blocks;
    let layout = MappedLayout::new(&sections.config, blocks, &sections.devices, &sections.vmdesc);
    output.set_len(layout.len)?;
    for (offset, bytes) in &layout.pieces {
        output.put_at(bytes, *offset)?;
    }
    let mut bitmap = Bitmap::default();
    for_each(image, watch, |piece| {
        let run = piece.run();
        let (block, mapped) = (&blocks[run.block.index()], &layout.blocks[run.block.index()]);
        if let Piece::Data(_, bytes) = piece {
            output.put_at(bytes, mapped.pages_offset + run.offset())?;
            bitmap.mark(run);
        } else if block.pages() <= SMALL_PAGES {
            bitmap.mark(run);
        }
        if run.end() == block.pages() {
            output.put_at(&bitmap.take(), mapped.bitmap_offset)?;
        }
        Ok(())
    })
}

/// One block's bitmap in the making.
#[derive(Default)]
struct Bitmap {
    bytes: Vec<u8>,
}

impl Bitmap {
    fn mark(&mut self, run: Run) {
        for number in run.first..run.end() {
            let at = (number / 8) as usize;
            if self.bytes.len() <= at {
                self.bytes.resize(at + 1, 0);
            }
            self.bytes[at] |= 1 << (number % 8);
        }
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Whether the pages of all blocks lie within the file. They do in every whole one, zeros at
/// their end or not: more of the stream comes behind them.
pub(super) fn check_lengths(
    file: &File,
    path: &Path,
    blocks: &[StreamBlock],
) -> Result<(), ExchangeError> {
    let found = file.metadata().map_err(ExchangeError::io("look at", path))?.len();
    for block in blocks {
        let Some(mapped) = block.mapped else { continue };
        let end = mapped.pages_offset.saturating_add(block.len);
        if end > found {
            return Err(ExchangeError::Memory {
                block: block.name.clone(),
                offset: found.saturating_sub(mapped.pages_offset),
                problem: format!(
                    "`{}` is truncated: it has {found} bytes, and the block's memory reaches to \
                     byte {end}",
                    path.display()
                ),
            });
        }
    }
    Ok(())
}

/// Reads the memory of blocks whose pages have places in `file`; of other blocks
/// nothing.
pub(super) fn read(
    file: &File,
    path: &Path,
    blocks: &[StreamBlock],
    writer: &mut ImageWriter,
    watch: &mut Watch<'_>,
) -> Result<(), ExchangeError> {
    let mut buffer = vec![0; RUN_PAGES as usize * PAGE_SIZE];
    for (index, block) in blocks.iter().enumerate() {
        let Some(mapped) = block.mapped else { continue };
        let (id, pages) = (BlockId(index as u16), block.len / PAGE_SIZE as u64);
        let read_at = |bytes: &mut [u8], offset: u64, page: u64| {
            file.read_exact_at(bytes, offset).map_err(|source| ExchangeError::Memory {
                block: block.name.clone(),
                offset: page * PAGE_SIZE as u64,
                problem: format!("can't read `{}` at byte {offset}: {source}", path.display()),
            })
        };
        for first in (0..pages).step_by(BITMAP_BYTES * 8) {
            let end = pages.min(first + BITMAP_BYTES as u64 * 8);
            let mut bitmap = vec![0; (end - first).div_ceil(8) as usize];
            read_at(&mut bitmap, mapped.bitmap_offset + first / 8, first)?;
            let is_there = |number: u64| {
                let bit = number - first;
                bitmap[(bit / 8) as usize] & 1 << (bit % 8) != 0
            };
            let mut number = first;
            while number < end {
                let run_ends = |n: &u64| !is_there(*n) || *n - number == RUN_PAGES;
                let behind = (number..end).find(run_ends).unwrap_or(end);
                let bytes = &mut buffer[..(behind - number) as usize * PAGE_SIZE];
                read_at(bytes, mapped.pages_offset + number * PAGE_SIZE as u64, number)?;
                for (number, bytes) in (number..behind).zip(bytes.as_chunks().0) {
                    writer.page(Page { block: id, number }, bytes)?;
                }
                watch.done(behind - number)?;
                number = behind;
                while number < end && !is_there(number) {
                    writer.zero(Page { block: id, number })?;
                    watch.done(1)?;
                    number += 1;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::read_memory;
    use crate::page::Block;

    const CONFIG: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";
    /// Why a file is not read that lays out such a block, its pages holes, and ends behind
    /// so many bytes, if it is not.
    fn problem(block_len: u64, most: u64) -> Option<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mapped");
        let block = Block { name: "pc.ram".into(), len: block_len, page_size: 4096 };
        let layout = MappedLayout::new(CONFIG, &[block], b"", b"{}");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        for (offset, bytes) in layout.pieces.iter().filter(|(offset, _)| *offset < most) {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file.set_len(layout.len.min(most)).unwrap();
        let read = read_memory(&file, &path, &directory.path().join("vm.snap"));
        read.err().map(|error| error.to_string())
    }

    #[test]
    fn memory_that_a_file_only_claims_takes_none_of_ours() {
        assert_eq!(problem(1 << 20, u64::MAX), None);
        let problem = problem(8 << 40, 3 << 20).unwrap();
        assert!(problem.contains("pc.ram") && problem.contains("is truncated"), "{problem}");
    }
}
