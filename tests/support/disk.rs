//! Disks for guests: made, given to QEMU in all its ways, and read from outside.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::Result;

/// Where a guest finds its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// `/dev/vda` and on.
    VirtioBlk,
    /// `/dev/sda` and on.
    VirtioScsi,
    /// `/dev/sda` and on; machine type `pc` only.
    Ide,
    /// `/dev/nvme0n1` and on.
    Nvme,
}

/// How QEMU is told of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// `-drive if=none,id=…` and a `-device`.
    Drive,
    /// One `-drive if=virtio` (or `if=ide`), without an id.
    DriveIf,
    /// A `-blockdev` for the file, one for its format, and a `-device`.
    Blockdev,
    /// One `-blockdev` in JSON for file and format, and a `-device`.
    BlockdevJson,
}

/// What is in a disk's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// A disk of a guest.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Its `id=` or `node-name=`.
    pub id: String,
    pub bus: Bus,
    pub given: Given,
    pub file: PathBuf,
    pub format: Format,
}

impl Disk {
    /// Two disks of so many MiB in a folder, made: one as `-drive` has it, raw, and one as `-blockdev`
    /// has it, qcow2.
    pub fn two(folder: &Path, mib: u64) -> Result<Vec<Disk>> {
        let disks = vec![
            Disk::new("one", &folder.join("one.raw")),
            Disk {
                format: Format::Qcow2,
                given: Given::Blockdev,
                bus: Bus::VirtioBlk,
                ..Disk::new("two", &folder.join("two.qcow2"))
            },
        ];
        disks.iter().try_for_each(|disk| disk.make(mib))?;
        Ok(disks)
    }

    /// A disk on virtio-blk, raw, given by `-drive`.
    pub fn new(id: &str, file: &Path) -> Disk {
        Disk {
            id: id.into(),
            bus: Bus::VirtioBlk,
            given: Given::Drive,
            file: file.into(),
            format: Format::Raw,
        }
    }

    /// Makes its file, with an ext4 file system of so many MiB in it.
    ///
    /// # Errors
    /// When mke2fs or qemu-img is missing or fails.
    pub fn make_ext4(&self, mib: u64) -> Result<()> {
        match self.format {
            Format::Raw => make_ext4(&self.file, mib),
            Format::Qcow2 => {
                let raw = self.file.with_extension("ext4");
                make_ext4(&raw, mib)?;
                convert(&raw, Format::Raw, &self.file, Format::Qcow2)?;
                Ok(std::fs::remove_file(raw)?)
            }
        }
    }

    /// Makes its file, empty, of so many MiB.
    ///
    /// # Errors
    /// When qemu-img is missing or fails.
    pub fn make(&self, mib: u64) -> Result<()> {
        let size = format!("{mib}M");
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", self.format.name()])
            .args([self.file.as_os_str(), size.as_ref()]))
        .map(drop)
    }

    /// The kernel modules that it takes, in the order in which they load.
    pub fn modules(&self) -> &'static str {
        match self.bus {
            Bus::VirtioBlk => VIRTIO_BLK,
            Bus::VirtioScsi => VIRTIO_SCSI,
            Bus::Ide => IDE,
            Bus::Nvme => "",
        }
    }

    /// QEMU's arguments for it.
    pub fn args(&self) -> Vec<String> {
        let Disk { id, format, .. } = self;
        let (format, file) = (format.name(), self.file.display());
        let node = match self.given {
            Given::Drive => vec![
                "-drive".into(),
                format!("if=none,id={id},file={file},format={format},cache=none"),
            ],
            Given::DriveIf => {
                let interface = if self.bus == Bus::Ide { "ide" } else { "virtio" };
                return vec![
                    "-drive".into(),
                    format!("if={interface},file={file},format={format}"),
                ];
            }
            Given::Blockdev => vec![
                "-blockdev".into(),
                format!("driver=file,node-name={id}-file,filename={file},cache.direct=on"),
                "-blockdev".into(),
                format!("driver={format},node-name={id},file={id}-file,discard=unmap"),
            ],
            Given::BlockdevJson => {
                let file = json!({"driver": "file", "filename": self.file, "auto-read-only": true});
                let node = json!({"driver": format, "node-name": id, "file": file});
                vec!["-blockdev".into(), node.to_string()]
            }
        };
        let device = match self.bus {
            Bus::VirtioBlk => format!("virtio-blk-pci,drive={id},id={id}-dev"),
            Bus::VirtioScsi => format!("scsi-hd,bus=scsi-{id}.0,drive={id},id={id}-dev"),
            Bus::Ide => format!("ide-hd,drive={id},id={id}-dev"),
            Bus::Nvme => format!("nvme,drive={id},serial={id},id={id}-dev"),
        };
        let mut args = node;
        if self.bus == Bus::VirtioScsi {
            args.extend(["-device".into(), format!("virtio-scsi-pci,id=scsi-{id}")]);
        }
        args.extend(["-device".into(), device]);
        args
    }
}

/// The kernel modules behind devices, in the order in which they load.
pub const VIRTIO_BLK: &str =
    "virtio,virtio_ring,virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio_pci,virtio_blk";
pub const VIRTIO_BALLOON: &str =
    "virtio,virtio_ring,virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio_pci,virtio_balloon";
const VIRTIO_SCSI: &str = "virtio,virtio_ring,virtio_pci_legacy_dev,virtio_pci_modern_dev,\
                           virtio_pci,scsi_common,scsi_mod,sd_mod,virtio_scsi";
const IDE: &str = "scsi_common,scsi_mod,sd_mod,libata,ata_piix";

fn make_ext4(file: &Path, mib: u64) -> Result<()> {
    File::create(file)?.set_len(mib << 20)?;
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(file)).map(drop)
}

/// Copies what a guest sees of a disk into a new file.
///
/// # Errors
/// When qemu-img is missing or fails.
pub fn convert(from: &Path, is: Format, to: &Path, becomes: Format) -> Result<()> {
    let mut command = Command::new("qemu-img");
    // It reads what nobody writes, or what a guest that stands still has open.
    command.args(["convert", "-U", "-f", is.name(), "-O", becomes.name()]);
    run(command.args([from, to])).map(drop)
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it is missing or fails, with what it said.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|e| format!("{name}: {e}; run `make test`, or once `make setup guest`"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&said)).into());
    }
    Ok(output.stdout)
}

/// Every file in a folder and the folders in it, in order.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    found.sort();
    Ok(found)
}
