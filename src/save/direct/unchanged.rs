//! Pages that the guest has not written since the parent of its new image: taken from there, unread.

use std::ops::Range;

use super::window::Ended;
use crate::cancel::Cancellation;
use crate::image::{Inherited, ParentPages};
use crate::page::{Block, BlockId, Run};
use crate::save::merge::Merge;

/// Pages that are looked up in the parent before they are handed on.
const AT_ONCE: u64 = 1024;

/// Pages that the guest has not written since the parent.
#[derive(Debug, Default)]
pub(in crate::save) struct Unchanged {
    /// Numbers of pages, by the names of their blocks.
    pub blocks: Vec<(String, Vec<Range<u64>>)>,
}

/// The same in a stream's blocks, and what the parent has there.
pub(in crate::save) struct Inheritance {
    runs: Vec<Run>,
    parent: ParentPages,
}

impl Inheritance {
    /// What blocks of these names have not changed since the `parent`.
    pub fn new(unchanged: &Unchanged, blocks: &[Block], parent: ParentPages) -> Inheritance {
        let mut runs = Vec::new();
        for (name, pages) in &unchanged.blocks {
            let Some(index) = blocks.iter().position(|block| block.name == *name) else { continue };
            let end = blocks[index].pages();
            let block = BlockId(index as u16);
            // A block may have become shorter.
            let run = |pages: &Range<u64>| Run {
                block,
                first: pages.start,
                count: pages.end.min(end).saturating_sub(pages.start),
            };
            runs.extend(pages.iter().map(run).filter(|run| run.count > 0));
        }
        Inheritance { runs, parent }
    }

    /// Captures them all. What the parent does not have after all is left to be read.
    pub fn take(&self, merge: &Merge, stop: &Cancellation) -> Result<(), Ended> {
        let mut found: Vec<Inherited> = Vec::with_capacity(AT_ONCE as usize);
        for run in &self.runs {
            let mut first = run.first;
            while first < run.end() {
                if stop.is_requested() {
                    return Err(Ended::Stopped);
                }
                let piece = Run { first, count: AT_ONCE.min(run.end() - first), ..*run };
                found.clear();
                found.extend(piece.pages().map_while(|page| self.parent.get(page)));
                let count = found.len() as u64;
                if count > 0 {
                    merge.inherit(Run { count, ..piece }, &found)?;
                }
                // Behind the page that is not there.
                first += (count + 1).min(piece.count);
            }
        }
        Ok(())
    }
}
