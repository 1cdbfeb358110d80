//! What stands behind plugged devices, as options: network and character backends, objects,
//! and the places of vCPUs and USB devices.
//!
//! QEMU does not tell all that a backend was given. The guest sees none of it, so what is
//! needed is a backend of the same kind that leads to the same place; where even that can't
//! be had, the device is refused.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::peripherals::Peripheral;
use crate::guest::command_line::CommandOption;
use crate::guest::command_line::parameters::Params;
use crate::qmp::{Chardev, CpuSlot, Network, Qmp, QmpError, QomChild};

/// The network that QEMU's user networks have unless they are given another.
const USER_NETWORK: &str = "10.0.2.0";

/// Objects that can be given again, and the properties which make them what they are.
const OBJECTS: [(&str, &[&str]); 7] = [
    ("memory-backend-ram", MEMORY),
    ("memory-backend-memfd", MEMORY),
    ("memory-backend-file", MEMORY),
    ("rng-random", &["filename"]),
    ("rng-builtin", &[]),
    ("iothread", &["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"]),
    ("throttle-group", &["limits"]),
];

const MEMORY: &[&str] = &[
    "size",
    "share",
    "mem-path",
    "align",
    "pmem",
    "readonly",
    "discard-data",
    "hugetlb",
    "hugetlbsize",
    "seal",
    "merge",
    "dump",
    "reserve",
    "host-nodes",
    "policy",
];

/// An option, or why there is none.
type Found = Result<CommandOption, String>;

/// What a machine has beside its devices.
#[derive(Debug, Default)]
pub(super) struct Backends {
    networks: Vec<Network>,
    forwards: Vec<(String, String)>,
    chardevs: Vec<Chardev>,
    objects: Vec<QomChild>,
    cpus: Vec<CpuSlot>,
    usb_ports: HashMap<String, String>,
}

impl Backends {
    /// Asks for it.
    pub async fn ask(qmp: &Qmp) -> Result<Backends, QmpError> {
        Ok(Backends {
            networks: qmp.networks().await?,
            forwards: qmp.host_forwards().await?,
            chardevs: qmp.chardevs().await?,
            objects: qmp.qom_children("/objects").await?,
            cpus: qmp.cpu_slots().await?,
            usb_ports: qmp.usb_ports().await?,
        })
    }

    /// The place of a vCPU; none for any other device.
    pub fn cpu(&self, device: &Peripheral) -> Option<&Map<String, Value>> {
        let is_it = |slot: &&CpuSlot| slot.qom_path.as_deref() == Some(device.path.as_str());
        self.cpus.iter().find(is_it).map(|slot| &slot.props)
    }

    /// The port of a USB device.
    pub fn usb_port(&self, device: &Peripheral) -> Result<&str, String> {
        let port = device.id.as_ref().and_then(|id| self.usb_ports.get(id));
        port.map(String::as_str)
            .ok_or_else(|| "QEMU tells the port of a USB device only if that has an id".into())
    }

    /// The ids of user networks that no option gives. Their state is in the snapshot whether a
    /// card is on them or not. Those that QEMU made for `-net` and `-nic` have names of its own.
    pub fn user_networks(&self, is_given: impl Fn(&str) -> bool) -> Vec<&str> {
        let is_made_up = |name: &str| name.starts_with('#') || name.starts_with("user.");
        let users = self.networks.iter().filter(|network| network.kind == "user");
        users
            .map(|network| network.name.as_str())
            .filter(|n| !is_made_up(n) && !is_given(n))
            .collect()
    }

    /// A `-netdev`.
    pub fn netdev(&self, id: &str) -> Found {
        let is_it = |network: &&Network| network.name == id && network.kind != "nic";
        let Some(network) = self.networks.iter().find(is_it) else {
            return Err(format!("its network backend `{id}` is gone"));
        };
        let told = Params::parse(&network.details);
        let mut value = Params::parse(&network.kind);
        value.set("id", id);
        let copy = |value: &mut Params, keys: &[&str]| {
            for key in keys {
                if let Some(text) = told.get(key) {
                    value.set(key, text);
                }
            }
        };
        match network.kind.as_str() {
            "user" => {
                if let Some(net) = told.get("net").filter(|net| *net != USER_NETWORK) {
                    value.set("net", &format!("{net}/24"));
                }
                copy(&mut value, &["restrict"]);
                let forwards = self.forwards.iter().filter(|(network, _)| network == id);
                value.items_mut().extend(forwards.map(|(_, rule)| format!("hostfwd={rule}")));
            }
            "tap" if told.get("ifname").is_some() => {
                copy(&mut value, &["ifname", "script", "downscript"]);
                if network.queues > 1 {
                    value.set("queues", &network.queues.to_string());
                }
            }
            // A bridge's helper has made this one.
            "tap" if told.get("br").is_some() => {
                value.items_mut()[0] = "bridge".to_owned();
                copy(&mut value, &["br", "helper"]);
            }
            kind => {
                return Err(format!(
                    "QEMU does not tell how its network backend `{id}` ({kind}) was set up"
                ));
            }
        }
        Ok(CommandOption::new("netdev", value.to_string()))
    }

    /// A `-chardev`.
    pub async fn chardev(&self, qmp: &Qmp, id: &str) -> Result<Found, QmpError> {
        let Some(chardev) = self.chardevs.iter().find(|chardev| chardev.label == id) else {
            return Ok(Err(format!("its character backend `{id}` is gone")));
        };
        let address = qmp.qom_value(&format!("/chardevs/{id}"), "addr").await?;
        Ok(chardev_option(chardev, address.as_ref()))
    }

    /// An `-object`.
    pub async fn object(&self, qmp: &Qmp, id: &str) -> Result<Found, QmpError> {
        let Some(object) = self.objects.iter().find(|object| object.name == id) else {
            return Ok(Err(format!("the object `{id}` that it uses is gone")));
        };
        let known = OBJECTS.iter().find(|(kind, _)| *kind == object.kind);
        let Some((kind, properties)) = known else {
            let kind = &object.kind;
            return Ok(Err(format!("it uses the object `{id}` of the unknown type `{kind}`")));
        };
        let mut value = json!({ "qom-type": kind, "id": id });
        for property in *properties {
            let told = qmp.qom_value(&format!("/objects/{id}"), property).await?;
            if let Some(told) = told.filter(|told| !is_unset(told)) {
                value[property] = told;
            }
        }
        Ok(Ok(CommandOption::new("object", value.to_string())))
    }
}

/// Values by which QEMU says that nothing was given.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// A `-chardev`, by QEMU's description and, of a socket, its address (`SocketAddress` in the
/// QMP reference).
fn chardev_option(chardev: &Chardev, address: Option<&Value>) -> Found {
    let Chardev { label: id, filename } = chardev;
    let described = filename.strip_prefix("disconnected:").unwrap_or(filename);
    let kind = described.split([':', ',']).next().unwrap_or_default();
    let mut value = match kind {
        "null" | "pty" => Params::parse(kind),
        "unix" | "tcp" | "telnet" | "websocket" => Params::parse("socket"),
        _ => {
            return Err(format!(
                "QEMU does not tell how its character backend `{id}` ({kind}) was set up"
            ));
        }
    };
    value.set("id", id);
    let Some(Value::Object(address)) = address else {
        return match kind {
            "null" | "pty" => Ok(CommandOption::new("chardev", value.to_string())),
            _ => Err(format!("QEMU does not tell the address of its socket `{id}`")),
        };
    };
    for (key, told) in address {
        match (key.as_str(), told) {
            ("type", told) if told != "unix" && told != "inet" => {
                return Err(format!("its socket `{id}` was passed on to QEMU as a descriptor"));
            }
            ("path" | "host" | "port", Value::String(text)) => value.set(key, text),
            ("abstract" | "tight" | "ipv4" | "ipv6", Value::Bool(on)) => {
                value.set(key, if *on { "on" } else { "off" });
            }
            _ => {}
        }
    }
    if ["telnet", "websocket"].contains(&kind) {
        value.set(kind, "on");
    }
    if described.ends_with(",server=on") {
        value.set("server", "on");
        value.set("wait", "off");
    }
    Ok(CommandOption::new("chardev", value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn netdev(kind: &str, details: &str, queues: u64) -> Result<String, String> {
        let (name, kind, details) = ("n0".to_owned(), kind.to_owned(), details.to_owned());
        let rule = "tcp:127.0.0.1:5599-10.0.2.15:22".to_owned();
        let backends = Backends {
            networks: vec![Network { name, kind, details, queues }],
            forwards: vec![("n0".into(), rule), ("n1".into(), "tcp::1-:2".into())],
            ..Backends::default()
        };
        backends.netdev("n0").map(|option| option.value().to_owned())
    }

    #[test]
    fn network_backends_lead_to_the_same_place() {
        assert_eq!(
            netdev("user", "net=10.0.2.0,restrict=off", 1).unwrap(),
            "user,id=n0,restrict=off,hostfwd=tcp:127.0.0.1:5599-10.0.2.15:22"
        );
        let user = netdev("user", "net=192.168.7.0,restrict=on", 1).unwrap();
        assert!(user.starts_with("user,id=n0,net=192.168.7.0/24,restrict=on"), "{user}");
        assert_eq!(
            netdev("tap", "ifname=tap0,script=no,downscript=no", 2).unwrap(),
            "tap,id=n0,ifname=tap0,script=no,downscript=no,queues=2"
        );
        assert_eq!(
            netdev("tap", "helper=/usr/lib/helper,br=br0", 1).unwrap(),
            "bridge,id=n0,br=br0,helper=/usr/lib/helper"
        );
        for (kind, details) in [("tap", "fd=9"), ("socket", "socket: connected"), ("nic", "")] {
            assert!(netdev(kind, details, 1).unwrap_err().contains("`n0`"));
        }
    }

    #[track_caller]
    fn chardev(filename: &str, address: Option<Value>) -> Result<String, String> {
        let chardev = Chardev { label: "c0".into(), filename: filename.into() };
        chardev_option(&chardev, address.as_ref()).map(|option| option.value().to_owned())
    }

    /// As QEMU 7.2 and 10.0 describe them.
    #[test]
    fn character_backends_lead_to_the_same_place() {
        let unix = json!({ "path": "/run/a,b", "type": "unix" });
        assert_eq!(
            chardev("disconnected:unix:/run/a,b,server=on", Some(unix.clone())).unwrap(),
            "socket,id=c0,path=/run/a,,b,server=on,wait=off"
        );
        assert_eq!(chardev("unix:/run/a,b", Some(unix)).unwrap(), "socket,id=c0,path=/run/a,,b");
        let inet = json!({ "port": "5601", "ipv4": true, "host": "127.0.0.1", "type": "inet" });
        let telnet = chardev("disconnected:telnet:127.0.0.1:5601,server=on", Some(inet)).unwrap();
        let params = Params::parse(&telnet);
        for (key, value) in [("host", "127.0.0.1"), ("port", "5601"), ("telnet", "on")] {
            assert_eq!(params.get(key), Some(value), "{telnet}");
        }
        assert_eq!(chardev("null", None).unwrap(), "null,id=c0");
        assert_eq!(chardev("pty:/dev/pts/3", None).unwrap(), "pty,id=c0");
        let inherited = json!({ "type": "fd", "str": "9" });
        assert!(chardev("unix:", Some(inherited)).unwrap_err().contains("descriptor"));
        assert!(chardev("file", None).unwrap_err().contains("`c0` (file)"));
    }
}
