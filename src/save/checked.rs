//! What the checks found out about a guest.

use std::sync::Arc;

use crate::guest::FoundDisk;
use crate::image::Image;
use crate::libvirt::{DomainDisk, block_name};
use crate::machine::{DiskRole, Machine};
use crate::page::Block;
use crate::qmp::RamBlock;

/// What the checks found out about a guest that can be saved.
pub(super) struct Checked {
    pub machine: Machine,
    /// QEMU's process.
    pub pid: i32,
    pub blocks: Vec<RamBlock>,
    /// The parent image.
    pub parent: Option<Arc<Image>>,
    /// All disks; the role says which are captured.
    pub disks: Vec<FoundDisk>,
    /// The same as libvirt knows them, where the guest is a domain of libvirt's.
    pub domain_disks: Vec<DomainDisk>,
    /// The devices of the record, by their paths in QEMU's object tree.
    pub devices: Vec<String>,
    /// Why `revert` will refuse the image, if it will.
    pub irrevertible: Option<String>,
    /// Whether the guest is saved by a background snapshot. A paused guest on an old QEMU
    /// is not: its memory doesn't change anyway.
    pub background: bool,
    /// Whether a save that fails or is interrupted has to receive all memory none the
    /// less, because this QEMU lets go of the guest only then.
    pub must_drain: bool,
}

impl Checked {
    /// The disks to capture.
    pub fn captured(&self) -> impl Iterator<Item = &FoundDisk> {
        self.disks.iter().filter(|found| found.disk.role == DiskRole::Captured)
    }

    /// libvirt's name of a disk.
    pub fn target(&self, found: &FoundDisk) -> Option<&str> {
        target(&self.domain_disks, found)
    }

    /// The guest's RAM in bytes, all blocks together.
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.used_len).sum()
    }
}

/// A block of QEMU's as an image has it.
pub(super) fn in_image(block: &RamBlock) -> Block {
    Block {
        name: block_name(&block.name).to_owned(),
        len: block.used_len,
        page_size: block.page_size,
    }
}

/// libvirt's name of a disk: its device has the id that libvirt gave it.
pub(super) fn target<'a>(disks: &'a [DomainDisk], found: &FoundDisk) -> Option<&'a str> {
    let is_it = |disk: &&DomainDisk| disk.alias.as_ref().is_some_and(|id| found.is_called(id));
    disks.iter().find(is_it).map(|disk| disk.target.as_str())
}
