//! Finds what a guest has written before its writes were tracked.

use std::sync::atomic::Ordering;

use super::ResetError;
use super::memory::ZEROS;
use super::shared::Shared;
use crate::image::{Cursor, Piece};
use crate::page::{BlockId, PAGE_SIZE, PageBytes, Run};

/// Pages that are read at once: 256 KiB.
const STEP_PAGES: u64 = 64;

/// Compares all memory with the image, from the first page on, and notes what differs as
/// written. Each page is write-protected before it is looked at: what is seen is either what the
/// guest still has, or noted already.
///
/// # Errors
/// When the image or the guest's memory can't be read.
pub(super) fn compare(shared: &Shared) -> Result<(), ResetError> {
    let mut cursor = Cursor::over_all(&shared.guest.image)?;
    let mut memory = vec![0; STEP_PAGES as usize * PAGE_SIZE];
    while let Some(piece) = cursor.next_piece()? {
        let run = piece.run();
        for first in (run.first..run.end()).step_by(STEP_PAGES as usize) {
            let count = STEP_PAGES.min(run.end() - first);
            let step = Run { first, count, ..run };
            let stored = match &piece {
                Piece::Zeros(_) => None,
                Piece::Data(_, bytes) => {
                    let at = (first - run.first) as usize * PAGE_SIZE;
                    Some(&bytes[at..at + step.bytes() as usize])
                }
            };
            if shared.has_ended() {
                return Ok(());
            }
            compare_step(shared, step, stored, &mut memory)?;
            shared.compared[run.block.index()].store(whole_units(shared, step), Ordering::Release);
        }
    }
    Ok(())
}

/// How many host pages of a block have been compared up to the end of a run.
fn whole_units(shared: &Shared, run: Run) -> u64 {
    let block = shared.guest.block(run.block);
    match run.end() == block.pages() {
        true => block.len.div_ceil(block.page_size),
        false => run.end() * PAGE_SIZE as u64 / block.page_size,
    }
}

fn compare_step(
    shared: &Shared,
    run: Run,
    stored: Option<&[u8]>,
    memory: &mut [u8],
) -> Result<(), ResetError> {
    let guest = &shared.guest;
    let start = guest.address(run.block, run.first);
    let mut present = [false; STEP_PAGES as usize];
    guest.present(start..start + run.bytes(), PAGE_SIZE as u64, |first, count| {
        present[first as usize..(first + count) as usize].fill(true);
    })?;
    read_present(shared, start, &mut present[..run.count as usize], memory)?;
    for (at, number) in (run.first..run.end()).enumerate() {
        // Memory that is missing the kernel would give as zeros.
        let now = if present[at] { page_of(memory, at) } else { &ZEROS };
        let old = stored.map_or(&ZEROS, |stored| page_of(stored, at));
        if now != old || (stored.is_some() && !present[at]) {
            note(shared, run.block, number, old)?;
        }
    }
    Ok(())
}

/// Reads what is in memory, and notes what is not after all: of shared memory the page map says so
/// only where it was never used.
fn read_present(
    shared: &Shared,
    start: u64,
    present: &mut [bool],
    memory: &mut [u8],
) -> Result<(), ResetError> {
    let memory = &mut memory[..present.len() * PAGE_SIZE];
    if present.iter().all(|present| *present) && shared.guest.read(start, memory)? {
        return Ok(());
    }
    let pages = memory.chunks_exact_mut(PAGE_SIZE).zip(present).zip(0..);
    for ((bytes, present), at) in pages.filter(|((_, present), _)| **present) {
        *present = shared.guest.read(start + at * PAGE_SIZE as u64, bytes)?;
    }
    Ok(())
}

/// Notes that a page of 4096 bytes differs from what the image has.
fn note(shared: &Shared, block: BlockId, number: u64, old: &PageBytes) -> Result<(), ResetError> {
    let in_unit = shared.guest.block(block).pages_per_host_page();
    let unit = shared.guest.unit(block, number / in_unit);
    // It is written back with the others, which are not protected any more.
    Ok(shared.note_and_unprotect(unit, false, (in_unit == 1).then_some(old))?)
}

/// A page of several.
fn page_of(bytes: &[u8], at: usize) -> &PageBytes {
    &bytes.as_chunks().0[at]
}
