//! The record of a virtual machine: what is needed to start it again.
//!
//! Plain data, stored in an image. [`guest`](crate::guest) records a running QEMU, and
//! starts one from a record.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A virtual machine at the moment of its snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Absolute path of the QEMU binary.
    pub binary: String,
    /// QEMU's version as QMP `query-version` tells it.
    pub qemu: QemuVersion,
    /// Versioned machine type, as the stream's configuration section names it
    /// (for example `pc-i440fx-7.2`).
    pub machine_type: String,
    /// The command line that starts the machine as it was at the moment, `argv[0]`
    /// included: QEMU's own, changed by what [`hotplug`](Machine::hotplug) lists.
    pub argv: Vec<String>,
    /// QEMU's working directory: relative paths in `argv` start here.
    pub cwd: String,
    /// The environment variables that change how QEMU finds its parts
    /// (`QEMU_*`, `LD_LIBRARY_PATH`); nothing else of the environment is kept,
    /// because it may hold secrets.
    pub env: Vec<(String, String)>,
    /// Whether the guest ran (as opposed to being paused) when it was saved.
    pub running: bool,
    /// Writable disks that were attached and are not part of the image, as
    /// [`Disk::describe`] names them. In images with [`disks`](Machine::disks): those whose role is
    /// [`Excluded`](DiskRole::Excluded).
    pub uncaptured_disks: Vec<String>,
    /// All disks and drives, in the order of QEMU's `query-block`. Empty as well in
    /// images made before disks were recorded.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// The machine as libvirt describes it (domain XML, at most 16 MiB), where the
    /// image was made of a guest that libvirt saved, or of a domain of libvirt's: as it ran,
    /// and as libvirt would migrate it (VIR_DOMAIN_XML_MIGRATABLE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub libvirt_xml: Option<String>,
    /// The domain's persistent definition at that time (VIR_DOMAIN_XML_INACTIVE), where the
    /// image was made of a domain that had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub libvirt_inactive_xml: Option<String>,
    /// What was plugged in and out while the guest ran.
    #[serde(default, skip_serializing_if = "Hotplug::is_empty")]
    pub hotplug: Hotplug,
}

/// Devices that were plugged in and out since QEMU started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Hotplug {
    /// Devices that were plugged in, each behind the one that it is plugged into. Their
    /// options are at the end of [`Machine::argv`].
    pub added: Vec<PluggedDevice>,
    /// The options there of what stands behind these devices, as `-netdev user,id=n0`, and of
    /// user networks that were added.
    pub backends: Vec<String>,
    /// Options that were left out of [`Machine::argv`], as `-device e1000,id=n0`: what they
    /// gave is not in the machine any more.
    pub removed: Vec<String>,
    /// Devices that were plugged in and are not in [`Machine::argv`], by the wish of whoever
    /// made the snapshot: QEMU doesn't tell enough of them. QEMU refuses to load the state of
    /// the machine unless it is given them.
    pub missing: Vec<PluggedDevice>,
}

impl Hotplug {
    /// Whether the machine is the one that QEMU was started with.
    pub fn is_empty(&self) -> bool {
        let Hotplug { added, backends, removed, missing } = self;
        added.is_empty() && backends.is_empty() && removed.is_empty() && missing.is_empty()
    }
}

/// A device that was plugged in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PluggedDevice {
    /// Its id; of a device without one its name in QEMU's object tree, such as `device[2]`.
    pub id: String,
    /// Its type, such as `virtio-net-pci`.
    pub driver: String,
    /// The properties that it was given or that QEMU chose for it, as `device_add` takes
    /// them. Empty for a missing one.
    pub properties: serde_json::Map<String, serde_json::Value>,
}

impl PluggedDevice {
    /// The device as people know it.
    pub fn describe(&self) -> String {
        format!("{} ({})", self.id, self.driver)
    }
}

/// A disk or drive at the moment of the snapshot.
///
/// To find its option in [`Machine::argv`]: [`node`](Disk::node) is the `node-name` of a
/// `-blockdev` (or of a `-drive` that has one); without, [`device`](Disk::device) is
/// the name of a `-drive`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Disk {
    /// QEMU's name of the block backend (`device` of `query-block`): the `id` of a
    /// `-drive`, or the one that QEMU made up for it, such as `virtio0` or `ide1-cd0`.
    /// Empty for a disk of `-blockdev`.
    pub device: String,
    /// The guest device's id or QOM path (`qdev` of `query-block`), if one uses it.
    pub qdev: Option<String>,
    /// The name of the uppermost node of this disk that the command line names. Above
    /// it there may be overlays that were put there since QEMU started, by earlier
    /// snapshots for example: they are part of [`chain`](Disk::chain).
    pub node: Option<String>,
    /// Whether the medium can be removed, as of a CD drive.
    pub removable: bool,
    /// Its role in the snapshot.
    pub role: DiskRole,
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// Its files, the one on top first, each on top of the next. Of a captured disk
    /// this is what the guest saw at the moment, and must not be written any more.
    /// Empty when there is no medium, or when it does not consist of files that we
    /// know (never for a captured disk).
    pub chain: Vec<DiskFile>,
    /// Of a captured disk: the overlay that the guest it was taken from writes to
    /// since, an absolute path. Not part of the snapshot.
    pub overlay: Option<String>,
    /// Of a captured disk whose file on top was made by the save, as a copy that belongs to the image
    /// and goes where it goes: the files that the disk was on, the one on top first. The command line
    /// may name it by these.
    pub originals: Vec<String>,
}

/// The role of a disk in a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskRole {
    /// Frozen at the moment and part of the snapshot.
    Captured,
    /// The guest can't write to it: recorded, untouched, used as it is.
    ReadOnly,
    /// Writable, and left out of the snapshot by its options: its content is whatever it
    /// is at the time of a revert.
    #[default]
    Excluded,
    /// A drive without a medium.
    Empty,
}

/// A file of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskFile {
    /// QEMU's name of the format node over it; starts with `#` when QEMU made it up.
    pub node: String,
    /// Absolute path of the file or block device.
    pub path: String,
    /// Its format: `raw` or `qcow2` in a captured disk, any in others.
    pub format: String,
    /// How to recognise it: there for captured and read-only disks, unless such a file
    /// of a read-only one could not be read.
    pub stamp: Option<FileStamp>,
}

/// What an unchanged file is recognised by; `guest/disks/stamp.rs` and docs/format.md
/// tell how it is computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileStamp {
    /// Length in bytes.
    pub len: u64,
    /// When it was last written to, in nanoseconds since 1970 (`st_mtim`, stat(2)); 0
    /// of a block device. A copy has another one.
    pub mtime_ns: i64,
    /// A checksum over its length and samples of its content: the same for a copy,
    /// very likely another for a file of other content. No proof.
    pub fingerprint: u64,
}

impl Machine {
    /// Looks for copies of disks that are not where they were made: they belong beside their image,
    /// which may have been moved to `directory` with them.
    pub(crate) fn locate_copies(&mut self, directory: &Path) {
        for disk in self.disks.iter_mut().filter(|disk| disk.is_copied()) {
            let Some(top) = disk.chain.first_mut() else { continue };
            let Some(name) = Path::new(&top.path).file_name() else { continue };
            let beside = directory.join(name);
            if !Path::new(&top.path).exists()
                && beside.exists()
                && let Some(path) = beside.to_str()
            {
                top.path = path.to_owned();
            }
        }
    }
}

impl Disk {
    /// The disk as a user knows it: its name on the command line, or else QEMU's name, and
    /// its file.
    pub fn describe(&self) -> String {
        let names = [Some(&self.device), self.node.as_ref(), self.qdev.as_ref()];
        let name = names.into_iter().flatten().find(|name| !name.is_empty());
        let file = self.chain.first().map(|file| format!(" ({})", file.path));
        format!("{}{}", name.map_or("unnamed", String::as_str), file.unwrap_or_default())
    }

    /// Whether the file on top is a copy that belongs to the image.
    pub fn is_copied(&self) -> bool {
        !self.originals.is_empty()
    }

    /// Whether `name` means this disk: the name of its backend, its device (as an id or a
    /// QOM path), its node or that of its topmost file.
    pub fn is_called(&self, name: &str) -> bool {
        let id = self.qdev.as_deref().and_then(peripheral_id);
        let names = [Some(self.device.as_str()), self.node.as_deref(), self.qdev.as_deref(), id];
        let file = self.chain.first().map(|file| file.node.as_str());
        !name.is_empty() && names.into_iter().chain([file]).flatten().any(|known| known == name)
    }
}

/// The id in a QOM path such as `/machine/peripheral/vda/virtio-backend`.
fn peripheral_id(path: &str) -> Option<&str> {
    path.strip_prefix("/machine/peripheral/")?.split('/').next()
}

/// A QEMU version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuVersion {
    /// For example 7 in 7.2.22.
    pub major: u32,
    /// For example 2 in 7.2.22.
    pub minor: u32,
    /// For example 22 in 7.2.22.
    pub micro: u32,
    /// The distributor's own part, as in ` (Debian 1:7.2+dfsg-7+deb12u18)`.
    pub package: String,
}

impl QemuVersion {
    /// Whether it takes its userfaultfds from `/dev/userfaultfd` where it may open that
    /// (`uffd_open` in QEMU's `util/userfaultfd.c`, 8.0); before, by the system call alone.
    pub fn uses_userfaultfd_device(&self) -> bool {
        self.major >= 8
    }
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_goes_by_any_of_its_names() {
        let disk = Disk {
            device: "drive0".into(),
            qdev: Some("/machine/peripheral/vda/virtio-backend".into()),
            chain: vec![DiskFile { node: "#block1".into(), ..DiskFile::default() }],
            ..Disk::default()
        };
        for name in ["drive0", "vda", "#block1", "/machine/peripheral/vda/virtio-backend"] {
            assert!(disk.is_called(name), "{name}");
        }
        for name in ["", "drive1", "vdb", "peripheral"] {
            assert!(!disk.is_called(name), "{name}");
        }
    }

    #[test]
    fn a_machine_without_hotplug_is_recorded_as_ever() {
        let machine = Machine::default();
        let text = serde_json::to_string(&machine).unwrap();
        assert!(!text.contains("hotplug"), "{text}");
        assert_eq!(serde_json::from_str::<Machine>(&text).unwrap(), machine);
        let removed = vec!["-device e1000,id=n0".to_owned()];
        let hotplug = Hotplug { removed, ..Hotplug::default() };
        let machine = Machine { hotplug, ..machine };
        let text = serde_json::to_string(&machine).unwrap();
        assert_eq!(serde_json::from_str::<Machine>(&text).unwrap(), machine);
    }
}
