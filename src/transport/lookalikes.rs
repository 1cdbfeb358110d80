//! What can be seen of blocks whose addresses are not known: how many of those of one size have
//! a page.

use super::proof::AttachError;
use crate::host::procfs::{Mapping, Pagemap};
use crate::page::Block;

/// The places in a process's memory of all blocks of one size whose addresses are not known. Which
/// of them is whose cannot be seen, but their number can.
pub struct Lookalikes {
    pagemap: Pagemap,
    /// Their first addresses.
    starts: Vec<u64>,
}

impl Lookalikes {
    /// Finds the mappings of process `pid` that are registered with userfaultfd and as large as
    /// `block`, but for those at the addresses `known`. QEMU registers each block by itself, and
    /// the kernel splits and merges mappings by what they are registered with.
    ///
    /// # Errors
    /// When the process may not be looked into.
    pub fn find(pid: i32, block: &Block, known: &[u64]) -> Result<Lookalikes, AttachError> {
        let failed = |what| AttachError::at(pid, what);
        let mut mappings = Mapping::registered_of(pid).map_err(failed("the list of mappings"))?;
        mappings.retain(|mapping| {
            mapping.size() == block.len
                && mapping.page_size == Some(block.page_size)
                && !known.contains(&mapping.start)
        });
        let pagemap = Pagemap::open(pid).map_err(failed("the page map"))?;
        let starts = mappings.iter().map(|mapping| mapping.start).collect();
        Ok(Lookalikes { pagemap, starts })
    }

    /// How many blocks they are.
    pub fn count(&self) -> usize {
        self.starts.len()
    }

    /// How many of them have the page at this offset.
    pub fn present_at(&self, offset: u64) -> usize {
        self.starts.iter().filter(|start| self.pagemap.is_present(**start + offset)).count()
    }
}
