//! Devices of the command line kept where they are: when options in front of theirs go, QEMU
//! would give them other addresses.

use serde_json::{Value, json};

use super::peripherals::Peripheral;
use super::properties::pci_address;
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::qmp::{Qmp, QmpError};

/// Properties in which QEMU notes the place that it has given a device: of PCI devices and
/// DIMMs, SCSI disks, IDE disks, and virtio-serial ports.
const PLACES: [&str; 6] = ["addr", "slot", "scsi-id", "lun", "unit", "nr"];

/// A command line on which each of these options, given by its place among the arguments,
/// tells where its device is.
pub(super) async fn pinned(
    qmp: &Qmp,
    line: &CommandLine,
    devices: &[(usize, &Peripheral)],
) -> Result<CommandLine, QmpError> {
    let mut pinned = line.clone();
    let ports = qmp.usb_ports().await?;
    for (at, device) in devices {
        let mut place = Vec::new();
        if let Some(bus) = device.bus_name().filter(|bus| *bus != "main-system-bus") {
            place.push(("bus", json!(bus)));
        }
        if let Some(port) = device.id.as_ref().and_then(|id| ports.get(id)) {
            place.push(("port", json!(port)));
        }
        for name in PLACES {
            match qmp.qom_value(&device.path, name).await? {
                Some(Value::Number(address)) if name == "addr" && device.bus.is_some() => {
                    place.extend(address.as_i64().map(|at| (name, json!(pci_address(at)))));
                }
                Some(value @ Value::Number(_)) => place.push((name, value)),
                _ => {}
            }
        }
        let Some(Arg::Option(option)) = pinned.args.get_mut(*at) else { continue };
        let device = match option.name() {
            "device" => option,
            _ => {
                let drive = qmp.qom_value(&device.path, "drive").await?;
                let Some(id) = drive.as_ref().and_then(Value::as_str) else { continue };
                let device = split_drive(option, id, &device.driver);
                pinned.push(device);
                match pinned.args.last_mut() {
                    Some(Arg::Option(option)) => option,
                    _ => continue,
                }
            }
        };
        device.value = Some(with_place(device.value(), &place));
    }
    Ok(pinned)
}

/// Makes of a `-drive if=virtio` one of this id that gives no device, and gives that.
fn split_drive(drive: &mut CommandOption, id: &str, driver: &str) -> CommandOption {
    let mut value = Params::parse(drive.value());
    value.set("if", "none");
    value.set("id", id);
    value.remove("index");
    drive.value = Some(value.to_string());
    let mut device = Params::parse(driver);
    device.set("drive", id);
    CommandOption::new("device", device.to_string())
}

/// A `-device` of this value that tells its place as well, unless it does so already.
fn with_place(value: &str, place: &[(&str, Value)]) -> String {
    match Spec::parse(value) {
        Spec::Params(mut params) => {
            for (key, value) in place {
                if params.get(key).is_none() {
                    params.set(key, value.as_str().unwrap_or(&value.to_string()));
                }
            }
            params.to_string()
        }
        Spec::Json(mut json) => {
            for (key, value) in place {
                if json.get(key).is_none() {
                    json[key] = value.clone();
                }
            }
            json.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_told_once() {
        let place = [("bus", json!("pci.0")), ("addr", json!("05.0"))];
        assert_eq!(with_place("e1000,id=n", &place), "e1000,id=n,bus=pci.0,addr=05.0");
        assert_eq!(with_place("e1000,addr=0x3", &place), "e1000,addr=0x3,bus=pci.0");
        let told = with_place(r#"{"driver":"e1000","addr":"3"}"#, &place);
        assert_eq!(told, r#"{"addr":"3","bus":"pci.0","driver":"e1000"}"#);
    }

    #[test]
    fn a_drive_with_a_device_becomes_both() {
        let mut drive = CommandOption::new("drive", "if=virtio,file=/d,index=1");
        let device = split_drive(&mut drive, "virtio1", "virtio-blk-pci");
        assert_eq!(drive.value(), "if=none,file=/d,id=virtio1");
        assert_eq!(device.value(), "virtio-blk-pci,drive=virtio1");
    }
}
