//! An ELF core of the guest's physical memory (elf(5)), as `crash`, `gdb` and
//! `readelf` open it: a PT_LOAD for each range, zeros as holes.

use std::sync::Arc;

use super::output::Output;
use super::pages::for_each;
use super::{ExchangeError, ExchangeEvent, Watch};
use crate::guest::Board;
use crate::guest::physical::{Range, ranges};
use crate::image::{Cursor, Image, Piece};
use crate::machine::Machine;
use crate::page::{PAGE_SIZE, Page, PageSource, Run};

const FILE_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const ET_CORE: u16 = 4;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Readable, writable and executable.
const ALL_ACCESS: u32 = 7;
const NT_PRSTATUS: u32 = 1;

/// What a core says of the processors whose memory it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Processor {
    /// `e_machine` of elf(5).
    machine: u16,
    /// Length in bytes of Linux's `struct elf_prstatus` there.
    prstatus_bytes: usize,
}

/// EM_X86_64.
const X86_64: Processor = Processor { machine: 62, prstatus_bytes: 336 };
/// EM_AARCH64.
const AARCH64: Processor = Processor { machine: 183, prstatus_bytes: 392 };

impl Processor {
    /// The processors of a machine.
    ///
    /// # Errors
    /// When they are none that is known here.
    fn of(machine: &Machine) -> Result<Processor, ExchangeError> {
        let unknown = |problem| ExchangeError::NoProcessor { problem };
        // `virt` takes both kinds, and the emulator for 32 bits has no others. A 32-bit
        // processor in the other (`-cpu cortex-a15`) is not told from one of 64 bits.
        let emulator = machine.binary.rsplit('/').next().unwrap_or_default();
        match Board::of(&machine.machine_type) {
            Some(Board::I440fx | Board::Q35) => Ok(X86_64),
            Some(Board::ArmVirt) if emulator.contains("qemu-system-arm") => {
                Err(unknown("they are of 32-bit ARM"))
            }
            Some(Board::ArmVirt) => Ok(AARCH64),
            None => Err(unknown("the machine type doesn't tell them")),
        }
    }
}

/// How the note begins in which Linux tells `crash` how to read its memory (VMCOREINFO, the
/// kernel's Documentation/admin-guide/kdump/vmcoreinfo.rst): the lengths of its name and of
/// its text, kind 0, the name, and the text's first words. It stands at a page's start.
const VMCOREINFO_NAME: &[u8] = b"VMCOREINFO\0\0";
const VMCOREINFO_TEXT: &[u8] = b"OSRELEASE=";
/// Length in bytes of what comes before the text.
const VMCOREINFO_HEAD_BYTES: usize = 12 + VMCOREINFO_NAME.len();
/// The longest text that Linux writes there, in bytes.
const VMCOREINFO_TEXT_BYTES: usize = PAGE_SIZE;

/// Room for all notes, in bytes.
const NOTES_BYTES: u64 = 2 * PAGE_SIZE as u64;
const _: () = assert!(
    NOTES_BYTES as usize
        >= 20 + AARCH64.prstatus_bytes + VMCOREINFO_HEAD_BYTES + VMCOREINFO_TEXT_BYTES
);

/// Writes an image's main memory and firmware as an ELF core.
pub(super) fn write(
    image: &Arc<Image>,
    output: &Output,
    watch: &mut Watch<'_>,
) -> Result<(), ExchangeError> {
    let manifest = image.manifest();
    let ranges = ranges(&manifest.machine, &manifest.blocks)
        .map_err(|problem| ExchangeError::NoLayout { problem })?;
    let processor = Processor::of(&manifest.machine)?;
    let offsets = offsets(&ranges);
    let mut vmcoreinfo = None;
    for_each(image, watch, |piece| {
        let Piece::Data(run, bytes) = piece else { return Ok(()) };
        for (range, offset) in ranges.iter().zip(&offsets) {
            let Some(part) = range.overlap(run) else { continue };
            let bytes = slice(bytes, run, part);
            output.put_at(bytes, offset + (part.offset() - range.offset))?;
            let mut pages = part.pages().zip(bytes.chunks_exact(PAGE_SIZE));
            vmcoreinfo = vmcoreinfo
                .or_else(|| pages.find_map(|(page, bytes)| Some((page, vmcoreinfo_bytes(bytes)?))));
        }
        Ok(())
    })?;
    let mut notes = no_registers(processor);
    if let Some((page, len)) = vmcoreinfo {
        notes.extend_from_slice(&read_note(image, page, len)?);
    }
    let end = ranges.iter().zip(&offsets).map(|(range, offset)| offset + range.len).max();
    output.set_len(end.unwrap_or(0))?;
    output.put_at(&headers(processor, &ranges, &offsets, &notes), 0)?;
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

/// The offset in the file of each range.
fn offsets(ranges: &[Range]) -> Vec<u64> {
    let first = headers_bytes(ranges) + NOTES_BYTES;
    let next = |next: &mut u64, range: &Range| Some(std::mem::replace(next, *next + range.len));
    ranges.iter().scan(first.next_multiple_of(PAGE_SIZE as u64), next).collect()
}

/// Length in bytes of what comes before the notes.
fn headers_bytes(ranges: &[Range]) -> u64 {
    let count = ranges.len() as u64 + 1;
    u64::from(FILE_HEADER_BYTES) + u64::from(PROGRAM_HEADER_BYTES) * count
}

/// Everything before memory: `crash` looks for notes nowhere else.
fn headers(processor: Processor, ranges: &[Range], offsets: &[u64], notes: &[u8]) -> Vec<u8> {
    let count = ranges.len() + 1;
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    out.resize(16, 0);
    out.extend_from_slice(&ET_CORE.to_le_bytes());
    out.extend_from_slice(&processor.machine.to_le_bytes());
    out.extend_from_slice(&1u32.to_le_bytes());
    for word in [0, u64::from(FILE_HEADER_BYTES), 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&0u32.to_le_bytes());
    // At most a few hundred ranges: far from the 65,535 that need another form.
    for half in [FILE_HEADER_BYTES, PROGRAM_HEADER_BYTES, count as u16, 0, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    let mut header = |kind: u32, flags: u32, offset: u64, address: u64, len: u64| {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&flags.to_le_bytes());
        // Virtual addresses are given as physical ones, as QEMU's own dumps have them.
        // No alignment, as there: `crash` takes a core with one for another format.
        for word in [offset, address, address, len, len, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    };
    header(PT_NOTE, 0, headers_bytes(ranges), 0, notes.len() as u64);
    for (range, offset) in ranges.iter().zip(offsets) {
        header(PT_LOAD, ALL_ACCESS, *offset, range.address, range.len);
    }
    out.extend_from_slice(notes);
    out
}

/// One thread's state, with all registers zero: they are part of the image's device
/// state, which only QEMU reads; without any, gdb takes the core for none.
fn no_registers(processor: Processor) -> Vec<u8> {
    const NAME: &[u8] = b"CORE\0\0\0\0";
    let mut out = Vec::new();
    for word in [5, processor.prstatus_bytes as u32, NT_PRSTATUS] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(NAME);
    out.resize(out.len() + processor.prstatus_bytes, 0);
    out
}

/// Length in bytes of the VMCOREINFO note that a page begins with, if it does.
fn vmcoreinfo_bytes(page: &[u8]) -> Option<usize> {
    let word = |at: usize| page[at..at + 4].try_into().ok().map(u32::from_le_bytes);
    let (name, text, kind) = (word(0)?, word(4)? as usize, word(8)?);
    let begins = [VMCOREINFO_NAME, VMCOREINFO_TEXT].concat();
    let is_one = name == 11 && kind == 0 && page[12..].starts_with(&begins);
    (is_one && text <= VMCOREINFO_TEXT_BYTES)
        .then(|| VMCOREINFO_HEAD_BYTES + text.next_multiple_of(4))
}

/// So many bytes from the start of a page on; they may reach into the next one.
fn read_note(image: &Arc<Image>, page: Page, len: usize) -> Result<Vec<u8>, ExchangeError> {
    let left = image.blocks()[page.block.index()].pages() - page.number;
    let count = left.min(len.div_ceil(PAGE_SIZE) as u64);
    let mut pages = Cursor::over(image, Run { count, ..Run::single(page) })?;
    let mut bytes = Vec::new();
    while let Some(piece) = pages.next_piece()? {
        match piece {
            Piece::Zeros(run) => bytes.resize(bytes.len() + run.bytes() as usize, 0),
            Piece::Data(_, part) => bytes.extend_from_slice(part),
        }
    }
    bytes.resize(len, 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::BlockId;

    #[test]
    fn a_note_is_told_from_what_looks_like_one() {
        let mut page = vec![0; PAGE_SIZE];
        assert_eq!(vmcoreinfo_bytes(&page), None);
        page[0] = 11;
        page[4..8].copy_from_slice(&4001u32.to_le_bytes());
        page[12..24].copy_from_slice(VMCOREINFO_NAME);
        assert_eq!(vmcoreinfo_bytes(&page), None);
        page[24..34].copy_from_slice(VMCOREINFO_TEXT);
        assert_eq!(vmcoreinfo_bytes(&page), Some(24 + 4004));
        page[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(vmcoreinfo_bytes(&page), None);
    }

    #[test]
    fn processors_follow_from_the_machine() {
        let processor = |machine_type: &str, binary: &str| {
            let (machine_type, binary) = (machine_type.into(), binary.into());
            let machine = Machine { machine_type, binary, ..Machine::default() };
            Processor::of(&machine).map_err(|e| e.to_string())
        };
        assert_eq!(processor("pc-q35-10.0", "/usr/bin/kvm"), Ok(X86_64));
        assert_eq!(processor("virt-7.2", "/usr/bin/qemu-system-aarch64"), Ok(AARCH64));
        let error = processor("virt-7.2", "/usr/bin/qemu-system-arm").unwrap_err();
        assert!(error.contains("32-bit ARM"), "{error}");
        assert!(processor("pseries-7.2", "/usr/bin/qemu-system-ppc64").is_err());
        assert_eq!(no_registers(AARCH64).len(), 20 + 392);
    }

    #[test]
    fn memory_lies_behind_headers_and_notes() {
        let range = |address, len| Range { block: BlockId(0), offset: 0, address, len };
        let ranges = [range(0, 1 << 20), range(1 << 32, 8192)];
        let offsets = offsets(&ranges);
        assert_eq!(offsets, [3 * 4096, 3 * 4096 + (1 << 20)]);
        let headers = headers(X86_64, &ranges, &offsets, b"notes");
        assert_eq!(headers.len() as u64, headers_bytes(&ranges) + 5);
    }
}
