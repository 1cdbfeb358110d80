//! The disk behind a plugged device.

use std::fs;
use std::os::unix::fs::FileTypeExt;

use serde_json::json;

use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::disks::attached::FoundDisk;
use crate::guest::disks::drives;
use crate::machine::DiskFile;

/// The name by which a device finds its disk on the command line, and the option that gives
/// it if there is none yet. The disk's record takes that name.
///
/// # Errors
/// Why no option can give it.
pub(super) fn option(
    line: &CommandLine,
    found: &mut FoundDisk,
) -> Result<(String, Option<CommandOption>), String> {
    let disk = &found.disk;
    let drive = Some(&disk.device).filter(|id| super::is_given(line, &["drive"], id));
    if let Some(name) = drive.or(disk.node.as_ref()) {
        return Ok((name.clone(), None));
    }
    let Some(DiskFile { path, format, .. }) = disk.chain.first() else {
        return Err("QEMU does not tell which file its disk consists of".into());
    };
    let name = node_name(line, found);
    let is_device = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    let driver = if is_device { "host_device" } else { "file" };
    let top = found.top.as_ref();
    let mut node = json!({
        "driver": format, "node-name": name, "read-only": !found.writable(),
        "cache": {
            "direct": top.is_some_and(|top| top.direct),
            "no-flush": top.is_some_and(|top| top.no_flush),
        },
        "file": { "driver": driver, "filename": path },
    });
    if let Some(mode @ ("on" | "unmap")) = top.map(|top| top.detect_zeroes.as_str()) {
        node["detect-zeroes"] = json!(mode);
        // QEMU wants to be told that it may unmap.
        node["discard"] = json!("unmap");
    }
    found.disk.node = Some(name.clone());
    Ok((name, Some(CommandOption::new("blockdev", node.to_string()))))
}

/// A name for the node on top: the one that it was plugged in with where that is known, and
/// is no one else's on the command line.
fn node_name(line: &CommandLine, found: &FoundDisk) -> String {
    let is_made_up = |name: &str| name.starts_with('#') || name.starts_with("snap-");
    let nodes = found.disk.chain.iter().map(|file| file.node.as_str());
    let mut names = std::iter::once(found.disk.device.as_str())
        .chain(nodes)
        .filter(|name| !name.is_empty() && !is_made_up(name) && !drives::is_node(line, name));
    match names.next() {
        Some(name) => name.to_owned(),
        None => {
            let free = |name: &String| !drives::is_node(line, name);
            (0..).map(|number| format!("plugged-{number}")).find(free).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::command_line::parameters::Spec;
    use crate::machine::Disk;

    fn found(device: &str, nodes: &[&str]) -> FoundDisk {
        let file = |node: &&str| DiskFile {
            node: (*node).into(),
            path: format!("/vm/{node}"),
            format: "qcow2".into(),
            stamp: None,
        };
        let chain = nodes.iter().map(file).collect();
        let disk = Disk { device: device.into(), chain, ..Disk::default() };
        FoundDisk { disk, top: None, nodes: Vec::new(), problem: None }
    }

    #[test]
    fn a_disk_of_the_command_line_is_used_from_there() {
        let line = CommandLine::parse(["-drive", "if=none,id=d0,file=/vm/d"]);
        assert_eq!(option(&line, &mut found("d0", &["#1"])).unwrap(), ("d0".into(), None));
        let mut named = found("", &["snap-1-0", "n"]);
        named.disk.node = Some("n".into());
        assert_eq!(option(&line, &mut named).unwrap(), ("n".into(), None));
    }

    #[test]
    fn another_disk_gets_a_node_of_the_name_that_it_had() {
        let line = CommandLine::parse(["-blockdev", "driver=file,node-name=b,filename=/vm/b"]);
        let name = |device, nodes: &[&str]| {
            let mut disk = found(device, nodes);
            let (name, option) = option(&line, &mut disk).unwrap();
            assert_eq!(disk.disk.node.as_ref(), Some(&name));
            let option = option.unwrap();
            let spec = Spec::parse(option.value());
            assert_eq!(spec.get("node-name"), Some(name.as_str()));
            assert_eq!(spec.get("file.filename"), Some(disk.disk.chain[0].path.as_str()));
            name
        };
        // Above it lie an earlier snapshot's overlay and a node without a name.
        assert_eq!(name("", &["snap-1-0", "#2", "top", "base"]), "top");
        assert_eq!(name("hmp", &["#2"]), "hmp");
        assert_eq!(name("", &["#2", "b"]), "plugged-0");
        assert!(option(&line, &mut found("", &[])).is_err());
    }
}
