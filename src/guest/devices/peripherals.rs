//! The devices that people gave a machine: on the command line and by `device_add`.

use serde_json::Value;

use crate::guest::disks::attached::FoundDisk;
use crate::qmp::{Qmp, QmpError};

/// Where QEMU keeps devices with an id, and those without.
const DIRECTORIES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// A device that somebody gave the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Peripheral {
    /// Its path in QEMU's object tree.
    pub path: String,
    /// Its id, if it has one.
    pub id: Option<String>,
    /// Its type, such as `virtio-net-pci`.
    pub driver: String,
    /// Whether it was plugged in after the machine was complete.
    pub hotplugged: bool,
    /// The path of the bus that it is on; some, such as a DIMM, are on none.
    pub bus: Option<String>,
}

impl Peripheral {
    /// Its id, or its name in the object tree, such as `device[2]`.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// As `device_add` names its bus.
    pub fn bus_name(&self) -> Option<&str> {
        self.bus.as_deref()?.rsplit('/').next()
    }

    /// The number of a device without an id: QEMU counts them as they come.
    pub fn number(&self) -> Option<usize> {
        self.name().strip_prefix("device[")?.strip_suffix(']')?.parse().ok()
    }

    /// Whether it is on a bus of the other one's.
    pub fn is_plugged_into(&self, other: &Peripheral) -> bool {
        self.bus.as_deref().is_some_and(|bus| is_below(bus, &other.path))
    }

    /// Whether the guest uses the disk by this device.
    pub fn has_disk(&self, found: &FoundDisk) -> bool {
        let qdev = found.disk.qdev.as_deref();
        qdev.is_some_and(|qdev| {
            self.id.as_deref() == Some(qdev) || qdev == self.path || is_below(qdev, &self.path)
        })
    }
}

fn is_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'))
}

/// The paths in QEMU's object tree of all devices that were given to the machine, sorted.
///
/// # Errors
/// When QEMU does not answer.
pub async fn device_paths(qmp: &Qmp) -> Result<Vec<String>, QmpError> {
    let mut paths = Vec::new();
    for directory in DIRECTORIES {
        let children = qmp.qom_children(directory).await?;
        paths.extend(children.into_iter().map(|child| format!("{directory}/{}", child.name)));
    }
    paths.sort();
    Ok(paths)
}

/// The devices at these paths, as far as they are still there.
pub(super) async fn peripherals(qmp: &Qmp, paths: &[String]) -> Result<Vec<Peripheral>, QmpError> {
    let mut devices = Vec::new();
    for path in paths {
        let Some(Value::String(driver)) = qmp.qom_value(path, "type").await? else { continue };
        let hotplugged = qmp.qom_value(path, "hotplugged").await?;
        let bus = qmp.qom_value(path, "parent_bus").await?;
        let id = path.strip_prefix(DIRECTORIES[0]).and_then(|rest| rest.strip_prefix('/'));
        devices.push(Peripheral {
            path: path.clone(),
            id: id.map(str::to_owned),
            driver,
            hotplugged: hotplugged == Some(Value::Bool(true)),
            bus: match bus {
                // The path is empty where there is no bus.
                Some(Value::String(bus)) if !bus.is_empty() => Some(bus),
                _ => None,
            },
        });
    }
    Ok(devices)
}

/// The devices in an order in which each comes behind the one that it is plugged into. Apart
/// from that the order doesn't matter, as addresses are recorded; it is always the same.
pub(super) fn in_order<'a>(devices: impl Iterator<Item = &'a Peripheral>) -> Vec<Peripheral> {
    let mut waiting: Vec<Peripheral> = devices.cloned().collect();
    waiting.sort_by(|a, b| (a.number(), &a.path).cmp(&(b.number(), &b.path)));
    let mut ordered = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let is_ready = |device: &Peripheral| !waiting.iter().any(|o| device.is_plugged_into(o));
        let (ready, rest): (Vec<_>, Vec<_>) =
            waiting.iter().cloned().partition(|device| is_ready(device));
        // Paths get longer on the way up, so there is always one.
        if ready.is_empty() {
            ordered.extend(rest);
            break;
        }
        ordered.extend(ready);
        waiting = rest;
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Disk;

    fn device(path: &str, bus: &str) -> Peripheral {
        let bus = (!bus.is_empty()).then(|| bus.to_owned());
        Peripheral { path: path.into(), bus, ..Peripheral::default() }
    }

    #[test]
    fn a_device_comes_behind_its_controller() {
        let devices = [
            device("/machine/peripheral/a", "/machine/peripheral/z/virtio-backend/z.0"),
            device("/machine/peripheral-anon/device[10]", ""),
            device("/machine/peripheral-anon/device[9]", ""),
            device("/machine/peripheral/z", "/machine/i440fx/pci.0"),
        ];
        let names: Vec<String> =
            in_order(devices.iter()).iter().map(|device| device.name().to_owned()).collect();
        assert_eq!(names, ["z", "device[9]", "device[10]", "a"]);
        assert_eq!(devices[0].bus_name(), Some("z.0"));
    }

    #[test]
    fn a_disk_is_found_by_id_path_or_what_is_below() {
        let device = Peripheral { id: Some("d".into()), ..device("/machine/peripheral/d", "") };
        let has = |qdev: &str| {
            let disk = Disk { qdev: Some(qdev.into()), ..Disk::default() };
            device.has_disk(&FoundDisk { disk, top: None, nodes: Vec::new(), problem: None })
        };
        assert!(has("d") && has("/machine/peripheral/d/virtio-backend"));
        assert!(!has("d2") && !has("/machine/peripheral/d2/virtio-backend"));
    }
}
