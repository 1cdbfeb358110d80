//! What a domain's XML says (<https://libvirt.org/formatdomain.html>).

use xmltree::Element;

use super::disk::DomainDisk;

/// The disks of a domain. None of a text that is no domain.
pub(super) fn disks(xml: &str) -> Vec<DomainDisk> {
    let disks = devices(xml, "disk");
    disks.iter().filter_map(disk).collect()
}

/// Whether an agent in the guest has its channel to libvirt open.
pub(super) fn agent_is_connected(xml: &str) -> bool {
    let is_open = |channel: &Element| {
        channel.get_child("target").is_some_and(|target| {
            target.attributes.get("name").is_some_and(|name| name == "org.qemu.guest_agent.0")
                && target.attributes.get("state").is_some_and(|state| state == "connected")
        })
    };
    devices(xml, "channel").iter().any(is_open)
}

/// The devices of that kind.
fn devices(xml: &str, kind: &str) -> Vec<Element> {
    let Ok(mut domain) = Element::parse(xml.as_bytes()) else { return Vec::new() };
    let Some(devices) = domain.take_child("devices") else { return Vec::new() };
    let elements = devices.children.into_iter().filter_map(|node| match node {
        xmltree::XMLNode::Element(element) => Some(element),
        _ => None,
    });
    elements.filter(|element| element.name == kind).collect()
}

fn disk(element: &Element) -> Option<DomainDisk> {
    let attribute = |child: &str, name: &str| {
        element.get_child(child).and_then(|child| child.attributes.get(name)).cloned()
    };
    let mut below = Vec::new();
    let mut layer = element;
    while let Some(next) = layer.get_child("backingStore") {
        below.extend(source(next));
        layer = next;
    }
    Some(DomainDisk {
        target: attribute("target", "dev")?,
        alias: attribute("alias", "name"),
        source: source(element),
        below,
    })
}

/// The file or block device of a disk, or of a layer of it.
fn source(element: &Element) -> Option<String> {
    let attributes = &element.get_child("source")?.attributes;
    attributes.get("file").or_else(|| attributes.get("dev")).cloned()
}

/// A snapshot of these disks alone, each by its target and the file that is put over it.
pub(super) fn disk_snapshot(overlays: &[(String, String)], others: &[String]) -> String {
    let mut disks = Element::new("disks");
    let mut add = |target: &str, kind: &str, file: Option<&str>| {
        let mut disk = element("disk", &[("name", target), ("snapshot", kind)]);
        if let Some(file) = file {
            disk.children.push(node(element("driver", &[("type", "qcow2")])));
            disk.children.push(node(element("source", &[("file", file)])));
        }
        disks.children.push(node(disk));
    };
    for (target, file) in overlays {
        add(target, "external", Some(file));
    }
    for target in others {
        add(target, "no", None);
    }
    let mut snapshot = Element::new("domainsnapshot");
    snapshot.children.push(node(disks));
    let mut xml = Vec::new();
    // Writing to memory does not fail.
    let _ = snapshot.write(&mut xml);
    String::from_utf8(xml).unwrap_or_default()
}

fn element(name: &str, attributes: &[(&str, &str)]) -> Element {
    let mut element = Element::new(name);
    for (name, value) in attributes {
        element.attributes.insert((*name).into(), (*value).into());
    }
    element
}

fn node(element: Element) -> xmltree::XMLNode {
    xmltree::XMLNode::Element(element)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_with_all_their_layers() {
        let xml = "<domain type='qemu'><devices>
            <disk type='file'><source file='/b'/>
              <backingStore type='file'><source file='/a'/><backingStore/></backingStore>
              <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
            <disk type='block'><source dev='/dev/vg/x'/><target dev='sda'/></disk>
            <disk type='file' device='cdrom'><target dev='sdb'/></disk>
            <channel type='unix'>
              <target type='virtio' name='org.qemu.guest_agent.0' state='disconnected'/></channel>
            </devices></domain>";
        let disks = disks(xml);
        let vda = DomainDisk {
            target: "vda".into(),
            alias: Some("virtio-disk0".into()),
            source: Some("/b".into()),
            below: vec!["/a".into()],
        };
        assert_eq!(disks[0], vda);
        assert_eq!(disks[1].source.as_deref(), Some("/dev/vg/x"));
        assert_eq!((disks[2].target.as_str(), &disks[2].source), ("sdb", &None));
        assert!(!agent_is_connected(xml));
        assert!(agent_is_connected(&xml.replace("disconnected", "connected")));
        assert!(super::disks("no XML").is_empty());
    }

    #[test]
    fn a_snapshot_names_its_files_whatever_they_are_called() {
        let xml = disk_snapshot(&[("vda".into(), "/a & 'b'".into())], &["sda".into()]);
        let read = Element::parse(xml.as_bytes()).unwrap();
        let disks = read.get_child("disks").unwrap();
        let disk = disks.get_child("disk").unwrap();
        assert_eq!(disk.get_child("source").unwrap().attributes.get("file").unwrap(), "/a & 'b'");
        assert_eq!(disks.children.len(), 2);
    }
}
