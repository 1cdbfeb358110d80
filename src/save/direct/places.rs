//! Where QEMU has a guest's memory in its own.

use std::collections::HashMap;

use crate::guest::physical;
use crate::host::memory;
use crate::machine::Machine;
use crate::page::{Block, BlockId, PAGE_SIZE};
use crate::qmp::{Qmp, RamBlock};
use crate::save::checked::in_image;

/// Where a QEMU has the guest's memory, as far as it can be read from outside.
#[derive(Debug, Clone)]
pub struct Places {
    pid: i32,
    /// By the names of blocks in QEMU's stream.
    by_name: HashMap<String, Place>,
    /// In the order of the stream's blocks.
    in_order: Vec<Option<Place>>,
}

/// Where a QEMU has a block.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The address of its first byte.
    pub start: u64,
    /// Whether the guest can't write to it: then QEMU does not protect it.
    pub read_only: bool,
}

impl Places {
    /// Asks QEMU for the places. Versions that don't list them tell those of main memory.
    ///
    /// # Errors
    /// Says why memory can't be read from outside.
    pub async fn find(
        qmp: &Qmp,
        pid: i32,
        machine: &Machine,
        blocks: &[RamBlock],
    ) -> Result<Places, String> {
        let ours = |block: &&RamBlock| block.page_size == PAGE_SIZE as u64;
        let told = |block: &RamBlock| {
            let place = Place { start: block.address?, read_only: block.read_only };
            Some((block.name.clone(), place))
        };
        let mut by_name: HashMap<String, Place> =
            blocks.iter().filter(ours).filter_map(told).collect();
        if by_name.is_empty() {
            by_name = main_memory(qmp, machine, blocks).await?;
        }
        let Some(any) = by_name.values().next() else {
            return Err("none of its memory is in pages of 4 KiB".into());
        };
        match memory::read(pid, any.start, &mut [0]) {
            Ok(()) => Ok(Places { pid, by_name, in_order: Vec::new() }),
            Err(error) => Err(format!(
                "the memory of process {pid} can't be read from outside ({error}): that takes \
                 root, or the same user and the right to trace it (ptrace(2))"
            )),
        }
    }

    /// The same for blocks as the stream lists them.
    pub fn in_order(mut self, names: impl Iterator<Item = impl AsRef<str>>) -> Places {
        self.in_order = names.map(|name| self.by_name.get(name.as_ref()).copied()).collect();
        self
    }

    /// QEMU's process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Where a block lies.
    pub fn of(&self, block: BlockId) -> Option<Place> {
        self.in_order.get(block.index()).copied().flatten()
    }
}

/// The places of main memory, by its guest-physical addresses.
async fn main_memory(
    qmp: &Qmp,
    machine: &Machine,
    blocks: &[RamBlock],
) -> Result<HashMap<String, Place>, String> {
    let said = |error: crate::qmp::QmpError| error.to_string();
    let machine_type = qmp.machine_type().await.map_err(said)?;
    let machine = Machine { machine_type, ..machine.clone() };
    let shaped: Vec<Block> = blocks.iter().map(in_image).collect();
    let mut found = HashMap::new();
    for range in physical::ranges(&machine, &shaped)? {
        let block = &blocks[range.block.index()];
        if found.contains_key(&block.name) || block.page_size != PAGE_SIZE as u64 {
            continue;
        }
        if let Some((region, address)) = qmp.host_address(range.address).await.map_err(said)?
            && region == block.name
        {
            let start = address - range.offset;
            found.insert(block.name.clone(), Place { start, read_only: false });
        }
    }
    Ok(found)
}
