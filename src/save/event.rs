//! What a save tells while it goes on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::machine::{Disk, DiskRole};
use crate::reset::ResetWay;

/// Who hears what happens during a save. Not a generic type, of which each caller would add all of
/// a save to the program once more.
pub(crate) type OnEvent<'a> = &'a mut (dyn FnMut(SaveEvent) + Send);

/// What happens during a save, in this order except for `Draining`, `Note` and `Committed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum SaveEvent {
    /// The guest was reverted and its memory is not complete yet: the save waits for it.
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
    /// The image will be whole, but `revert` will refuse it, or others may read its parents. Only
    /// when there is such a reason.
    Warning {
        /// The reason, and what to do instead.
        says: String,
    },
    /// All that can be done before the pause is done: overlays are open in QEMU, guest memory
    /// is prefaulted, disks are flushed. Only when disks are captured.
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
        /// paused before, or where QEMU's events were lost.
        pause_ms: Option<f64>,
        /// The same in parts, if we stopped the guest to switch its disks; none if QEMU
        /// alone stopped it.
        pause_parts: Option<PauseParts>,
        /// The moment by the host's clock, in microseconds since 1970.
        unix_us: u64,
        /// The moment by the host's CLOCK_MONOTONIC (clock_gettime(2)), in
        /// microseconds.
        monotonic_us: u64,
    },
    /// The file systems that were frozen are thawed.
    Thawed,
    /// The save has failed or was interrupted, but this QEMU (before 8.1) lets go of the
    /// guest only once it has sent all memory, which is received and thrown away.
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
    /// A captured disk has been copied: with `DiskChoice::Copy` or `DiskChoice::Reflink`.
    DiskCopied {
        /// The disk.
        disk: String,
        /// The copy, an absolute path.
        file: String,
        /// What it takes on disk, in bytes.
        bytes: u64,
        /// How long copying took, in milliseconds.
        took_ms: f64,
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
        /// Pages that were read from outside, zeros included; those that were taken from the parent
        /// unread (`changed_since`) are not among them, and the others came by QEMU's stream.
        direct_pages: u64,
        /// How it was found out what differs from the parent image; none without one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        changed_since: Option<ChangedSince>,
        /// Size of the image in bytes.
        image_bytes: u64,
        /// How long QEMU had to wait for our disk, in milliseconds.
        stalled_ms: f64,
        /// The disks that were switched to overlays, in the order of the guest's disks. The
        /// guest has to be started from the overlays from now on: see [`SwitchedDisk`].
        disks: Vec<SwitchedDisk>,
    },
    /// The guest can be reset inside its QEMU from now on: behind `Saved`, where that was asked for.
    Resettable {
        /// Host pages that it has written since the moment.
        written: u64,
    },
    /// The guest was taken back to the image, and goes on from there.
    Reset {
        /// How.
        how: ResetWay,
        /// Host pages that were written back.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pages: Option<u64>,
        /// From the request until the guest ran again, in milliseconds.
        took_ms: f64,
    },
    /// Something did not go as it should, but the snapshot is good.
    Note {
        /// What.
        what: String,
        /// Why, and what to do about it.
        why: String,
    },
    /// A disk's overlay was committed back into the disk and removed: the save has failed, or the disk
    /// has been copied.
    #[serde(rename = "folded")]
    Committed {
        /// The disk.
        disk: String,
    },
}

/// How a save has found out what differs from the parent image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum ChangedSince {
    /// The guest's writes since the parent were tracked for a reset.
    WriteProtection {
        /// Pages of 4096 bytes that the guest has not written, zeros included: they were neither read
        /// nor compared.
        pages: u64,
    },
    /// All memory was read and compared.
    Comparing {
        /// Why.
        why: String,
    },
}

/// Where the time of a pause went, each part in milliseconds as seen from outside QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct PauseParts {
    /// From our command to stop until QEMU has stopped the guest and flushed its disks.
    pub stop_ms: f64,
    /// Asking whoever tracks the guest's writes what has changed since the parent, having them let
    /// go, and setting QEMU up, which waits for that.
    #[serde(default)]
    pub changed_ms: f64,
    /// Putting the overlays over the disks.
    pub disks_ms: f64,
    /// QEMU's writing down the state of the devices, where it is wanted at the moment.
    pub devices_ms: f64,
    /// QEMU's walk over guest memory, device state and write protection: from our
    /// command until the first page came.
    pub walk_ms: f64,
    /// Letting the guest go on.
    pub resume_ms: f64,
}

/// A captured disk of a guest that goes on after its save. Its file is frozen: it is part of
/// the snapshot. The guest lives in an overlay over it.
///
/// **From now on the guest has to be started from the overlay.** Started from the frozen file
/// again, it loses everything that it has written since the moment, and its next write
/// destroys the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[non_exhaustive]
pub struct SwitchedDisk {
    /// The disk, as [`Disk::describe`] calls it.
    pub disk: String,
    /// The file that is frozen, an absolute path.
    pub frozen: String,
    /// The overlay, an absolute path. It is a qcow2 file, whatever the frozen file is.
    pub overlay: String,
    /// The overlay in QEMU's option for this disk, in place of the keys that name the frozen
    /// file and its format there: `file=PATH,format=qcow2` for `-drive`,
    /// `driver=qcow2,file.driver=file,file.filename=PATH` for `-blockdev`. Commas in the path
    /// are doubled as QEMU asks for; the text is not quoted for a shell.
    pub option: String,
}

impl SwitchedDisk {
    /// Those of an image's disks whose guest goes on in overlays.
    pub(super) fn all_of(disks: &[Disk]) -> Vec<SwitchedDisk> {
        let switched = |disk: &Disk| {
            let overlay = disk.overlay.clone().filter(|_| disk.role == DiskRole::Captured)?;
            let path = overlay.replace(',', ",,");
            // Only a disk of `-blockdev` has no name as a drive.
            let option = match disk.device.is_empty() {
                true => format!("driver=qcow2,file.driver=file,file.filename={path}"),
                false => format!("file={path},format=qcow2"),
            };
            let frozen = disk.chain.first()?.path.clone();
            Some(SwitchedDisk { disk: disk.describe(), frozen, overlay, option })
        };
        disks.iter().filter_map(switched).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::DiskFile;

    #[test]
    fn switched_disks_are_named_as_qemus_options_want_them() {
        let frozen =
            DiskFile { path: "/d/a.raw".into(), format: "raw".into(), ..Default::default() };
        let drive = Disk {
            device: "drive0".into(),
            role: DiskRole::Captured,
            chain: vec![frozen],
            overlay: Some("/d/a,b.snap-1.qcow2".into()),
            ..Disk::default()
        };
        let blockdev = Disk { device: String::new(), node: Some("node0".into()), ..drive.clone() };
        let left_out = Disk { role: DiskRole::Excluded, overlay: None, ..drive.clone() };
        let switched = SwitchedDisk::all_of(&[left_out, drive, blockdev]);
        let [drive, blockdev] = &switched[..] else { panic!("{switched:?}") };
        assert_eq!((&*drive.disk, &*drive.frozen), ("drive0 (/d/a.raw)", "/d/a.raw"));
        assert_eq!(drive.overlay, "/d/a,b.snap-1.qcow2");
        assert_eq!(drive.option, "file=/d/a,,b.snap-1.qcow2,format=qcow2");
        let expected = "driver=qcow2,file.driver=file,file.filename=/d/a,,b.snap-1.qcow2";
        assert_eq!(blockdev.option, expected);
    }
}
