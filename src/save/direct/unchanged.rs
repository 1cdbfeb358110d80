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

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::image::{Details, Image, ImageWriter, Sections, WriterOptions};
    use crate::page::{PAGE_SIZE, Page};

    fn block(name: &str, pages: u64) -> Block {
        Block { name: name.into(), len: pages * PAGE_SIZE as u64, page_size: PAGE_SIZE as u64 }
    }

    #[test]
    fn what_the_parent_has_is_captured_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (parent, child) = (folder.path().join("parent"), folder.path().join("child"));
        let blocks = vec![block("a", 5000), block("b", 3)];
        let mut writer = ImageWriter::create(&parent, WriterOptions::default(), blocks).unwrap();
        for (index, pages) in [5000, 3].into_iter().enumerate() {
            writer.zeros(Run { block: BlockId(index as u16), first: 0, count: pages }).unwrap();
        }
        writer.page(Page { block: BlockId(0), number: 4000 }, &[7; PAGE_SIZE]).unwrap();
        writer.finish(Details::default(), Sections::default()).unwrap();

        // Blocks in another order, one of them longer and one shorter by now, and a new one.
        let blocks = [block("b", 2), block("new", 9), block("a", 6000)];
        let parent = Image::open(&parent).unwrap();
        let options = WriterOptions::default();
        let writer = ImageWriter::create_on(&child, options, blocks.to_vec(), &parent).unwrap();
        let pages = writer.parent_pages().unwrap();
        let unchanged = Unchanged {
            blocks: vec![
                ("a".into(), vec![10..20, 3000..5000]),
                ("b".into(), vec![0..1, 1..3]),
                ("gone".into(), vec![0..50, 60..100]),
            ],
        };
        let inheritance = Inheritance::new(&unchanged, &blocks, pages);
        let merge = Merge::new(Some(writer), None, &blocks, oneshot::channel().0);
        // It came by the stream before.
        merge.stream(Page { block: BlockId(2), number: 3001 }, &[9; PAGE_SIZE]).unwrap();
        inheritance.take(&merge, &Cancellation::new()).unwrap();
        assert_eq!(merge.inherited(), 10 + 1999 + 2);
        assert_eq!(merge.captured(), merge.inherited() + 1);
        let absent = |index, first| Run { block: BlockId(index), first, count: 1 };
        for (run, is_absent) in [
            (absent(2, 9), true),
            (absent(2, 10), false),
            (absent(2, 4000), false),
            (absent(2, 5000), true),
            (absent(0, 1), false),
            (absent(1, 0), true),
        ] {
            assert_eq!(merge.absent_within(run).is_some(), is_absent, "{run}");
        }
        let stopped = Cancellation::new();
        stopped.request();
        assert!(matches!(inheritance.take(&merge, &stopped), Err(Ended::Stopped)));
    }
}
