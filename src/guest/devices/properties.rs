//! The properties of a plugged device that `-device` has to be given.

use serde_json::{Map, Value, json};

use super::peripherals::Peripheral;
use crate::qmp::{DeviceProperty, Qmp, QmpError};

/// Properties that can be read and not be given: where a device is, and what follows from
/// its memory backend.
const DERIVED: [&str; 3] = ["attached", "busnr", "size"];

/// A PCI device's address on its bus as it is given: slot and function.
pub(super) fn pci_address(devfn: i64) -> String {
    format!("{:02x}.{}", devfn >> 3, devfn & 7)
}

/// What `-device` has to be given for a device like the one there is.
#[derive(Debug, Default)]
pub(super) struct Properties {
    /// Properties that differ from their defaults, or don't tell them.
    pub values: Map<String, Value>,
    /// The ids of objects that they name.
    pub objects: Vec<String>,
    /// Whether it is a USB device: QEMU doesn't tell its port among them.
    pub is_usb: bool,
}

impl Properties {
    /// Those of a vCPU: its place. All else is the same as for any vCPU of the machine.
    pub fn of_cpu(place: Map<String, Value>) -> Properties {
        Properties { values: place, ..Properties::default() }
    }

    /// Asks for those of any other device.
    pub async fn ask(qmp: &Qmp, device: &Peripheral) -> Result<Properties, QmpError> {
        let mut given = Properties::default();
        for property in qmp.device_properties(&device.driver).await? {
            if let Some(value) = qmp.qom_value(&device.path, &property.name).await? {
                given.add(property, value);
            }
        }
        Ok(given)
    }

    fn add(&mut self, property: DeviceProperty, value: Value) {
        let DeviceProperty { name, kind, default_value } = property;
        self.is_usb |= name == "full-path";
        if DERIVED.contains(&name.as_str())
            || kind.starts_with("child<")
            || default_value.as_ref() == Some(&value)
        {
            return;
        }
        if kind.starts_with("link<") {
            let Some(path) = value.as_str().filter(|path| !path.is_empty()) else { return };
            let target = match path.strip_prefix("/objects/") {
                Some(id) => {
                    self.objects.push(id.to_owned());
                    id
                }
                None => path,
            };
            self.values.insert(name, json!(target));
            return;
        }
        // A PCI device's address is read as a number and given as text.
        let is_pci_address = name == "addr" && ["int32", "str"].contains(&kind.as_str());
        let value = match value.as_i64() {
            Some(address) if is_pci_address => json!(pci_address(address)),
            _ => value,
        };
        // No ROM at all is not the default; other empty values are.
        let is_unset = match &value {
            Value::Null => true,
            Value::String(text) => text.is_empty() && name != "romfile",
            Value::Array(items) => items.is_empty(),
            Value::Number(_) => name == "bootindex" && value == -1,
            _ => false,
        };
        if !is_unset {
            self.values.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 7.2 and 10.0 tell them.
    #[test]
    fn what_is_not_a_default_is_given_as_device_add_wants_it() {
        let mut given = Properties::default();
        let told = [
            ("addr", "int32", Some(json!(-1)), json!(80)),
            ("bootindex", "int32", None, json!(-1)),
            ("busnr", "busnr", None, json!(0)),
            ("csum", "bool", Some(json!(true)), json!(true)),
            ("disable-legacy", "OnOffAuto", Some(json!("auto")), json!("off")),
            ("drive", "str", None, json!("")),
            ("iothread", "link<iothread>", None, json!("")),
            ("iothread-vq-mapping", "IOThreadVirtQueueMappingList", None, json!([])),
            ("mac", "str", None, json!("52:54:00:00:00:99")),
            ("rng", "link<rng-backend>", None, json!("/objects/r1")),
            ("romfile", "str", None, json!("")),
            ("virtio-backend", "child<virtio-net-device>", None, json!("/machine/x")),
        ];
        for (name, kind, default_value, value) in told {
            let (name, kind) = (name.to_owned(), kind.to_owned());
            given.add(DeviceProperty { name, kind, default_value }, value);
        }
        let expected = json!({
            "addr": "0a.0", "disable-legacy": "off", "mac": "52:54:00:00:00:99", "rng": "r1",
            "romfile": "",
        });
        assert_eq!(Value::Object(given.values), expected);
        assert_eq!((given.objects, given.is_usb), (vec!["r1".to_owned()], false));

        let mut dimm = Properties::default();
        let name = "addr".to_owned();
        let kind = "uint64".to_owned();
        let default_value = Some(json!(0));
        dimm.add(DeviceProperty { name, kind, default_value }, json!(0x1_0000_0000_u64));
        assert_eq!(Value::Object(dimm.values), json!({ "addr": 0x1_0000_0000_u64 }));
    }
}
