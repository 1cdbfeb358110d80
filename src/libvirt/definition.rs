//! A domain's definition: the XML by which libvirt knows it
//! (<https://libvirt.org/formatdomain.html>), as far as a revert reads and changes it.

use std::ops::Range;
use std::path::Path;
#[cfg(any(feature = "libvirt", test))]
use std::path::PathBuf;

use xmltree::{Element, EmitterConfig, Namespace, XMLNode};

use crate::guest::GuestError;

/// The namespace of what libvirt passes on to QEMU as it is
/// (<https://libvirt.org/drvqemu.html>, "Pass-through of arbitrary qemu commands").
const QEMU: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// The namespace of our element in a domain's metadata.
const OURS: &str = "urn:snapback:domain:1";

/// The name of that element, and that of each argument in it.
const MARK: &str = "revert";
const LEFT: &str = "argument";

/// A definition that can't be used: says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the domain's XML can't be used: {0}")]
pub struct DefinitionError(String);

/// A domain's definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    root: Element,
}

impl Definition {
    /// Reads a definition.
    ///
    /// # Errors
    /// When it is no XML, or not that of a domain with a name.
    pub fn parse(xml: &str) -> Result<Definition, DefinitionError> {
        let root = Element::parse(xml.as_bytes()).map_err(|e| DefinitionError(e.to_string()))?;
        if root.name != "domain" {
            let problem = format!("it is a <{}>, not a <domain>", root.name);
            return Err(DefinitionError(problem));
        }
        let definition = Definition { root };
        match definition.name().is_empty() {
            true => Err(DefinitionError("the domain has no name".into())),
            false => Ok(definition),
        }
    }

    /// The XML.
    ///
    /// # Errors
    /// When it can't be written: it holds what XML can't.
    pub fn to_xml(&self) -> Result<String, DefinitionError> {
        let mut bytes = Vec::new();
        let config = EmitterConfig::new().write_document_declaration(false).perform_indent(true);
        let written = self.root.write_with_config(&mut bytes, config);
        written.map_err(|e| DefinitionError(e.to_string()))?;
        String::from_utf8(bytes).map_err(|e| DefinitionError(e.to_string()))
    }

    /// The domain's name.
    pub fn name(&self) -> String {
        self.text("name")
    }

    /// The domain's UUID; empty in a definition that leaves it to libvirt.
    pub fn uuid(&self) -> String {
        self.text("uuid")
    }

    /// Sets a text of the domain's own, such as its `name`, where it has one or `add` is set.
    pub(super) fn set_text(&mut self, name: &str, text: &str, add: bool) {
        match self.root.get_mut_child(name) {
            Some(element) => element.children = vec![XMLNode::Text(text.to_owned())],
            None if add => {
                let mut element = Element::new(name);
                element.children.push(XMLNode::Text(text.to_owned()));
                self.root.children.insert(0, XMLNode::Element(element));
            }
            None => {}
        }
    }

    fn text(&self, name: &str) -> String {
        let text = self.root.get_child(name).and_then(Element::get_text);
        text.map(|text| text.trim().to_owned()).unwrap_or_default()
    }

    /// Calls `change` with every element of the definition but its metadata, which is not
    /// libvirt's.
    pub(super) fn for_each(&mut self, mut change: impl FnMut(&mut Element)) {
        fn walk(element: &mut Element, change: &mut impl FnMut(&mut Element)) {
            change(element);
            for child in element.children.iter_mut().filter_map(XMLNode::as_mut_element) {
                if child.name != "metadata" {
                    walk(child, change);
                }
            }
        }
        walk(&mut self.root, &mut change);
    }

    /// Replaces each path that an attribute or a text consists of by what `moved` makes of it.
    pub fn replace_paths(&mut self, moved: impl Fn(&str) -> String) {
        self.for_each(|element| {
            for value in element.attributes.values_mut().filter(|value| value.starts_with('/')) {
                *value = moved(value);
            }
            for child in &mut element.children {
                if let XMLNode::Text(text) = child
                    && text.starts_with('/')
                {
                    *text = moved(text);
                }
            }
        });
    }

    /// The paths in it of files that are called after `name`.
    #[cfg(any(feature = "libvirt", test))]
    pub fn files_called_after(&mut self, name: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        self.for_each(|element| {
            let texts = element.children.iter().filter_map(XMLNode::as_text);
            let values = element.attributes.values().map(String::as_str).chain(texts);
            let paths = values.map(str::trim).filter(|value| value.starts_with('/'));
            let is_it = |path: &PathBuf| {
                path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))
            };
            found.extend(paths.map(PathBuf::from).filter(is_it));
        });
        found
    }

    /// Puts a disk whose file or device is any of `paths` on an overlay, a qcow2 file that names
    /// what it lies over. libvirt follows that by itself. Returns whether there is such a disk.
    pub fn put_on_overlay(&mut self, paths: &[String], overlay: &str) -> bool {
        let disks = self.devices_mut().filter(|device| device.name == "disk");
        let is_it = |disk: &&mut Element| {
            let source = disk.get_child("source");
            let path = source.and_then(|source| {
                ["file", "dev"].iter().find_map(|name| source.attributes.get(*name))
            });
            path.is_some_and(|path| paths.contains(path))
        };
        let mut found = false;
        for disk in disks.filter(is_it) {
            found = true;
            disk.attributes.insert("type".into(), "file".into());
            let below = ["source", "backingStore", "mirror"];
            disk.children.retain(|child| {
                !child.as_element().is_some_and(|child| below.contains(&child.name.as_str()))
            });
            let mut source = Element::new("source");
            source.attributes.insert("file".into(), overlay.to_owned());
            disk.children.push(XMLNode::Element(source));
            if disk.get_child("driver").is_none() {
                let mut driver = Element::new("driver");
                driver.attributes.insert("name".into(), "qemu".into());
                disk.children.push(XMLNode::Element(driver));
            }
            if let Some(driver) = disk.get_mut_child("driver") {
                driver.attributes.insert("type".into(), "qcow2".into());
            }
        }
        found
    }

    /// Whether it has a network card.
    pub fn has_network_cards(&self) -> bool {
        let devices = self.root.get_child("devices");
        devices.is_some_and(|devices| devices.get_child("interface").is_some())
    }

    /// What its network cards are connected to, each as an attribute of `<source>` and its value:
    /// `network`, `bridge` or `dev`, and a name.
    pub fn networks(&self) -> Vec<(String, String)> {
        let devices = self.root.get_child("devices").into_iter().flat_map(|d| &d.children);
        let cards = devices.filter_map(XMLNode::as_element).filter(|e| e.name == "interface");
        let sources = cards.filter_map(|card| card.get_child("source"));
        // One of a network that runs also tells the bridge behind it.
        let named = sources.filter_map(|source| {
            let names = ["network", "bridge", "dev"].into_iter();
            let mut named = names.filter_map(|key| Some((key, source.attributes.get(key)?)));
            named.next().map(|(key, name)| (key.to_owned(), name.clone()))
        });
        named.collect()
    }

    fn devices_mut(&mut self) -> impl Iterator<Item = &mut Element> {
        let devices = self.root.get_mut_child("devices");
        let devices = devices.into_iter().flat_map(|devices| devices.children.iter_mut());
        devices.filter_map(XMLNode::as_mut_element)
    }

    /// Adds arguments of QEMU's for a start by us, and notes in the metadata which they are.
    /// `image` is what the domain is reverted from.
    pub fn add_arguments(&mut self, arguments: &[String], image: &Path) {
        let commandline = self.commandline();
        let prefix = commandline.prefix.clone();
        for argument in arguments {
            let mut arg = Element { prefix: prefix.clone(), ..element("qemu", QEMU, "arg") };
            arg.attributes.insert("value".into(), argument.clone());
            commandline.children.push(XMLNode::Element(arg));
        }
        let mut mark = element("snapback", OURS, MARK);
        mark.namespaces = Some(namespace("snapback", OURS));
        mark.attributes.insert("image".into(), image.display().to_string());
        for argument in arguments {
            let mut left = element("snapback", OURS, LEFT);
            left.children.push(XMLNode::Text(argument.clone()));
            mark.children.push(XMLNode::Element(left));
        }
        if self.root.get_child("metadata").is_none() {
            self.root.children.push(XMLNode::Element(Element::new("metadata")));
        }
        if let Some(metadata) = self.root.get_mut_child("metadata") {
            metadata.children.push(XMLNode::Element(mark));
        }
    }

    /// The element whose arguments libvirt passes on to QEMU; added where there is none.
    fn commandline(&mut self) -> &mut Element {
        if self.root.get_child(("commandline", QEMU)).is_none() {
            let mut namespaces = self.root.namespaces.take().unwrap_or_else(Namespace::empty);
            namespaces.put("qemu", QEMU);
            self.root.namespaces = Some(namespaces);
            self.root.children.push(XMLNode::Element(element("qemu", QEMU, "commandline")));
        }
        match self.root.get_mut_child(("commandline", QEMU)) {
            Some(commandline) => commandline,
            None => unreachable!("it has just been put there"),
        }
    }

    /// Takes out what an earlier start by us has left ([`add_arguments`](Self::add_arguments)).
    pub fn remove_what_we_left(&mut self) {
        let left = self.left();
        if let Some(metadata) = self.root.get_mut_child("metadata") {
            while metadata.take_child((MARK, OURS)).is_some() {}
            if metadata.children.is_empty() {
                self.root.take_child("metadata");
            }
        }
        let Some(commandline) = self.root.get_mut_child(("commandline", QEMU)) else { return };
        let values: Vec<_> = commandline
            .children
            .iter()
            .map(|child| child.as_element()?.attributes.get("value").cloned())
            .collect();
        let values: Vec<_> = values.iter().map(Option::as_ref).collect();
        if let Some(range) = find(&values, &left) {
            commandline.children.drain(range);
        }
        if commandline.children.is_empty() {
            self.root.take_child(("commandline", QEMU));
        }
    }

    /// The same for the command line that libvirt has made of it.
    pub fn remove_from_command_line(&self, mut argv: Vec<String>) -> Vec<String> {
        let values: Vec<_> = argv.iter().map(Some).collect();
        if let Some(range) = find(&values, &self.left()) {
            argv.drain(range);
        }
        argv
    }

    /// The arguments that an earlier start by us has left.
    fn left(&self) -> Vec<String> {
        let marks = self.root.get_child("metadata").into_iter().flat_map(|data| &data.children);
        let marks = marks.filter_map(XMLNode::as_element);
        let marks =
            marks.filter(|mark| mark.name == MARK && mark.namespace.as_deref() == Some(OURS));
        let arguments = marks.flat_map(|mark| &mark.children).filter_map(XMLNode::as_element);
        let arguments = arguments.filter(|argument| argument.name == LEFT);
        arguments.filter_map(|argument| Some(argument.get_text()?.into())).collect()
    }

    /// Checks that libvirt gives the domain ordinary memory.
    ///
    /// # Errors
    /// When it is told to do otherwise.
    pub fn refuse_other_memory(&self) -> Result<(), GuestError> {
        let backing = self.root.get_child("memoryBacking");
        match backing.is_some_and(|backing| !backing.children.is_empty()) {
            true => Err(GuestError::NotMapped {
                problem: "the domain's definition says by itself what its memory is \
                          (<memoryBacking>)"
                    .into(),
            }),
            false => Ok(()),
        }
    }
}

/// Where some arguments stand among all, together, as they were put there.
fn find(all: &[Option<&String>], some: &[String]) -> Option<Range<usize>> {
    if some.is_empty() {
        return None;
    }
    let is_it = |window: &[Option<&String>]| {
        window.iter().zip(some).all(|(value, wanted)| *value == Some(wanted))
    };
    let at = all.windows(some.len()).position(is_it)?;
    Some(at..at + some.len())
}

fn element(prefix: &str, namespace: &str, name: &str) -> Element {
    let (prefix, namespace) = (Some(prefix.to_owned()), Some(namespace.to_owned()));
    Element { prefix, namespace, ..Element::new(name) }
}

fn namespace(prefix: &str, uri: &str) -> Namespace {
    let mut namespaces = Namespace::empty();
    namespaces.put(prefix, uri);
    namespaces
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "<domain type='qemu'><name>vm</name><uuid>u</uuid>
        <os><kernel>/old/kernel</kernel><cmdline>root=/old/x</cmdline></os>
        <devices>
          <disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>
            <source dev='/dev/vg/a' index='1'/><backingStore/><target dev='vda' bus='virtio'/></disk>
          <disk type='file' device='cdrom'><target dev='hda'/></disk>
          <serial type='unix'><source mode='bind' path='/old/s.sock'/></serial>
        </devices></domain>";

    fn parsed(xml: &str) -> Definition {
        Definition::parse(xml).unwrap()
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        for (xml, problem) in [
            ("", "can't be used"),
            ("<domain", "can't be used"),
            ("<network><name>n</name></network>", "a <network>"),
            ("<domain><name> </name></domain>", "no name"),
            (
                "<!DOCTYPE d [<!ENTITY a SYSTEM '/etc/passwd'>]><domain><name>&a;</name></domain>",
                "",
            ),
        ] {
            let error = Definition::parse(xml).unwrap_err().to_string();
            assert!(error.contains(problem), "{xml}: {error}");
        }
    }

    #[test]
    fn a_disk_goes_on_its_overlay() {
        let mut domain = parsed(PLAIN);
        assert!(!domain.put_on_overlay(&["/dev/vg/b".into()], "/o"));
        assert_eq!(domain, parsed(PLAIN));
        assert!(domain.put_on_overlay(&["/x".into(), "/dev/vg/a".into()], "/vm/o.qcow2"));
        let xml = domain.to_xml().unwrap();
        let disk = "<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>
            <target dev='vda' bus='virtio'/><source file='/vm/o.qcow2'/></disk>";
        let disk = Element::parse(disk.as_bytes()).unwrap();
        let found = parsed(&xml);
        let found = found.root.get_child("devices").unwrap().get_child("disk").unwrap();
        assert_eq!(*found, disk, "{xml}");
    }

    #[test]
    fn files_are_known_by_their_names() {
        let mut domain = parsed(PLAIN);
        assert!(domain.files_called_after("old").is_empty());
        assert_eq!(domain.files_called_after("s."), [Path::new("/old/s.sock")]);
        assert_eq!(domain.files_called_after("k"), [Path::new("/old/kernel")]);
    }

    #[test]
    fn paths_are_replaced_where_they_begin() {
        let mut domain = parsed(PLAIN);
        domain.replace_paths(|path| path.replace("/old", "/new"));
        let xml = domain.to_xml().unwrap();
        assert!(xml.contains("<kernel>/new/kernel</kernel>") && xml.contains("root=/old/x"));
        assert!(xml.contains("/new/s.sock"), "{xml}");
    }

    #[test]
    fn what_a_start_leaves_is_marked_and_can_be_taken_out() {
        let own = "<domain type='qemu' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
            <name>vm</name><metadata><app:x xmlns:app='urn:app'>text</app:x></metadata>
            <q:commandline><q:arg value='-incoming'/><q:arg value='-S'/></q:commandline></domain>";
        let arguments = ["-incoming".to_owned(), "defer".to_owned()];
        for xml in [PLAIN, own] {
            let mut domain = parsed(xml);
            domain.add_arguments(&arguments, Path::new("/vm.snap"));
            let with = domain.to_xml().unwrap();
            assert!(with.contains("xmlns:snapback=\"urn:snapback:domain:1\""), "{with}");
            let mut domain = parsed(&with);
            let arguments = domain.root.get_child(("commandline", QEMU)).unwrap();
            assert!(arguments.children.len() >= 2, "{with}");
            let line = ["qemu", "-S", "-incoming", "defer", "-x"].map(str::to_owned).to_vec();
            assert_eq!(domain.remove_from_command_line(line), ["qemu", "-S", "-x"]);
            domain.remove_what_we_left();
            let without = domain.to_xml().unwrap();
            assert!(!without.contains("snapback") && !without.contains("defer"), "{without}");
            assert_eq!(without.contains("-incoming"), xml == own, "{without}");
            assert_eq!(without.contains("app:x"), xml == own, "{without}");
        }
    }
}
