//! Pages that a source was sending by socket when it died: whether QEMU has them.
//!
//! QEMU can't be asked, and where a block lies whose address is not proven can't be seen. But
//! its page map tells how many of the blocks of one size have a page at some offset. Once QEMU
//! has answered a PING, those that were there before it are sure to be among them; if there are
//! no more, the page in doubt has not arrived, and if there is one more for each page that may
//! have come meanwhile as well, it has. In between the next PING makes more of them sure.

use crate::memory::Memory;
use crate::page::{Block, BlockId, Page, Run};
use crate::revert::error::PostcopyError;
use crate::transport::lookalikes::Lookalikes;

/// How often what is seen may lie in between.
pub(super) const TRIES: usize = 8;

/// A page of a block that keeps to the socket, which a predecessor had claimed.
pub(super) struct Doubt {
    pub page: Run,
    /// The same page of each other block that looks alike.
    others: Vec<Page>,
    /// Those of them that were in place before the last PING.
    sure: Vec<Page>,
}

impl Doubt {
    /// A doubt about `page`. `address` tells the proven addresses of blocks.
    pub fn new(page: Run, memory: &Memory, address: impl Fn(BlockId) -> Option<u64>) -> Doubt {
        let blocks = memory.blocks();
        let shape = |block: &Block| (block.len, block.page_size);
        let looks_alike = |id: &BlockId| {
            *id != page.block
                && address(*id).is_none()
                && shape(&blocks[id.index()]) == shape(&blocks[page.block.index()])
        };
        let ids = (0..blocks.len()).map(|index| BlockId(index as u16)).filter(looks_alike);
        let others = ids.map(|block| Page { block, number: page.first }).collect();
        Doubt { page, others, sure: Vec::new() }
    }

    /// To be called before each PING.
    pub fn before_ping(&mut self, memory: &Memory) {
        self.sure = self.others.iter().copied().filter(|page| memory.is_present(*page)).collect();
    }

    /// Whether the page has arrived, now that QEMU has answered; nothing where that can't be
    /// told yet.
    ///
    /// # Errors
    /// When it never can.
    pub fn has_arrived(
        &self,
        memory: &Memory,
        pid: Option<i32>,
        known: &[u64],
    ) -> Result<Option<bool>, PostcopyError> {
        let block = &memory.blocks()[self.page.block.index()];
        let unseen = |why: String| unsettled(block, why);
        let pid = pid.ok_or_else(|| unseen(": QEMU's process is not known".into()))?;
        let lookalikes = Lookalikes::find(pid, block, known);
        let lookalikes = lookalikes.map_err(|error| unseen(format!(": {error}")))?;
        if lookalikes.count() != self.others.len() + 1 {
            let count = lookalikes.count();
            return Err(unseen(format!(": it may lie in {count} places")));
        }
        let present = lookalikes.present_at(self.page.offset());
        // Asked last: what comes later was not counted above.
        let claimed = self.others.iter().filter(|page| memory.is_claimed(**page)).count();
        Ok(match present {
            present if present == self.sure.len() => Some(false),
            present if present == claimed + 1 => Some(true),
            _ => None,
        })
    }
}

/// That a page of this block remains in doubt.
pub(super) fn unsettled(block: &Block, why: String) -> PostcopyError {
    PostcopyError::Unsettled { block: block.name.clone(), why }
}
