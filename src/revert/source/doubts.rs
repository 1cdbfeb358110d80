//! Pages that a source was sending by socket when it died: whether QEMU has them.
//!
//! QEMU can't be asked, and where a block lies whose address is not proven can't be seen. But
//! its page map tells how many of the blocks of one size have a page at some offset. Once QEMU
//! has answered a PING, those that were there before it are sure to be among them; if there are
//! no more, the page in doubt has not arrived, and if there is one more for each page that may
//! have come meanwhile as well, it has. In between the next PING makes more of them sure.

use crate::host::procfs::AddressSpace;
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
        space: &AddressSpace,
        known: &[u64],
    ) -> Result<Option<bool>, PostcopyError> {
        let block = &memory.blocks()[self.page.block.index()];
        let unseen = |why: String| unsettled(block, why);
        let lookalikes = Lookalikes::find(space, block, known);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::host::uffd::Uffd;
    use crate::memory::ClaimMap;
    use crate::page::{ChunkReader, Location, PAGE_SIZE, PageSource, SourceError};
    use crate::transport::{Transport, TransportError};

    /// Pages of a block: a size that no other test in this process has.
    const PAGES: u64 = 37;

    struct Zeros(Vec<Block>);

    impl PageSource for Zeros {
        fn blocks(&self) -> &[Block] {
            &self.0
        }

        fn chunk_pages(&self) -> usize {
            1
        }

        fn locate(&self, _: Page) -> Result<Location, SourceError> {
            Ok(Location::Zero)
        }

        fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
            Err("all pages are zero".into())
        }
    }

    struct Nowhere;

    impl Transport for Nowhere {
        fn copy(&self, _: &Block, _: Run, _: &[u8]) -> Result<(), TransportError> {
            Ok(())
        }

        fn zero(&self, _: &Block, _: Run) -> Result<(), TransportError> {
            Ok(())
        }

        fn step_pages(&self, _: BlockId) -> u64 {
            1
        }
    }

    #[test]
    fn blocks_that_look_alike_are_counted() {
        // This process, as if it were a QEMU with two blocks. What is registered with one
        // userfaultfd is not merged with what is with another.
        let len = PAGES * PAGE_SIZE as u64;
        let map = || (Uffd::create().unwrap(), memmap2::MmapMut::map_anon(len as usize).unwrap());
        let places = [map(), map()];
        for (uffd, map) in &places {
            // SAFETY: a mapping of ours that nobody reads before it is filled.
            unsafe { uffd.register(map.as_ptr() as u64, len) }.unwrap();
        }
        let block = |name: &str| Block { name: name.into(), len, page_size: PAGE_SIZE as u64 };
        let blocks = vec![block("one"), block("other")];
        let claims = ClaimMap::new(&blocks);
        let run = |block| Run { block: BlockId(block), first: 5, count: 1 };
        claims.claim(run(0), |_| Ok::<(), ()>(())).unwrap();
        let memory = Memory::claimed(Arc::new(Zeros(blocks)), Box::new(Nowhere), claims);

        let mut doubt = Doubt::new(run(0), &memory, |_| None);
        let space = AddressSpace::open(std::process::id() as i32).unwrap();
        let arrived = |doubt: &Doubt| doubt.has_arrived(&memory, &space, &[]).unwrap();
        doubt.before_ping(&memory);
        assert_eq!(arrived(&doubt), Some(false));
        let (uffd, map) = &places[0];
        // SAFETY: memory of ours.
        unsafe { uffd.zero(map.as_ptr() as u64 + run(0).offset(), run(0).bytes(), 4096) }.unwrap();
        assert_eq!(arrived(&doubt), Some(true));
        // It may be the other's, which has come since, and is once a PING says so.
        memory.found(run(1));
        assert_eq!(arrived(&doubt), None);
        doubt.before_ping(&memory);
        assert_eq!(arrived(&doubt), Some(false));
        // Where another place is known, one is left.
        let known = [places[1].1.as_ptr() as u64];
        assert!(doubt.has_arrived(&memory, &space, &known).is_err());
    }
}
