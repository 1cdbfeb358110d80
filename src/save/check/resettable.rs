//! Whether a guest could be reset inside its QEMU once it has been saved.

use super::error::CheckError;
use crate::guest::FoundDisk;
use crate::host::procfs::{Mapping, ProcessMemory};
use crate::qmp::RamBlock;
use crate::save::error::SaveError;

/// What was found of a guest.
pub(super) struct Found<'a> {
    pub pid: i32,
    pub blocks: &'a [RamBlock],
    pub disks: &'a [FoundDisk],
    /// Whether it is saved by a background snapshot.
    pub background: bool,
    /// Whether its file systems are frozen at the moment.
    pub quiesced: bool,
}

impl Found<'_> {
    /// Looks for what stands in the way.
    pub fn check(&self) -> Result<String, SaveError> {
        match self.obstacle() {
            Some(why) => Err(CheckError::NotResettable(why).into()),
            None => Ok("its writes can be tracked once it has been saved".into()),
        }
    }

    fn obstacle(&self) -> Option<String> {
        if !self.background {
            return Some(
                "it stands still, and this QEMU is left without a userfaultfd by its save".into(),
            );
        }
        if self.quiesced {
            return Some("it would go back to file systems that are frozen".into());
        }
        if let Some(found) = self.disks.iter().find(|found| found.writable()) {
            let disk = found.disk.describe();
            return Some(format!(
                "its disk {disk} is no part of the snapshot, and would not go back"
            ));
        }
        if let Err(error) = ProcessMemory::open(self.pid) {
            return Some(format!(
                "the memory of process {} can't be written from here ({error}): that takes root, \
                 or the same user and the right to trace it (ptrace(2))",
                self.pid
            ));
        }
        if self.blocks.iter().all(|block| block.address.is_some()) {
            return None;
        }
        let mappings = match Mapping::kept_from_children_of(self.pid) {
            Ok(mappings) => mappings,
            Err(error) => return Some(format!("QEMU's mappings can't be read ({error})")),
        };
        let has_no_place = |block: &&RamBlock| {
            let alike = |other: &&RamBlock| {
                (other.total_len, other.page_size) == (block.total_len, block.page_size)
            };
            let is_one = |mapping: &&Mapping| {
                (mapping.size(), mapping.page_size) == (block.total_len, Some(block.page_size))
            };
            self.blocks.iter().filter(alike).count() != mappings.iter().filter(is_one).count()
        };
        let block = self.blocks.iter().find(has_no_place)?;
        Some(format!("it can't be told where QEMU has the memory of block `{}`", block.name))
    }
}
