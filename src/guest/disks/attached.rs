//! The disks of a running QEMU: their names, and the files that they consist of.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::guest::GuestError;
use crate::guest::command_line::CommandLine;
use crate::guest::command_line::parameters::Spec;
use crate::host::in_use;
use crate::machine::{Disk, DiskFile, DiskRole, Machine};
use crate::qmp::{BlockDevice, BlockEdge, BlockNode, Qmp};

/// Longest chain that is followed: QEMU has no limit of its own.
const MAX_CHAIN: usize = 1024;

/// A disk of a running QEMU.
#[derive(Debug, Clone)]
pub struct FoundDisk {
    /// Its record. The role is [`Excluded`](DiskRole::Excluded) when it is writable;
    /// no file has a stamp yet.
    pub disk: Disk,
    /// The node on top, which an overlay can be put over.
    pub top: Option<BlockNode>,
    /// The names of all its nodes.
    pub nodes: Vec<String>,
    /// Why it can't be frozen, if it is writable and can't.
    pub problem: Option<String>,
}

impl FoundDisk {
    /// Whether the guest may write to it.
    pub fn writable(&self) -> bool {
        self.disk.role == DiskRole::Excluded
    }

    /// Whether `name` means this disk: by [`Disk::is_called`], or as the name of any of
    /// its nodes.
    pub fn is_called(&self, name: &str) -> bool {
        self.disk.is_called(name) || self.nodes.iter().any(|node| node == name)
    }
}

/// Finds the disks of the machine that process `pid` runs, in the order of QEMU's
/// `query-block`.
///
/// # Errors
/// [`GuestError::Qmp`] when QEMU does not answer.
pub async fn disks(pid: i32, qmp: &Qmp, machine: &Machine) -> Result<Vec<FoundDisk>, GuestError> {
    let devices = qmp.block_devices().await?;
    let graph = BlockGraph { nodes: qmp.block_nodes().await?, edges: qmp.block_edges().await? };
    let named = named_nodes(machine);
    let view = View { pid, cwd: Path::new(&machine.cwd), graph: &graph, named: &named };
    Ok(devices.into_iter().map(|device| view.disk(device)).collect())
}

/// The nodes that a command line names, in any spelling.
fn named_nodes(machine: &Machine) -> HashSet<String> {
    let line = CommandLine::parse(machine.argv.get(1..).unwrap_or_default());
    let drives = line.options().filter(|option| ["blockdev", "drive"].contains(&option.name()));
    let leaves = drives.flat_map(|option| Spec::parse(option.value()).leaves());
    leaves
        .filter(|(key, _)| key == "node-name" || key.ends_with(".node-name"))
        .map(|(_, value)| value)
        .collect()
}

struct BlockGraph {
    nodes: Vec<BlockNode>,
    edges: Vec<BlockEdge>,
}

impl BlockGraph {
    fn node(&self, name: &str) -> Option<&BlockNode> {
        self.nodes.iter().find(|node| node.name == name)
    }

    fn child(&self, parent: &BlockNode, role: &str) -> Option<&BlockNode> {
        let wanted = |edge: &&BlockEdge| {
            edge.parent.as_deref() == Some(parent.name.as_str()) && edge.role == role
        };
        self.node(&self.edges.iter().find(wanted)?.child)
    }
}

/// The context in which disks are examined.
struct View<'a> {
    pid: i32,
    cwd: &'a Path,
    graph: &'a BlockGraph,
    named: &'a HashSet<String>,
}

impl View<'_> {
    fn disk(&self, device: BlockDevice) -> FoundDisk {
        let top = device.node_name.as_deref().and_then(|name| self.graph.node(name));
        let role = match (&device.driver, device.writable) {
            (None, _) => DiskRole::Empty,
            (Some(_), false) => DiskRole::ReadOnly,
            (Some(_), true) => DiskRole::Excluded,
        };
        let walked = top.map(|top| self.walk(top)).unwrap_or_default();
        let unknown = || Some("QEMU does not tell what it consists of".to_owned());
        let problem = match top {
            None => unknown(),
            Some(_) => walked.problem,
        };
        let disk = Disk {
            device: device.device,
            qdev: device.qdev,
            node: walked.named,
            removable: device.removable,
            role,
            size: top.map_or(0, |top| top.size),
            chain: walked.chain,
            overlay: None,
            originals: Vec::new(),
        };
        let problem = problem.filter(|_| role == DiskRole::Excluded);
        FoundDisk { disk, top: top.cloned(), nodes: walked.nodes, problem }
    }

    /// Follows a disk from its top node to the base.
    fn walk(&self, top: &BlockNode) -> Walked {
        let mut walked = Walked::default();
        let mut next = Some(top);
        while let Some(node) = next {
            if walked.chain.len() == MAX_CHAIN {
                walked.fails(format!("more than {MAX_CHAIN} files lie on top of each other"));
                break;
            }
            let (protocol, format) = match is_protocol(&node.driver) {
                true => (Some(node), "raw"),
                false => (self.graph.child(node, "file"), node.driver.as_str()),
            };
            for candidate in [Some(node), protocol].into_iter().flatten() {
                if !walked.nodes.contains(&candidate.name) {
                    walked.nodes.push(candidate.name.clone());
                }
                if walked.named.is_none() && self.named.contains(&candidate.name) {
                    walked.named = Some(candidate.name.clone());
                }
            }
            self.check_format(node, format, &mut walked);
            if let Some(path) = protocol.and_then(|node| self.file(node, &mut walked)) {
                let (node, format) = (node.name.clone(), format.to_owned());
                walked.chain.push(DiskFile { node, path, format, stamp: None });
            } else if protocol.is_none() {
                walked.fails(format!("its node `{}` has no file below it", node.name));
            }
            next = self.graph.child(node, "backing");
        }
        walked
    }

    /// Records why this node can't be part of a snapshot, if so.
    fn check_format(&self, node: &BlockNode, format: &str, walked: &mut Walked) {
        let name = &node.name;
        if !["raw", "qcow2"].contains(&format) {
            walked.fails(format!(
                "its node `{name}` is of the driver `{format}`; only raw and qcow2 can be frozen"
            ));
        }
        if node.encrypted {
            walked.fails(format!("its node `{name}` is encrypted"));
        }
        if node.data_file {
            walked.fails(format!("its node `{name}` keeps its data in an external data file"));
        }
        // Only a part of a file: QEMU then can't name it by the file.
        if format == "raw" && node.file.starts_with("json:") {
            walked.fails(format!("its node `{name}` shows only a part of its file"));
        }
    }

    /// The absolute path behind a protocol node.
    fn file(&self, node: &BlockNode, walked: &mut Walked) -> Option<String> {
        let name = &node.name;
        if !is_protocol(&node.driver) {
            walked.fails(format!(
                "its node `{name}` is of the driver `{}`; only files and block devices can be \
                 frozen",
                node.driver
            ));
            return None;
        }
        let path = self.cwd.join(file_name(&node.file));
        if path.starts_with("/dev/fdset") {
            walked.fails("QEMU got its file as a descriptor, not by its path".to_owned());
        } else if !self.is_open(&path) {
            walked.fails(format!(
                "the file that QEMU has open is not at {} any more: it was moved, replaced or \
                 deleted (as that of a drive with snapshot=on)",
                path.display()
            ));
        }
        let path = fs::canonicalize(&path).unwrap_or(path);
        match path.into_os_string().into_string() {
            Ok(path) => Some(path),
            Err(path) => {
                walked.fails(format!("its path {path:?} is not UTF-8"));
                None
            }
        }
    }

    /// Whether QEMU has the file at this path open: that very file.
    fn is_open(&self, path: &Path) -> bool {
        let Ok(meta) = fs::metadata(path) else { return false };
        if meta.file_type().is_block_device() {
            return true;
        }
        meta.is_file() && in_use::has_open(self.pid, (meta.dev(), meta.ino()))
    }
}

/// Whether a driver is one of those that lead to a file or a device of this host.
fn is_protocol(driver: &str) -> bool {
    ["file", "host_device", "host_cdrom"].contains(&driver)
}

/// The file named by QEMU's description, which may be `json:`.
fn file_name(described: &str) -> PathBuf {
    let options = described.strip_prefix("json:").and_then(|json| serde_json::from_str(json).ok());
    let named = options.as_ref().and_then(|options: &Value| options["filename"].as_str());
    PathBuf::from(named.unwrap_or(described))
}

/// The result of following a disk.
#[derive(Default)]
struct Walked {
    chain: Vec<DiskFile>,
    named: Option<String>,
    nodes: Vec<String>,
    problem: Option<String>,
}

impl Walked {
    /// Records a problem; the first one is reported.
    fn fails(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_and_nodes() {
        assert_eq!(file_name("a.raw"), Path::new("a.raw"));
        let described = r#"json:{"driver":"file","filename":"/b","pr-manager":"x"}"#;
        assert_eq!(file_name(described), Path::new("/b"));
        assert_eq!(file_name("json:nonsense"), Path::new("json:nonsense"));

        let argv = [
            "qemu",
            "-blockdev",
            r#"{"driver":"qcow2","node-name":"top","file":{"driver":"file","node-name":"f"}}"#,
            "-blockdev",
            "driver=raw,node-name=flat,file.driver=file,file.node-name=below",
            "-drive",
            "file=x,node-name=drive",
            "-netdev",
            "user,id=n,node-name=no",
        ];
        let machine = Machine { argv: argv.map(String::from).into(), ..Machine::default() };
        let named = named_nodes(&machine);
        let expected = ["top", "f", "flat", "below", "drive"].map(String::from);
        assert_eq!(named, HashSet::from(expected));
    }

    #[test]
    fn a_disk_goes_by_any_of_its_names() {
        let disk = Disk {
            device: "system".into(),
            qdev: Some("/machine/peripheral/vda/virtio-backend".into()),
            ..Disk::default()
        };
        let found = FoundDisk { disk, top: None, nodes: vec!["#block1".into()], problem: None };
        assert!(["system", "vda", "#block1"].iter().all(|name| found.is_called(name)));
        assert!(["", "vdb", "peripheral"].iter().all(|name| !found.is_called(name)));
    }
}
