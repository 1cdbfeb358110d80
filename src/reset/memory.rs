//! A guest's memory in QEMU's process, beside the image that it goes back to.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::ResetError;
use super::requests::Tracked;
use crate::host::procfs::{AddressSpace, ProcessMemory};
use crate::image::Image;
use crate::page::{Block, BlockId, PAGE_SIZE, PageBytes};

/// What the kernel gives where memory is missing.
pub(super) static ZEROS: PageBytes = [0; PAGE_SIZE];

/// A guest's memory in QEMU's process, beside the image that it goes back to.
pub(crate) struct GuestMemory {
    pub(super) image: Arc<Image>,
    /// The address of each block, in the order of the image; 0 for one without any memory.
    addresses: Vec<u64>,
    /// The blocks by address: first address, address behind the last, block.
    ranges: Vec<(u64, u64, BlockId)>,
    space: Arc<AddressSpace>,
    memory: ProcessMemory,
}

/// Tells memory that is missing, or write-protected, from what can't be had. The kernel doesn't wait
/// for whoever serves a userfaultfd in an access by /proc/PID/mem (`access_remote_vm`, which
/// does without FAULT_FLAG_ALLOW_RETRY), but says EIO.
fn present(what: &'static str, address: u64, done: io::Result<()>) -> Result<bool, ResetError> {
    match done {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
        Err(source) => Err(ResetError::Memory { what, address, source }),
    }
}

/// A host page of a guest's memory: what can be write-protected on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unit {
    pub block: BlockId,
    /// Its number in the block.
    pub number: u64,
    pub address: u64,
    /// Its size in bytes.
    pub len: u64,
}

impl GuestMemory {
    /// The memory of the guest of an image, whose blocks lie at these addresses of QEMU's.
    ///
    /// # Safety
    /// Each address must be that block's, and stay so for as long as QEMU lives: going back
    /// writes there.
    ///
    /// # Errors
    /// [`ResetError::Obstacle`] where a block's address is not known.
    pub unsafe fn new(
        image: Arc<Image>,
        addresses: &[Option<u64>],
        space: Arc<AddressSpace>,
        memory: ProcessMemory,
    ) -> Result<GuestMemory, ResetError> {
        let blocks = &image.manifest().blocks;
        let address = |(index, block): (usize, &Block)| match addresses.get(index) {
            _ if block.len == 0 => Ok(0),
            Some(Some(address)) => Ok(*address),
            _ => Err(ResetError::Obstacle(format!(
                "it was not found where QEMU has the memory of block `{}`, which came by the socket",
                block.name
            ))),
        };
        let addresses: Vec<u64> =
            blocks.iter().enumerate().map(address).collect::<Result<_, _>>()?;
        let range = |(index, block): (usize, &Block)| {
            let start = addresses[index];
            (start, start + block.len, BlockId(index as u16))
        };
        let mut ranges: Vec<_> = blocks.iter().enumerate().map(range).collect();
        ranges.retain(|(start, end, _)| start < end);
        ranges.sort_unstable();
        Ok(GuestMemory { image, addresses, ranges, space, memory })
    }

    /// Which image it goes back to, and where its blocks lie that have any memory.
    pub(super) fn tracked(&self) -> Tracked {
        let blocks = self.blocks().iter().zip(&self.addresses).filter(|(block, _)| block.len > 0);
        Tracked {
            image: self.image.identity(),
            blocks: blocks.map(|(block, address)| (block.name.clone(), *address)).collect(),
        }
    }

    /// All its blocks.
    pub(super) fn blocks(&self) -> &[Block] {
        &self.image.manifest().blocks
    }

    pub(super) fn block(&self, block: BlockId) -> &Block {
        &self.blocks()[block.index()]
    }

    /// Where its blocks lie, in the order of their addresses.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.ranges.iter().map(|(start, end, _)| *start..*end)
    }

    /// The host page at an address; none where the address is not the guest's.
    pub(super) fn find(&self, address: u64) -> Option<Unit> {
        let behind = self.ranges.partition_point(|(start, ..)| *start <= address);
        let (start, end, block) = *self.ranges.get(behind.checked_sub(1)?)?;
        let number = (address - start) / self.block(block).page_size;
        (address < end).then(|| self.unit(block, number))
    }

    /// The host page of this number.
    pub(super) fn unit(&self, block: BlockId, number: u64) -> Unit {
        let len = self.block(block).page_size;
        Unit { block, number, address: self.addresses[block.index()] + number * len, len }
    }

    /// Where a page of 4096 bytes lies.
    pub(super) fn address(&self, block: BlockId, page: u64) -> u64 {
        self.addresses[block.index()] + page * PAGE_SIZE as u64
    }

    /// Whether a host page is in memory, be it swapped out.
    pub(super) fn is_present(&self, unit: Unit) -> bool {
        self.space.pagemap().is_present(unit.address)
    }

    /// How many host pages from this one on are in memory, one behind the other, of `count`.
    pub(super) fn present_from(&self, first: Unit, count: u64) -> u64 {
        self.space.pagemap().present_from(first.address, count)
    }

    /// Calls `found` with each run of pages that are in memory: the number of its first, counted
    /// from the start of the range, and how many they are.
    pub(super) fn present(
        &self,
        range: Range<u64>,
        page_size: u64,
        found: impl FnMut(u64, u64),
    ) -> Result<(), ResetError> {
        let address = range.start;
        let failed = |source| ResetError::Memory { what: "looked at", address, source };
        self.space.pagemap().present(range, page_size, found).map_err(failed)
    }

    /// Reads memory of the guest; false where some of it is missing.
    pub(super) fn read(&self, address: u64, bytes: &mut [u8]) -> Result<bool, ResetError> {
        present("read", address, self.memory.read(address, bytes))
    }

    /// Writes to a run of the guest's pages; false where one is missing or write-protected. Those
    /// before it may be written then.
    pub(super) fn write(&self, unit: Unit, bytes: &[u8]) -> Result<bool, ResetError> {
        // SAFETY: the address is within a block of the guest, as `new` was promised, and callers
        // write no further than the block goes: what stands there is the guest's alone.
        present("written", unit.address, unsafe { self.memory.write(unit.address, bytes) })
    }

    /// Whether QEMU has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.space.has_ended()
    }
}
