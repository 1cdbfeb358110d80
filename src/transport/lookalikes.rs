//! What can be seen of blocks whose addresses are not known: how many of those of one size have
//! a page.

use std::io;

use crate::host::procfs::AddressSpace;
use crate::page::Block;

/// The places in a process's memory of all blocks of one size whose addresses are not known. Which
/// of them is whose cannot be seen, but their number can.
pub struct Lookalikes<'a> {
    space: &'a AddressSpace,
    /// Their first addresses.
    starts: Vec<u64>,
}

impl<'a> Lookalikes<'a> {
    /// Finds the mappings of a process that are registered with userfaultfd and as large as
    /// `block`, but for those at the addresses `known`. QEMU registers each block by itself, and
    /// the kernel splits and merges mappings by what they are registered with.
    ///
    /// # Errors
    /// When its mappings can't be read.
    pub fn find(
        space: &'a AddressSpace,
        block: &Block,
        known: &[u64],
    ) -> io::Result<Lookalikes<'a>> {
        let mut mappings = space.registered()?;
        mappings.retain(|mapping| {
            mapping.size() == block.len
                && mapping.page_size == Some(block.page_size)
                && !known.contains(&mapping.start)
        });
        let starts = mappings.iter().map(|mapping| mapping.start).collect();
        Ok(Lookalikes { space, starts })
    }

    /// How many blocks they are.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// How many of them have the page at this offset.
    pub fn present_at(&self, offset: u64) -> usize {
        let pagemap = self.space.pagemap();
        self.starts.iter().filter(|start| pagemap.is_present(**start + offset)).count()
    }
}
