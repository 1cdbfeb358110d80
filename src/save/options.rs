//! What to save, where to, and how.

use std::path::PathBuf;

use super::address::GuestAddress;
use crate::image::Compression;
use crate::keeper::Successor;
use crate::runs::RunOptions;

/// Which guest to save, where to, and how.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SaveOptions {
    /// The guest.
    pub guest: GuestAddress,
    /// The image to write.
    pub image: PathBuf,
    /// How memory is stored.
    pub compression: Compression,
    /// What becomes of writable disks.
    pub disks: DiskChoice,
    /// The directory of the overlays; none for that of each disk's file.
    pub overlay_dir: Option<PathBuf>,
    /// Writable disks that are not captured, each by the name of its node, drive or device.
    pub exclude_disks: Vec<String>,
    /// Devices that were plugged in and may be left out if a revert can't bring them back,
    /// each by its id; and disks that may be captured although no option defines them, by the
    /// name of their node, drive or device.
    pub allow_missing_devices: Vec<String>,
    /// The qemu-guest-agent that freezes the guest's file systems around the moment.
    pub quiesce: Option<Quiesce>,
    /// Fail instead of waiting when the guest was reverted and its memory is not complete.
    pub no_wait: bool,
    /// Replace an existing image.
    pub force: bool,
    /// The parent image: what the guest's memory has in common with it is not stored again.
    pub parent: Option<PathBuf>,
    /// The most bytes a second that are written to the image. Where QEMU sends more, the
    /// guest may have to wait, which [`SaveEvent::Saved`](super::SaveEvent::Saved) tells.
    pub bandwidth: Option<u64>,
    /// How memory is read.
    pub reading: Reading,
    /// Whether the guest can be brought back from the moment on, while the image is still written
    /// ([`RevertOptions::follow`](crate::RevertOptions::follow)). Memory that is not zero is held once
    /// more, until the save has ended and who follows needs it no more. Disks can't be copied then, and
    /// [`save_resettable`](super::save_resettable) has no use for it.
    pub followable: bool,
    /// Whether no image is written: memory goes to clones alone. The path is that of the journal.
    pub(crate) without_image: bool,
    /// The program that is started to clean up ([`recover`](super::recover())) should this process
    /// be killed ([`Successor::cleaning_up`]). Without, that is left to do, and on QEMU before 8.1
    /// the guest may hang until it is done.
    pub keeper: Option<Successor>,
    /// Whether the guest is to be such that it can be reset inside its QEMU once it has been saved
    /// ([`save_resettable`](super::save_resettable)). Its disks' overlays are made so, and what
    /// stands in the way is told before the guest is touched.
    pub resettable: bool,
    /// How such a guest is recorded, so that [`runs`](crate::runs) finds it; none for not at all.
    pub run: Option<RunOptions>,
}

impl SaveOptions {
    /// Saves a guest, as one behind a QMP socket or a domain of libvirt's, to `image`: with all
    /// its disks, compressed with zstd at level 1, with no limits.
    pub fn new(guest: impl Into<GuestAddress>, image: impl Into<PathBuf>) -> SaveOptions {
        SaveOptions {
            guest: guest.into(),
            image: image.into(),
            compression: Compression::Zstd(1),
            disks: DiskChoice::Overlay,
            overlay_dir: None,
            exclude_disks: Vec::new(),
            allow_missing_devices: Vec::new(),
            quiesce: None,
            no_wait: false,
            force: false,
            parent: None,
            bandwidth: None,
            reading: Reading::Auto,
            followable: false,
            without_image: false,
            keeper: None,
            resettable: false,
            run: None,
        }
    }
}

/// How qemu-guest-agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Quiesce {
    /// By its socket.
    Socket(PathBuf),
    /// Through libvirt, which has the agent's channel of a domain.
    Libvirt,
}

/// What becomes of a guest's writable disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskChoice {
    /// They are frozen and captured; the guest goes on in overlays over them.
    Overlay,
    /// They are captured, and copied beside the image once memory is captured; then the guest goes on in
    /// its own files, into which the overlays are committed. The copies are qcow2 files, compressed if
    /// memory is, and are part of the snapshot.
    Copy,
    /// The same by clones that share the blocks of the disks' files (ioctl_ficlone(2)), beside those:
    /// at once, and without room of their own until the guest writes. Takes a file system such as btrfs
    /// or XFS.
    Reflink,
    /// They are left as they are, and are no part of the snapshot.
    None,
}

/// How a save reads the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reading {
    /// From outside, by reading what QEMU has write-protected, beside QEMU's own stream; by the
    /// stream alone where QEMU may not be traced (ptrace(2)).
    Auto,
    /// By QEMU's stream alone.
    Stream,
}
