//! What a domain has of its own beside another that was made from the same image.

use std::path::Path;

use uuid::Uuid;
use xmltree::{Element, XMLNode};
use xxhash_rust::xxh3::xxh3_64;

use super::definition::Definition;

/// The first three bytes of a network card's address that QEMU's cards have.
const QEMU_MAC: [u8; 3] = [0x52, 0x54, 0x00];

/// The identity of a domain that is not the one of its image.
#[derive(Debug, Clone)]
pub struct Sibling {
    name: String,
    uuid: Uuid,
}

impl Sibling {
    /// A new one of this name.
    pub fn new(name: &str) -> Sibling {
        Sibling { name: name.to_owned(), uuid: Uuid::new_v4() }
    }

    /// Gives a definition what is the sibling's own: name, UUID, addresses of network cards,
    /// sockets, log files, ports. Two definitions of one domain get the same.
    ///
    /// What the guest has seen stays as it is in its memory: it sends by the address of the
    /// network card that it has read at its start.
    pub fn put_into(&self, domain: &mut Definition) {
        domain.set_text("name", &self.name, true);
        domain.set_text("uuid", &self.uuid.to_string(), true);
        domain.set_text("genid", &self.derived("genid").to_string(), false);
        domain.for_each(|element| match element.name.as_str() {
            "interface" => self.network_card(element),
            "serial" | "parallel" | "console" | "channel" | "rng" | "redirdev" | "smartcard" => {
                self.character_device(element);
            }
            "graphics" => self.graphics(element),
            "cid" if element.attributes.contains_key("address") => {
                element.attributes.shift_remove("address");
                element.attributes.insert("auto".into(), "yes".into());
            }
            "nvram" => {
                for child in &mut element.children {
                    if let XMLNode::Text(path) = child {
                        *path = self.beside(path.trim());
                    }
                }
            }
            // libvirt wants it to be the domain's.
            "entry" if element.attributes.get("name").is_some_and(|name| name == "uuid") => {
                element.children = vec![XMLNode::Text(self.uuid.to_string())];
            }
            _ => {}
        });
    }

    fn network_card(&self, interface: &mut Element) {
        if let Some(mac) = interface.get_mut_child("mac")
            && let Some(address) = mac.attributes.get_mut("address")
        {
            *address = self.mac(address);
        }
        // libvirt gives it another name.
        interface.take_child("target");
    }

    /// The address in place of another.
    fn mac(&self, other: &str) -> String {
        let [a, b, c] = QEMU_MAC;
        let [d, e, f, ..] = self.derived(other).into_bytes();
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }

    /// A UUID of this sibling's for something that has a name.
    fn derived(&self, name: &str) -> Uuid {
        let half =
            |number: u8| xxh3_64(&[self.uuid.as_bytes(), name.as_bytes(), &[number]].concat());
        Uuid::from_u64_pair(half(0), half(1))
    }

    /// Sockets on which QEMU listens, and files that it writes.
    fn character_device(&self, device: &mut Element) {
        let kind = device.attributes.get("type").cloned().unwrap_or_default();
        for name in ["source", "log"] {
            let Some(source) = device.get_mut_child(name) else { continue };
            let listens = source.attributes.get("mode").is_some_and(|mode| mode == "bind");
            let writes = name == "log" || matches!(kind.as_str(), "file" | "pipe");
            for key in ["path", "file"] {
                if let Some(path) = source.attributes.get_mut(key)
                    && (listens || writes)
                {
                    *path = self.beside(path);
                }
            }
        }
    }

    /// libvirt finds free ports.
    fn graphics(&self, graphics: &mut Element) {
        let ports = ["port", "tlsPort", "websocket"];
        if ports.iter().any(|port| graphics.attributes.contains_key(*port)) {
            ports.iter().for_each(|port| drop(graphics.attributes.shift_remove(*port)));
            graphics.attributes.insert("autoport".into(), "yes".into());
        }
        if let Some(socket) = graphics.attributes.get_mut("socket") {
            *socket = self.beside(socket);
        }
        for listen in graphics.children.iter_mut().filter_map(XMLNode::as_mut_element) {
            if let Some(socket) = listen.attributes.get_mut("socket") {
                *socket = self.beside(socket);
            }
        }
    }

    /// A file of the same directory, with the sibling's name in front of its own.
    fn beside(&self, path: &str) -> String {
        let path = Path::new(path);
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        path.with_file_name(format!("{}-{file}", self.name)).to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sibling_has_its_own_in_every_definition() {
        let xml = "<domain type='qemu'><name>vm</name><uuid>1</uuid><genid>2</genid>
            <os><nvram>/nv/vm.fd</nvram></os>
            <sysinfo type='smbios'><system><entry name='uuid'>1</entry></system></sysinfo>
            <devices>
              <interface type='network'><mac address='52:54:00:01:02:03'/><target dev='vnet7'/>
                <source network='n'/></interface>
              <serial type='file'><source path='/l/0.log'/></serial>
              <console type='file'><source path='/l/0.log'/><log file='/l/c.log'/></console>
              <serial type='unix'><source mode='bind' path='/s/1'/></serial>
              <serial type='unix'><source mode='connect' path='/s/2'/></serial>
              <graphics type='vnc' port='5901' autoport='no'/>
              <vsock><cid auto='no' address='7'/></vsock>
            </devices></domain>";
        let sibling = Sibling::new("b");
        let put = |sibling: &Sibling| {
            let mut domain = Definition::parse(xml).unwrap();
            sibling.put_into(&mut domain);
            domain.to_xml().unwrap()
        };
        let made = put(&sibling);
        assert_eq!(made, put(&sibling));
        assert_ne!(made, put(&Sibling::new("b")));
        for own in ["<name>b</name>", "/nv/b-vm.fd", "/l/b-0.log", "/l/b-c.log", "/s/b-1", "/s/2"] {
            assert!(made.contains(own), "{own}: {made}");
        }
        for other in ["<uuid>1<", ">2<", "01:02:03", "vnet7", "5901", "\"7\"", ">1</entry>"] {
            assert!(!made.contains(other), "{other}: {made}");
        }
        assert!(made.contains("\"52:54:00:") && made.contains("network=\"n\""), "{made}");
    }
}
