//! An ELF core of the guest's physical memory (elf(5)), as `crash`, `gdb` and
//! `readelf` open it: a PT_LOAD for each range, zeros as holes.

use std::sync::Arc;

use super::output::Output;
use super::pages::{Piece, for_each};
use super::physical::{Range, ranges};
use super::{ExchangeError, ExchangeEvent, Watch};
use crate::image::Image;
use crate::page::{PAGE_SIZE, Run};

const FILE_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Readable, writable and executable.
const ALL_ACCESS: u32 = 7;
const NT_PRSTATUS: u32 = 1;
/// Length in bytes of Linux's `struct elf_prstatus` on x86-64.
const PRSTATUS_BYTES: usize = 336;

/// Writes an image's main memory and firmware as an ELF core.
pub(super) fn write(
    image: &Arc<Image>,
    output: &Output,
    watch: &mut Watch<'_>,
) -> Result<(), ExchangeError> {
    let manifest = image.manifest();
    let ranges = ranges(&manifest.machine, &manifest.blocks)?;
    let (headers, offsets) = headers(&ranges);
    output.put_at(&headers, 0)?;
    let end = ranges.iter().zip(&offsets).map(|(range, offset)| offset + range.len).max();
    output.set_len(end.unwrap_or(headers.len() as u64))?;
    for_each(image, watch, |piece| {
        let Piece::Data(run, bytes) = piece else { return Ok(()) };
        for (range, offset) in ranges.iter().zip(&offsets) {
            let Some(part) = range.overlap(run) else { continue };
            let place = offset + (part.offset() - range.offset);
            output.put_at(slice(bytes, run, part), place)?;
        }
        Ok(())
    })?;
    let is_there = |index: usize| ranges.iter().any(|range| range.block.index() == index);
    let blocks = manifest.blocks.iter().enumerate();
    let left_out: Vec<_> = blocks
        .filter(|(index, _)| !is_there(*index))
        .map(|(_, block)| block.name.as_str())
        .collect();
    if !left_out.is_empty() {
        let what = format!("left out, as their addresses aren't recorded: {}", left_out.join(", "));
        watch.tell(ExchangeEvent::Note { what });
    }
    Ok(())
}

/// The bytes of `part` among those of `run`, which it belongs to.
fn slice(bytes: &[u8], run: Run, part: Run) -> &[u8] {
    let first = (part.first - run.first) as usize * PAGE_SIZE;
    &bytes[first..first + part.count as usize * PAGE_SIZE]
}

/// Everything before memory, and the offset in the file of each range.
fn headers(ranges: &[Range]) -> (Vec<u8>, Vec<u64>) {
    let note = note();
    let count = ranges.len() + 1;
    let note_at = u64::from(FILE_HEADER_BYTES) + u64::from(PROGRAM_HEADER_BYTES) * count as u64;
    let mut next = (note_at + note.len() as u64).next_multiple_of(PAGE_SIZE as u64);
    let mut offsets = Vec::with_capacity(ranges.len());
    for range in ranges {
        offsets.push(next);
        next += range.len;
    }
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    out.resize(16, 0);
    out.extend_from_slice(&ET_CORE.to_le_bytes());
    out.extend_from_slice(&EM_X86_64.to_le_bytes());
    out.extend_from_slice(&1u32.to_le_bytes());
    for word in [0, u64::from(FILE_HEADER_BYTES), 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&0u32.to_le_bytes());
    // At most a few hundred ranges: far from the 65,535 that need another form.
    for half in [FILE_HEADER_BYTES, PROGRAM_HEADER_BYTES, count as u16, 0, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, len: u64, align: u64| {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        // Virtual addresses are given as physical ones, as QEMU's own dumps have them.
        for word in [offset, address, address, len, len, align] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    };
    header(PT_NOTE, 0, note_at, 0, note.len() as u64, 4);
    for (range, offset) in ranges.iter().zip(&offsets) {
        header(PT_LOAD, ALL_ACCESS, *offset, range.address, range.len, PAGE_SIZE as u64);
    }
    out.extend_from_slice(&note);
    (out, offsets)
}

/// One thread's state, with all registers zero: they are part of the image's device
/// state, which only QEMU reads; without any, gdb takes the core for none.
fn note() -> Vec<u8> {
    const NAME: &[u8] = b"CORE\0\0\0\0";
    let mut out = Vec::new();
    for word in [5, PRSTATUS_BYTES as u32, NT_PRSTATUS] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(NAME);
    out.resize(out.len() + PRSTATUS_BYTES, 0);
    out
}
