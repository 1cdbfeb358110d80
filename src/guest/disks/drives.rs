//! The options of a command line that define disks, and how a captured disk is replaced by its
//! overlay. The guest's devices stay as they are, and so do the names by which they find their
//! disk.

use std::path::Path;

use serde_json::{Map, Value};

use crate::guest::GuestError;
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::guest::disks::overlay::Overlay;
use crate::machine::{Disk, Machine};

/// Deepest nesting of nodes that is followed.
const MAX_DEPTH: usize = 32;

/// Finds the option of a recorded command line that defines a disk: its position in
/// [`CommandLine::args`].
pub(in crate::guest) fn find(
    line: &CommandLine,
    disk: &Disk,
    cwd: &Path,
) -> Result<usize, GuestError> {
    let at = |is_it: &dyn Fn(&CommandOption) -> bool| {
        line.args.iter().position(|arg| matches!(arg, Arg::Option(option) if is_it(option)))
    };
    let by_node = || {
        let node = disk.node.as_deref().filter(|node| !node.is_empty())?;
        at(&|option| {
            ["blockdev", "drive"].contains(&option.name())
                && Spec::parse(option.value()).leaves().iter().any(|(key, value)| {
                    value == node && (key == "node-name" || key.ends_with(".node-name"))
                })
        })
    };
    let by_id = || {
        let id = Some(disk.device.as_str()).filter(|id| !id.is_empty())?;
        at(&|option| {
            option.name() == "drive" && Params::parse(option.value()).get("id") == Some(id)
        })
    };
    // QEMU generates names for drives without one. Those are found by their file: the topmost of
    // the chain that the command line names. Files further down may be shared with other drives,
    // as long as none writes to them.
    let by_file = || {
        disk.chain.iter().map(|of| &of.path).chain(&disk.originals).find_map(|of| {
            line.args.iter().position(|arg| {
                let file = match arg {
                    Arg::Image(path) => Some(path.clone()),
                    Arg::Option(option) if option.name() == "drive" => drive_file(option),
                    Arg::Option(option) => old_option(option).and(option.value.clone()),
                };
                file.is_some_and(|file| same_file(&file, of, cwd))
            })
        })
    };
    let found = by_node().or_else(by_id).or_else(by_file);
    found.ok_or_else(|| GuestError::DiskNotGiven { disk: disk.describe() })
}

/// Whether a revert will find the disks that are to be captured on the machine's command line, and
/// tell them apart.
///
/// # Errors
/// [`GuestError::DiskNotGiven`] and [`GuestError::DisksGivenAsOne`] when it won't.
pub fn check_given<'a>(
    machine: &Machine,
    disks: impl IntoIterator<Item = &'a Disk>,
) -> Result<(), GuestError> {
    let line = CommandLine::parse(machine.argv.get(1..).unwrap_or_default());
    find_each(&line, disks, Path::new(&machine.cwd)).map(drop)
}

/// Finds the options that define these disks, in their order, as [`find`] does; each has its own.
pub(in crate::guest) fn find_each<'a>(
    line: &CommandLine,
    disks: impl IntoIterator<Item = &'a Disk>,
    cwd: &Path,
) -> Result<Vec<usize>, GuestError> {
    let mut found: Vec<(usize, &Disk)> = Vec::new();
    for disk in disks {
        let place = find(line, disk, cwd)?;
        if let Some((_, other)) = found.iter().find(|(taken, _)| *taken == place) {
            let (disk, other) = (disk.describe(), other.describe());
            return Err(GuestError::DisksGivenAsOne { disk, other });
        }
        found.push((place, disk));
    }
    Ok(found.into_iter().map(|(place, _)| place).collect())
}

/// Replaces disks by their overlays, each at the position that [`find`] returned.
pub(in crate::guest) fn put(
    line: &mut CommandLine,
    overlays: &[(usize, Overlay)],
) -> Result<(), GuestError> {
    let mut below = Vec::new();
    for (at, overlay) in overlays {
        line.args[*at] = match &line.args[*at] {
            Arg::Image(_) => drive("index=0,media=disk", overlay)?,
            Arg::Option(option) => match option.name() {
                "blockdev" => blockdev(line, option.value(), overlay, &mut below)?,
                "drive" => drive(option.value(), overlay)?,
                _ => drive(&old_option(option).unwrap_or_default(), overlay)?,
            },
        };
    }
    drop_unused(line, below);
    Ok(())
}

/// The `-drive` that an option with nothing but a file stands for (`drive_add` in QEMU's vl.c).
fn old_option(option: &CommandOption) -> Option<String> {
    let drive = match option.name() {
        "hda" | "hdb" | "hdc" | "hdd" => {
            let index = option.name().bytes().last()? - b'a';
            format!("index={index},media=disk")
        }
        "fda" => "if=floppy,index=0".to_owned(),
        "fdb" => "if=floppy,index=1".to_owned(),
        "pflash" => "if=pflash".to_owned(),
        "mtdblock" => "if=mtd".to_owned(),
        "sd" => "if=sd".to_owned(),
        _ => return None,
    };
    Some(drive)
}

/// A `-drive` of this value with the overlay as its file.
fn drive(value: &str, overlay: &Overlay) -> Result<Arg, GuestError> {
    let mut params = Params::parse(value);
    params.items_mut().retain(|item| {
        let key = item.split_once('=').map_or(item.as_str(), |(key, _)| key);
        let of_the_file = key.starts_with("file.") || key.starts_with("backing.");
        !of_the_file && !["file", "format", "driver"].contains(&key)
    });
    // How files are read and written (`aio`, `cache`) is said beside the file here, and
    // QEMU applies it to all of them.
    let node = Value::Object(overlay.node(None)?);
    params.set("file", &format!("json:{node}"));
    Ok(Arg::Option(CommandOption::new("drive", params.to_string())))
}

/// The file of a `-drive`.
fn drive_file(option: &CommandOption) -> Option<String> {
    let params = Params::parse(option.value());
    let file = params.get("file").or(params.get("file.filename"))?;
    let Some(json) = file.strip_prefix("json:") else {
        return Some(file.strip_prefix("file:").unwrap_or(file).to_owned());
    };
    let node: Value = serde_json::from_str(json).ok()?;
    Some(node.pointer("/file/filename")?.as_str()?.to_owned())
}

fn same_file(named: &str, recorded: &str, cwd: &Path) -> bool {
    let named = cwd.join(named);
    named == Path::new(recorded)
        || named.canonicalize().is_ok_and(|named| named == Path::new(recorded))
}

/// A `-blockdev` of the same name as the one of this value, with the overlay in its
/// place. What was below is noted: the overlay brings its own.
fn blockdev(
    line: &CommandLine,
    value: &str,
    overlay: &Overlay,
    below: &mut Vec<String>,
) -> Result<Arg, GuestError> {
    let node = with_overlay(line, &tree(&Spec::parse(value)), overlay, below, 0)?;
    Ok(Arg::Option(CommandOption::new("blockdev", Value::Object(node).to_string())))
}

/// Whether an option defines a node of this name, at any depth.
pub(in crate::guest) fn is_node(line: &CommandLine, name: &str) -> bool {
    let drives = line.options().filter(|option| ["blockdev", "drive"].contains(&option.name()));
    let mut leaves = drives.flat_map(|option| Spec::parse(option.value()).leaves());
    leaves.any(|(key, value)| key.rsplit('.').next() == Some("node-name") && value == name)
}

/// Removes the nodes below those that these options define, if no option uses them any more.
/// Returns the options that are gone.
pub(in crate::guest) fn take_unused(
    line: &mut CommandLine,
    above: &[CommandOption],
) -> Vec<CommandOption> {
    let below = above.iter().flat_map(|option| children(&tree(&Spec::parse(option.value()))));
    drop_unused(line, below.collect())
}

/// Removes the named nodes, and those below them, if no option uses them any more. Returns the
/// options that are gone.
fn drop_unused(line: &mut CommandLine, mut names: Vec<String>) -> Vec<CommandOption> {
    let mut dropped = Vec::new();
    while let Some(name) = names.pop() {
        if is_used(line, &name) {
            continue;
        }
        let Some(at) = find_node(line, &name) else { continue };
        if let Arg::Option(option) = line.args.remove(at) {
            names.extend(children(&tree(&Spec::parse(option.value()))));
            dropped.push(option);
        }
    }
    dropped
}

/// The node in place of `tree`: the overlay, with what was said of how the disk is read
/// and written; or a filter, such as a throttle, over the overlay.
fn with_overlay(
    line: &CommandLine,
    tree: &Map<String, Value>,
    overlay: &Overlay,
    below: &mut Vec<String>,
    depth: usize,
) -> Result<Map<String, Value>, GuestError> {
    const FILTERS: [&str; 2] = ["throttle", "copy-on-read"];
    let driver = tree.get("driver").and_then(Value::as_str).unwrap_or_default();
    if FILTERS.contains(&driver)
        && depth < MAX_DEPTH
        && let Some(child) = child(line, tree, below)
    {
        let mut filter = tree.clone();
        let node = with_overlay(line, &child, overlay, below, depth + 1)?;
        filter.insert("file".into(), Value::Object(node));
        return Ok(filter);
    }
    below.extend(children(tree));
    let levels = levels(line, tree);
    let told = |key: &str| levels.iter().find_map(|level| level.get(key).cloned());
    let aio = told("aio");
    let mut node = overlay.node(aio.as_ref().and_then(Value::as_str))?;
    // Said of the node itself, they are about the guest's requests.
    for key in ["node-name", "discard", "detect-zeroes"] {
        if let Some(value) = tree.get(key) {
            node.insert(key.into(), value.clone());
        }
    }
    if let Some(cache) = told("cache") {
        node.insert("cache".into(), cache);
    }
    Ok(node)
}

/// A node and those below it by way of `file`, as far as the command line says.
fn levels(line: &CommandLine, tree: &Map<String, Value>) -> Vec<Map<String, Value>> {
    let mut levels = vec![tree.clone()];
    while let Some(last) = levels.last()
        && let Some(next) = child(line, last, &mut Vec::new())
        && levels.len() < MAX_DEPTH
    {
        levels.push(next);
    }
    levels
}

/// The node below by way of `file`. Notes its name if it is a node of its own.
fn child(
    line: &CommandLine,
    tree: &Map<String, Value>,
    named: &mut Vec<String>,
) -> Option<Map<String, Value>> {
    match tree.get("file")? {
        Value::Object(child) => Some(child.clone()),
        Value::String(name) => {
            named.push(name.clone());
            match &line.args[find_node(line, name)?] {
                Arg::Option(option) => Some(self::tree(&Spec::parse(option.value()))),
                Arg::Image(_) => None,
            }
        }
        _ => None,
    }
}

/// The `-blockdev` of this name.
fn find_node(line: &CommandLine, name: &str) -> Option<usize> {
    line.args.iter().position(|arg| match arg {
        Arg::Option(option) if option.name() == "blockdev" => {
            Spec::parse(option.value()).get("node-name") == Some(name)
        }
        _ => false,
    })
}

/// The names of nodes that a node refers to, at any depth.
fn children(tree: &Map<String, Value>) -> Vec<String> {
    let mut names = Vec::new();
    for (key, value) in tree {
        match value {
            Value::String(name) if ["file", "backing", "data-file"].contains(&key.as_str()) => {
                names.push(name.clone());
            }
            Value::Object(members) => names.extend(children(members)),
            _ => {}
        }
    }
    names
}

/// Whether an option speaks of a node, other than by defining it.
pub(in crate::guest) fn is_used(line: &CommandLine, name: &str) -> bool {
    line.options().any(|option| {
        let mut leaves = Spec::parse(option.value()).leaves().into_iter();
        option.name() != "append"
            && leaves.any(|(key, value)| {
                let key = key.rsplit('.').next().unwrap_or_default();
                value == name && !["node-name", "driver", "id"].contains(&key)
            })
    })
}

/// A `-blockdev`'s value as JSON has it, whichever way it was written. Switches are
/// JSON's there; other values stay text, which `children` and the like expect.
fn tree(spec: &Spec) -> Map<String, Value> {
    let params = match spec {
        Spec::Json(Value::Object(members)) => return members.clone(),
        Spec::Json(_) => return Map::new(),
        Spec::Params(params) => params,
    };
    let mut tree = Map::new();
    for (at, item) in params.items().iter().enumerate() {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, value),
            None if at == 0 => ("driver", item.as_str()),
            None => continue,
        };
        insert(&mut tree, key, value);
    }
    tree
}

fn insert(tree: &mut Map<String, Value>, key: &str, value: &str) {
    match key.split_once('.') {
        None => {
            let value = match value {
                "on" | "off" if key != "detect-zeroes" => Value::Bool(value == "on"),
                text => Value::String(text.to_owned()),
            };
            tree.insert(key.to_owned(), value);
        }
        Some((first, rest)) => {
            let member = tree.entry(first).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(members) = member {
                insert(members, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::guest::OverlayOptions;
    use crate::machine::DiskFile;

    fn disk(device: &str, node: Option<&str>) -> Disk {
        let file =
            DiskFile { path: "/vm/d.raw".into(), format: "raw".into(), ..Default::default() };
        Disk {
            device: device.into(),
            node: node.map(Into::into),
            size: 1 << 20,
            chain: vec![file],
            ..Disk::default()
        }
    }

    /// The command line with the overlay in it, and what stands for the overlay.
    fn with(disk: &Disk, text: &str) -> (Vec<String>, Map<String, Value>) {
        let mut line = CommandLine::parse(text.split_whitespace());
        let options = OverlayOptions { ephemeral: true, ..OverlayOptions::default() };
        let overlay = Overlay::new(disk, 0, disk.chain.clone(), &options).unwrap();
        let at = find(&line, disk, Path::new("/vm")).unwrap();
        let node = overlay.node(None).unwrap();
        put(&mut line, &[(at, overlay)]).unwrap();
        (line.into_args(), node)
    }

    /// A drive's value with the overlay as its file.
    #[track_caller]
    fn check_drive(disk: &Disk, text: &str, before: &str, items: &str) {
        let (args, node) = with(disk, text);
        let json = Value::Object(node).to_string().replace(',', ",,");
        let expected = format!("{before}-drive {items}file=json:{json}");
        assert_eq!(args.join(" "), expected);
    }

    #[test]
    fn a_drive_is_found_by_its_id_its_node_or_its_file() {
        let value = "-drive if=none,id=d0,cache=none,aio=native,node-name=n,file=/x,format=raw";
        let kept = "if=none,id=d0,cache=none,aio=native,node-name=n,";
        check_drive(&disk("d0", None), value, "", kept);
        check_drive(&disk("", Some("n")), value, "", kept);
        let value = "-m 1 -drive if=virtio,file=d.raw,format=raw";
        check_drive(&disk("virtio0", None), value, "-m 1 ", "if=virtio,");
        let value = "-drive if=virtio,driver=raw,file.driver=file,file.filename=/vm/d.raw";
        check_drive(&disk("virtio0", None), value, "", "if=virtio,");
        check_drive(&disk("ide0-hd1", None), "-hdb /vm/d.raw", "", "index=1,media=disk,");
        check_drive(&disk("ide0-hd0", None), "/vm/d.raw", "", "index=0,media=disk,");
        check_drive(&disk("pflash0", None), "-pflash /vm/d.raw", "", "if=pflash,");
        let other = CommandLine::parse(["-drive", "id=d1,file=/other", "-hda", "/vm/another"]);
        let error = find(&other, &disk("d0", None), Path::new("/vm")).unwrap_err().to_string();
        assert!(error.contains("d0") && error.contains("-readconfig"), "{error}");
    }

    #[test]
    fn a_drive_on_the_base_that_disks_share_is_not_taken_for_theirs() {
        let mut disk = disk("virtio1", None);
        let base = DiskFile { path: "/vm/base.raw".into(), ..disk.chain[0].clone() };
        disk.chain.push(base.clone());
        let shared = "-drive if=virtio,file=/vm/base.raw,readonly=on ";
        let value = format!("{shared}-drive if=virtio,file=/vm/d.raw");
        check_drive(&disk, &value, shared, "if=virtio,");
        // An earlier snapshot may have put a file on top.
        disk.chain.insert(0, DiskFile { path: "/vm/d.snap-1.qcow2".into(), ..base });
        check_drive(&disk, &value, shared, "if=virtio,");
    }

    #[test]
    fn an_overlay_of_an_earlier_revert_makes_way() {
        let mut disk = disk("virtio0", None);
        let (args, _) = with(&disk, "-drive if=virtio,file=/vm/d.raw,format=raw");
        let overlay = DiskFile { path: "/dev/fdset/900000".into(), ..disk.chain[0].clone() };
        disk.chain.insert(0, DiskFile { format: "qcow2".into(), ..overlay });
        let (again, _) = with(&disk, &args.join(" "));
        assert_eq!(again.len(), 2);
        assert!(again[1].contains("/dev/fdset/900000") && again[1].contains("/vm/d.raw"));
    }

    #[track_caller]
    fn check_blockdev(text: &str, before: &str, added: &Value, after: &str) {
        let (args, mut node) = with(&disk("", Some("d")), text);
        let aio = added.get("aio").cloned();
        for (key, value) in added.as_object().unwrap() {
            if key != "aio" {
                node.insert(key.clone(), value.clone());
            }
        }
        if let Some(aio) = aio {
            node["file"]["aio"] = aio.clone();
            node["backing"]["file"]["aio"] = aio;
        }
        let node = Value::Object(node);
        assert_eq!(args.join(" "), format!("{before}-blockdev {node}{after}"));
    }

    #[test]
    fn a_node_keeps_its_name_and_how_it_is_read() {
        check_blockdev(
            "-blockdev driver=file,node-name=f,filename=/vm/d.raw,cache.direct=on,aio=native \
             -blockdev raw,node-name=d,file=f,discard=unmap -device virtio-blk,drive=d",
            "",
            &json!({
                "node-name": "d", "discard": "unmap", "cache": {"direct": true}, "aio": "native",
            }),
            " -device virtio-blk,drive=d",
        );
        check_blockdev(
            r#"-S -blockdev {"driver":"qcow2","node-name":"d","file":{"driver":"file","filename":"/vm/d.raw"}}"#,
            "-S ",
            &json!({"node-name": "d"}),
            "",
        );
        // The device uses the file as it is.
        check_blockdev(
            "-blockdev driver=file,node-name=d,filename=/vm/d.raw,aio=io_uring",
            "",
            &json!({"node-name": "d", "aio": "io_uring"}),
            "",
        );
    }

    #[test]
    fn nodes_below_go_with_those_below_them_unless_others_use_them() {
        let below = "-blockdev file,node-name=b-file,filename=/vm/b \
                     -blockdev qcow2,node-name=b,file=b-file \
                     -blockdev file,node-name=f,filename=/vm/d";
        let top = "-blockdev qcow2,node-name=d,file=f,backing=b";
        check_blockdev(&format!("{below} {top}"), "", &json!({"node-name": "d"}), "");
        let (args, _) =
            with(&disk("", Some("d")), &format!("{below} {top} -device scsi-hd,drive=b"));
        let args = args.join(" ");
        assert!(args.contains("node-name=b,") && args.contains("node-name=b-file"), "{args}");
        assert!(!args.contains("node-name=f,"), "{args}");
    }

    #[test]
    fn a_throttle_stays_over_the_overlay() {
        let (args, mut node) = with(
            &disk("", Some("d")),
            "-blockdev file,node-name=f,filename=/vm/d.raw -blockdev raw,node-name=r,file=f \
             -blockdev throttle,node-name=d,throttle-group=g,file=r",
        );
        node.insert("node-name".into(), json!("r"));
        let throttle =
            json!({"driver": "throttle", "node-name": "d", "throttle-group": "g", "file": node});
        assert_eq!(args, ["-blockdev".to_owned(), throttle.to_string()]);
    }
}
