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
    /// When the page can't be installed, or can't be had and nobody listens.
    pub fn probe(
        &mut self,
        block: BlockId,
        mut before: impl FnMut(u64, &PageBytes),
    ) -> Result<bool, MemoryError> {
        let memory = Arc::clone(&self.memory);
        for run in candidates(&memory, block) {
            // Read before it is claimed: who asks for it meanwhile relies on a claim.
            let loaded =
                self.window.load(&memory, &mut *self.reader, run, |_| true, |_, _| true, || {});
            if memory.listener.is_none() {
                loaded?;
            } else if !memory.pass_over(loaded)? {
                continue;
            }
            let content = self.window.host_page(run);
            let mut sent = false;
            memory.claims.claim(run, |claimed| {
                match content {
                    Content::Zero => before(claimed.offset(), &[0; PAGE_SIZE]),
                    Content::Bytes(bytes) => {
                        before(claimed.offset(), bytes.first_chunk().unwrap_or(&[0; PAGE_SIZE]));
                    }
                }
                sent = true;
                memory.install_claimed(run, claimed, content)
            })?;
            if sent {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Some host pages of the block that are absent, in the order in which they are worth trying.
fn candidates(memory: &Memory, block: BlockId) -> impl Iterator<Item = Run> {
    let unit = memory.block(block).pages_per_host_page();
    let pages = memory.block(block).pages();
    let units = pages / unit;
    let stride = (units / TRIES).max(1);
    let host_page = move |number: u64| Run { block, first: number * unit, count: unit };
    // From the end: the guest asks for the beginning of its memory first.
    let some = move || (0..units).rev().step_by(stride as usize).map(host_page);
    let is_data = move |run: &Run| {
        let page = Page { block, number: run.first };
        matches!(memory.source.locate(page), Ok(Location::Stored { .. }))
    };
    let is_absent = move |run: &Run| !memory.claims.is_claimed(block, run.first);
    some().filter(is_data).chain(some().filter(move |run| !is_data(run))).filter(is_absent)
}
