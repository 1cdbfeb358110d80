//! Sends one page of a block ahead of all others, which proves where the block lies.

use std::sync::Arc;

use super::{Content, Memory, MemoryError, Pager};
use crate::page::{BlockId, Location, PAGE_SIZE, Page, PageBytes, Run};

/// Host pages of a block that are looked at.
const TRIES: u64 = 64;

impl Pager {
    /// Installs one host page of the block that is still absent, preferably one that is not
    /// zero. `before` is called ahead of that with its offset in the block, in bytes, and its
    /// first [`PAGE_SIZE`] bytes. False when no page that was looked at is absent.
    ///
    /// # Errors
    /// When the page can't be had or installed.
    pub fn probe(
        &mut self,
        block: BlockId,
        before: impl FnOnce(u64, &PageBytes),
    ) -> Result<bool, MemoryError> {
        let memory = Arc::clone(&self.memory);
        let Some(run) = claim_one(&memory, block)? else { return Ok(false) };
        self.window.load(&memory, &mut *self.reader, run, |_| true, |_, _| true, || {})?;
        let content = self.window.host_page(run);
        match content {
            Content::Zero => before(run.offset(), &[0; PAGE_SIZE]),
            Content::Bytes(bytes) => {
                before(run.offset(), bytes.first_chunk().unwrap_or(&[0; PAGE_SIZE]));
            }
        }
        memory.install_claimed(run, run, content)?;
        Ok(true)
    }
}

/// Claims a host page of the block, if one can be had.
fn claim_one(memory: &Memory, block: BlockId) -> Result<Option<Run>, MemoryError> {
    let unit = memory.block(block).pages_per_host_page();
    let pages = memory.block(block).pages();
    let units = pages / unit;
    let stride = (units / TRIES).max(1);
    let host_page = |number: u64| Run { block, first: number * unit, count: unit };
    // From the end: the guest asks for the beginning of its memory first.
    let some = || (0..units).rev().step_by(stride as usize).map(host_page);
    let is_data = |run: &Run| {
        let page = Page { block, number: run.first };
        matches!(memory.source.locate(page), Ok(Location::Stored { .. }))
    };
    let in_order = some().filter(is_data).chain(some().filter(|run| !is_data(run)));
    for run in in_order {
        let mut got = None;
        memory.claims.claim(run, |claimed| {
            got = Some(claimed);
            Ok::<(), MemoryError>(())
        })?;
        if got.is_some() {
            return Ok(got);
        }
    }
    Ok(None)
}
