//! Memory that a guest has given back to the host, by a balloon.

use std::ops::Range;

use super::ResetError;
use super::shared::Shared;
use crate::page::{BlockId, Page, PageSource};

/// Notes memory that is missing although the image has something for it. Returns how many host
/// pages that are.
pub(super) fn find_given_back(shared: &Shared) -> Result<u64, ResetError> {
    let guest = &shared.guest;
    let mut found = 0;
    for (index, block) in guest.blocks().iter().enumerate().filter(|(_, block)| block.len > 0) {
        let id = BlockId(index as u16);
        let start = guest.address(id, 0);
        let mut present = Vec::new();
        guest.present(start..start + block.len, block.page_size, |first, count| {
            present.push(first..first + count);
        })?;
        let mut at = 0;
        for run in present {
            found += note_missing(shared, id, at..run.start);
            at = run.end;
        }
        found += note_missing(shared, id, at..block.pages());
    }
    Ok(found)
}

/// Notes those of these pages, which are missing, that are not zeros in the image.
fn note_missing(shared: &Shared, block: BlockId, pages: Range<u64>) -> u64 {
    let in_unit = shared.guest.block(block).pages_per_host_page();
    let mut noted = 0;
    for number in pages {
        let unit = shared.guest.unit(block, number / in_unit);
        if !shared.guest.image.is_zero(Page { block, number })
            && !shared.log().has(block, unit.number)
        {
            shared.note(unit, false, None);
            noted += 1;
        }
    }
    noted
}
