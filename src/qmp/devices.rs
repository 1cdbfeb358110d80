//! The commands that tell which devices a machine has, and what stands behind them
//! (QEMU's "QMP Reference Manual", "QEMU Object Model" and "Machines"). Of network backends
//! and USB ports only the human monitor tells (`info network`, `info usernet`, `info usb`).

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Qmp, QmpError};

/// A child in QEMU's object tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QomChild {
    /// Its name below its parent.
    pub name: String,
    /// Its type, such as `virtio-net-pci`.
    pub kind: String,
}

/// A property that a type of device has (`device-list-properties`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceProperty {
    /// Its name.
    pub name: String,
    /// QEMU's name of its type, such as `uint32` or `link<iothread>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The value that it has unless another one is given. Many properties don't tell theirs.
    pub default_value: Option<Value>,
}

/// A network card or backend as `info network` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Its id.
    pub name: String,
    /// `nic`, or a backend's type, such as `user` or `tap`.
    pub kind: String,
    /// What else is said of it, such as `ifname=tap0,script=no,downscript=no`.
    pub details: String,
    /// How many queues it has.
    pub queues: u64,
}

/// A character backend (`query-chardev`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Chardev {
    /// Its id.
    pub label: String,
    /// Where it leads, in QEMU's words, such as `disconnected:unix:/run/s,server=on`.
    pub filename: String,
}

/// A place for a vCPU (`query-hotpluggable-cpus`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuSlot {
    /// What tells it from the others, such as `socket-id`.
    pub props: Map<String, Value>,
    /// The vCPU in it, if there is one.
    pub qom_path: Option<String>,
}

impl Qmp {
    /// The children of an object.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; so for all commands below.
    pub async fn qom_children(&self, path: &str) -> Result<Vec<QomChild>, QmpError> {
        #[derive(Deserialize)]
        struct Property {
            name: String,
            #[serde(rename = "type")]
            kind: String,
        }
        let list: Vec<Property> = self.query("qom-list", json!({ "path": path })).await?;
        let child = |Property { name, kind }: Property| {
            let kind = kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
            Some(QomChild { name, kind })
        };
        Ok(list.into_iter().filter_map(child).collect())
    }

    /// The value of an object's property; none where it has no such property, or one that
    /// can't be read.
    pub async fn qom_value(&self, path: &str, property: &str) -> Result<Option<Value>, QmpError> {
        match self.execute("qom-get", json!({ "path": path, "property": property })).await {
            Ok(value) => Ok(Some(value)),
            Err(QmpError::Command { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The properties that can be given to a device of this type.
    pub async fn device_properties(&self, kind: &str) -> Result<Vec<DeviceProperty>, QmpError> {
        self.query("device-list-properties", json!({ "typename": kind })).await
    }

    /// All network cards and backends.
    pub async fn networks(&self) -> Result<Vec<Network>, QmpError> {
        Ok(parse_networks(&self.human("info network").await?))
    }

    /// All network cards, each with the address that it has for its guest.
    pub async fn cards(&self) -> Result<Vec<(String, String)>, QmpError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Filter {
            name: String,
            main_mac: String,
        }
        let networks = self.networks().await?;
        // Of the cards that tell it, the address that the guest has set.
        let filters: Vec<Filter> = self.query("query-rx-filter", ()).await?;
        let card = |network: Network| {
            let recorded =
                network.details.split(',').find_map(|part| part.strip_prefix("macaddr="));
            let filter = filters.iter().find(|filter| filter.name == network.name);
            let address =
                filter.map(|filter| filter.main_mac.as_str()).or(recorded)?.to_lowercase();
            Some((network.name.clone(), address))
        };
        Ok(networks.into_iter().filter(|network| network.kind == "nic").filter_map(card).collect())
    }

    /// Plugs the cable of a network card in, or out.
    pub async fn set_link(&self, card: &str, up: bool) -> Result<(), QmpError> {
        self.execute("set_link", json!({ "name": card, "up": up })).await.map(drop)
    }

    /// The ports that user networks forward to the guest: the network's id, and the rule as
    /// `hostfwd=` wants it.
    pub async fn host_forwards(&self) -> Result<Vec<(String, String)>, QmpError> {
        Ok(parse_host_forwards(&self.human("info usernet").await?))
    }

    /// The ports of USB devices that have an id. Empty on a machine without USB.
    pub async fn usb_ports(&self) -> Result<HashMap<String, String>, QmpError> {
        Ok(parse_usb_ports(&self.human("info usb").await?))
    }

    /// All character backends.
    pub async fn chardevs(&self) -> Result<Vec<Chardev>, QmpError> {
        self.query("query-chardev", ()).await
    }

    /// The places for vCPUs; none on a machine that takes no more of them.
    pub async fn cpu_slots(&self) -> Result<Vec<CpuSlot>, QmpError> {
        match self.query("query-hotpluggable-cpus", ()).await {
            Err(QmpError::Command { .. }) => Ok(Vec::new()),
            slots => slots,
        }
    }

    /// What a command of the human monitor prints.
    async fn human(&self, command: &str) -> Result<String, QmpError> {
        self.query("human-monitor-command", json!({ "command-line": command })).await
    }
}

/// Reads lines such as ` \ n0: index=0,type=tap,ifname=tap0`. A backend with several queues
/// has a line for each.
fn parse_networks(table: &str) -> Vec<Network> {
    let mut networks: Vec<Network> = Vec::new();
    for line in table.lines() {
        let line = line.trim_start_matches([' ', '\\', '|', '-']).trim_end();
        let Some((name, rest)) = line.split_once(": index=") else { continue };
        // Behind a hub's port stands its name and that of what is plugged into it.
        let name = name.rsplit(": ").next().unwrap_or(name);
        let Some((_, rest)) = rest.split_once(",type=") else { continue };
        let (kind, details) = rest.split_once(',').unwrap_or((rest, ""));
        match networks.iter_mut().find(|known| known.name == name && known.kind == kind) {
            Some(known) => known.queues += 1,
            None => networks.push(Network {
                name: name.to_owned(),
                kind: kind.to_owned(),
                details: details.to_owned(),
                queues: 1,
            }),
        }
    }
    networks
}

/// Reads lines such as `TCP[HOST_FORWARD]  11  127.0.0.1  5599  10.0.2.15  22  0  0` below
/// `Hub -1 (n0):`.
fn parse_host_forwards(table: &str) -> Vec<(String, String)> {
    let mut forwards = Vec::new();
    let mut network = None;
    for line in table.lines() {
        if let Some(rest) = line.strip_prefix("Hub ") {
            network = rest.split_once('(').and_then(|(_, rest)| rest.split_once(')'));
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some((network, _)), [state, _, host, port, guest, guest_port, ..]) =
            (network, words.as_slice())
        else {
            continue;
        };
        let Some(protocol) = state.strip_suffix("[HOST_FORWARD]") else { continue };
        let host = if *host == "*" { "" } else { host };
        let protocol = protocol.to_lowercase();
        let rule = format!("{protocol}:{host}:{port}-{guest}:{guest_port}");
        forwards.push((network.to_owned(), rule));
    }
    forwards
}

/// Reads lines such as `Device 0.1, Port 1.2, Speed 480 Mb/s, Product QEMU USB Tablet, ID: t0`.
fn parse_usb_ports(table: &str) -> HashMap<String, String> {
    let port = |line: &str| {
        let (_, rest) = line.split_once(", Port ")?;
        let (port, _) = rest.split_once(',')?;
        let (_, id) = line.rsplit_once(", ID: ")?;
        Some((id.trim().to_owned(), port.to_owned()))
    };
    table.lines().filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 7.2 and 10.0 print them.
    #[test]
    fn tables_for_people_are_read() {
        let networks = parse_networks(
            "nic0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\n \
             \\ u0: index=0,type=user,net=10.0.2.0,restrict=off\r\n\
             t1: index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n\
             t1: index=1,type=tap,ifname=tap0,script=no,downscript=no\r\n",
        );
        let network = |name: &str, kind: &str, details: &str, queues| Network {
            name: name.into(),
            kind: kind.into(),
            details: details.into(),
            queues,
        };
        assert_eq!(
            networks,
            [
                network("nic0", "nic", "model=e1000,macaddr=52:54:00:12:34:56", 1),
                network("u0", "user", "net=10.0.2.0,restrict=off", 1),
                network("t1", "tap", "ifname=tap0,script=no,downscript=no", 2),
            ]
        );

        let forwards = parse_host_forwards(
            "Hub -1 (u1):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port \
             RecvQ SendQ\r\n  TCP[HOST_FORWARD]  11       127.0.0.1  5599       10.0.2.15    22     \
             0     0\r\n  UDP[HOST_FORWARD]  12               *  53       10.0.2.15    53     0     \
             0\r\n  TCP[ESTABLISHED]  13  1.2.3.4  5  6.7.8.9  10  0  0\r\n",
        );
        let rules = ["tcp:127.0.0.1:5599-10.0.2.15:22", "udp::53-10.0.2.15:53"];
        assert_eq!(forwards, rules.map(|rule| ("u1".to_owned(), rule.to_owned())));

        let ports = parse_usb_ports(
            "  Device 0.0, Port 1, Speed 5000 Mb/s, Product QEMU USB MSD, ID: us\r\n  \
             Device 0.1, Port 2.1, Speed 12 Mb/s, Product QEMU USB Hub\r\n",
        );
        assert_eq!(ports, HashMap::from([("us".to_owned(), "1".to_owned())]));
        assert!(parse_usb_ports("USB support not enabled\r\n").is_empty());
    }
}
