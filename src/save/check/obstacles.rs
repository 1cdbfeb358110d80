//! Checks for what rules out a background snapshot, although QEMU says so only when it is
//! asked to take one, or not at all.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, statfs};
use serde::Deserialize;
use serde_json::json;

use super::error::{CheckError, Obstacle};
use crate::host::check_page_size;
use crate::qmp::{Qmp, QmpError, RamBlock};
use crate::save::error::SaveError;

/// Device types that QEMU, up to [`KNOWN_UP_TO`], calls "non-migratable" (`unmigratable` in
/// their VMStateDescription), which it says only when a migration begins.
const NON_MIGRATABLE: [&str; 7] = [
    "nvme",
    "virtio-crypto-pci",
    "virtio-pmem-pci",
    "usb-mtp",
    "usb-serial",
    "usb-braille",
    "amd-iommu",
];

/// The last major version for which that list is known to be right. Later versions are
/// asked nothing ahead: they refuse by themselves when the migration begins.
const KNOWN_UP_TO: u32 = 10;

/// From this version on QEMU sends the state of virtio-mem ahead of all memory.
const VIRTIO_MEM_EARLY: (u32, u32) = (8, 1);

#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// A memory device, as `query-memory-devices` lists it.
#[derive(Deserialize)]
struct MemoryDevice {
    #[serde(rename = "type")]
    kind: String,
    data: MemoryDeviceData,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct MemoryDeviceData {
    id: Option<String>,
    size: u64,
    max_size: u64,
}

/// Looks for devices that can't be saved.
pub(super) async fn check_devices(qmp: &Qmp) -> Result<String, SaveError> {
    let mut obstacles = Vec::new();
    let mut count = 0;
    for directory in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let children: Vec<Property> = qmp.query("qom-list", json!({ "path": directory })).await?;
        for child in children {
            let Some(kind) = child.kind.strip_prefix("child<").and_then(|k| k.strip_suffix('>'))
            else {
                continue;
            };
            count += 1;
            let name = format!("{directory}/{}", child.name);
            if kind.contains("vhost-user") {
                obstacles.push(Obstacle::VhostUser(name));
            } else if NON_MIGRATABLE.contains(&kind) && qmp.version().major <= KNOWN_UP_TO {
                obstacles.push(Obstacle::Device { name, kind: kind.to_owned() });
            }
        }
    }
    let memory: Vec<MemoryDevice> = qmp.query("query-memory-devices", ()).await?;
    for MemoryDevice { kind, data: MemoryDeviceData { id, size, max_size } } in memory {
        let sends_early = (qmp.version().major, qmp.version().minor) >= VIRTIO_MEM_EARLY;
        if kind == "virtio-mem" && (sends_early || size < max_size) {
            obstacles.push(Obstacle::VirtioMem(id.unwrap_or_else(|| "without an id".into())));
        }
    }
    // Network backends are not in the object tree: only the human monitor lists them.
    let arguments = json!({ "command-line": "info network" });
    let networks: String = qmp.query("human-monitor-command", arguments).await?;
    for line in networks.lines().filter(|line| line.contains("type=vhost-user")) {
        let name = line.trim_start_matches([' ', '\\', '|', '-']).split(':').next();
        obstacles.push(Obstacle::VhostUser(format!("network {}", name.unwrap_or_default())));
    }
    match obstacles.is_empty() {
        true => Ok(format!("all {count} can be saved, as far as can be known before")),
        false => Err(CheckError::Obstacles(obstacles).into()),
    }
}

#[derive(Deserialize)]
struct MemoryBackend {
    id: Option<String>,
}

/// The guest's RAMBlocks; an error if some memory can't be write-protected.
pub(super) async fn check_memory(
    qmp: &Qmp,
    background: bool,
) -> Result<(Vec<RamBlock>, String), SaveError> {
    check_page_size()?;
    let blocks = qmp.ram_blocks().await?;
    let mut obstacles = Vec::new();
    let backends: Vec<MemoryBackend> = qmp.query("query-memdev", ()).await?;
    for id in backends.into_iter().filter_map(|backend| backend.id) {
        let arguments = json!({ "path": format!("/objects/{id}"), "property": "mem-path" });
        let path: PathBuf = match qmp.query("qom-get", arguments).await {
            Ok(path) => path,
            // It has none.
            Err(QmpError::Command { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        if background && !path.as_os_str().is_empty() && !can_be_protected(&path) {
            obstacles.push(Obstacle::Memory { id, path });
        }
    }
    let mib = blocks.iter().map(|block| block.used_len).sum::<u64>() >> 20;
    match obstacles.is_empty() {
        true => Ok((blocks, format!("{mib} MiB"))),
        false => Err(CheckError::Obstacles(obstacles).into()),
    }
}

/// Whether pages of a file there can be write-protected: ioctl_userfaultfd(2) takes
/// anonymous memory, shared memory (tmpfs) and hugetlbfs. What can't be asked is left
/// to QEMU.
fn can_be_protected(path: &Path) -> bool {
    statfs(path)
        .map_or(true, |stat| [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&stat.filesystem_type()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_memory_can_be_protected_and_others_not() {
        assert!(can_be_protected(Path::new("/dev/shm")) && !can_be_protected(Path::new("/proc")));
        assert!(can_be_protected(Path::new("/nowhere")));
    }
}
