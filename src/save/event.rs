//! What a save tells while it goes on.

use serde::Serialize;

use super::moment::PauseParts;

/// What happens during a save, in this order but for `Draining`, `Waiting`, `Folded` and
/// `Note`. `Warning` comes only when there is something to warn of.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum SaveEvent {
    /// The guest was reverted, and its memory is not complete yet: it is waited for.
    Waiting,
    /// The snapshot can be taken; the guest has not been touched.
    Checked {
        /// QEMU's version.
        qemu: String,
        /// The guest's RAM in bytes, all blocks together.
        ram_bytes: u64,
        /// Disks that will be captured.
        captured_disks: Vec<String>,
        /// Writable disks that are left out.
        uncaptured_disks: Vec<String>,
    },
    /// The image will be whole, but `revert` will refuse it.
    Warning {
        /// Why, and what to do instead.
        says: String,
    },
    /// All is ready that can be before the pause: overlays lie open, guest memory has
    /// been touched, disks are flushed. Only when disks are captured.
    Ready {
        /// The overlays that the guest will write to, in the order of its disks.
        overlays: Vec<String>,
    },
    /// The guest's file systems are frozen by its agent.
    Frozen {
        /// How many of them.
        filesystems: u64,
    },
    /// The snapshot's moment has passed: nothing that the guest does from now on is in
    /// it, although its memory is still being written.
    Moment {
        /// How long the guest stood still, in milliseconds; none for a guest that was
        /// paused all the time, or where QEMU's events were lost.
        pause_ms: Option<f64>,
        /// The same in parts, where we held the guest to switch its disks; otherwise
        /// QEMU alone did.
        pause_parts: Option<PauseParts>,
        /// The moment by the host's clock, in microseconds since 1970.
        unix_us: u64,
        /// The moment by the host's CLOCK_MONOTONIC (clock_gettime(2)), in
        /// microseconds.
        monotonic_us: u64,
    },
    /// The file systems that were frozen are thawed.
    Thawed,
    /// The save has failed or was interrupted, but QEMU lets go of the guest only once
    /// it has sent all memory: that is received and thrown away. QEMU before 8.1.
    Draining,
    /// How far memory has been written.
    Progress {
        /// Pages of 4096 bytes received.
        pages: u64,
        /// Pages of the machine.
        total: u64,
        /// Bytes written to the image.
        image_bytes: u64,
    },
    /// The image is whole, on disk, under its name.
    Saved {
        /// Bytes of guest memory that are not zero.
        bytes: u64,
        /// Pages of 4096 bytes that are stored.
        pages: u64,
        /// Pages that are all zeros.
        zero_pages: u64,
        /// Those of the pages stored that are the same as others, stored once.
        repeated_pages: u64,
        /// Those of the pages stored that lie in the parent image, or in one that it
        /// refers to.
        parent_pages: u64,
        /// Size of the image in bytes.
        image_bytes: u64,
        /// How long QEMU had to wait for our disk, in milliseconds.
        stalled_ms: f64,
    },
    /// Something did not go as it should, and the snapshot is good none the less.
    Note {
        /// What.
        what: String,
        /// Why, and what to do about it.
        why: String,
    },
    /// The save has failed: a disk's overlay was folded back into the disk and removed.
    Folded {
        /// The disk.
        disk: String,
    },
}
