//! Captured disks, given to real QEMUs with fresh overlays.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::disks::stamp::stamp;
use super::*;
use crate::machine::{Disk, DiskFile, DiskRole, Machine};
use crate::qmp::Qmp;

const MIB: u64 = 1 << 20;

/// A machine with one disk: qcow2 on top of raw, as after an earlier snapshot.
fn machine(directory: &Path, device: &str, node: Option<&str>, args: &str) -> Machine {
    let (base, top) = (directory.join("base.raw"), directory.join("top.qcow2"));
    if !top.exists() {
        fs::write(&base, vec![1; MIB as usize]).unwrap();
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&base, &top]);
        assert!(create.status().unwrap().success());
    }
    let file = |path: &Path, format: &str| DiskFile {
        node: "#block1".into(),
        path: path.to_str().unwrap().into(),
        format: format.into(),
        stamp: Some(stamp(path).unwrap()),
    };
    let fixed = "-nodefaults -display none -machine pc -m 32 -no-user-config";
    let argv = format!("qemu-system-x86_64 {fixed} {args}");
    Machine {
        binary: "/usr/bin/qemu-system-x86_64".into(),
        argv: argv.split_whitespace().map(String::from).collect(),
        cwd: directory.to_str().unwrap().into(),
        disks: vec![Disk {
            device: device.into(),
            node: node.map(String::from),
            role: DiskRole::Captured,
            size: MIB,
            chain: vec![file(&top, "qcow2"), file(&base, "raw")],
            ..Disk::default()
        }],
        ..Machine::default()
    }
}

fn in_directory(directory: &Path, ephemeral: bool) -> RewriteOptions {
    let directory = Some(directory.to_owned());
    RewriteOptions {
        overlays: OverlayOptions {
            directory,
            prefix: Some("vm.snap".into()),
            ephemeral,
            ..OverlayOptions::default()
        },
        ..RewriteOptions::default()
    }
}

/// What a disk consists of as QEMU has it, the file on top first: driver, file, and
/// whether it is read only.
async fn layers(qmp: &Qmp) -> Vec<(String, String, bool)> {
    let devices = qmp.execute("query-block", ()).await.unwrap();
    let disks = devices.as_array().unwrap().iter().filter_map(|disk| disk.get("inserted"));
    let [disk] = disks.collect::<Vec<_>>()[..] else { panic!("{devices}") };
    let nodes = qmp.execute("query-named-block-nodes", json!({"flat": true})).await.unwrap();
    let nodes = nodes.as_array().unwrap();
    let mut layers = Vec::new();
    let mut image = &disk["image"];
    while image.is_object() {
        let file = image["filename"].as_str().unwrap();
        let of_file = |node: &&Value| {
            node["drv"] == image["format"] && node["image"]["filename"] == image["filename"]
        };
        let read_only = nodes.iter().find(of_file).unwrap()["ro"].as_bool().unwrap();
        layers.push((image["format"].as_str().unwrap().into(), file.into(), read_only));
        image = &image["backing-image"];
    }
    layers
}

#[tokio::test]
async fn a_disk_gets_its_overlay_however_it_is_given_and_others_may_have_theirs() {
    let directory = tempfile::tempdir().unwrap();
    let base = directory.path().join("base.raw").display().to_string();
    let text = |name: &str| directory.path().join(name).display().to_string();
    let device = "-device virtio-blk-pci,drive=d";
    let json =
        json!({"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": base}});
    let json = json.to_string();
    let ways = [
        (
            "d",
            None,
            format!("-drive if=none,id=d,file={base},format=raw,cache=none,aio=native {device}"),
        ),
        ("virtio0", None, "-drive if=virtio,file=base.raw,format=raw".into()),
        ("ide0-hd0", None, "-hda base.raw".into()),
        (
            "",
            Some("d"),
            format!(
                "-blockdev file,node-name=f,filename={base},cache.direct=on,aio=native \
                 -blockdev raw,node-name=d,file=f,detect-zeroes=on,discard=unmap {device}"
            ),
        ),
        ("", Some("d"), format!("-blockdev {json} {device}")),
        (
            "",
            Some("t"),
            format!(
                "-object throttle-group,id=g,x-iops-total=1000 -blockdev {json} \
                 -blockdev throttle,node-name=t,throttle-group=g,file=d \
                 -device virtio-blk-pci,drive=t"
            ),
        ),
    ];
    let mut running = Vec::new();
    for (name, node, args) in ways {
        let machine = machine(directory.path(), name, node, &args);
        for ephemeral in [false, true] {
            let plan = rewrite(&machine, &in_directory(directory.path(), ephemeral)).unwrap();
            let path = plan.overlays[0].path.clone();
            let (process, qmp) = Process::start(plan).await.unwrap();
            let mut layers = layers(&qmp).await;
            let overlay = layers.remove(0);
            let expected =
                [("qcow2".into(), text("top.qcow2"), true), ("raw".into(), base.clone(), true)];
            if node != Some("t") {
                let path: PathBuf = path.unwrap_or_else(|| "/dev/fdset/900000".into());
                assert_eq!(overlay, ("qcow2".into(), path.display().to_string(), false), "{args}");
            } else {
                // The filter's own; the disk follows.
                layers.remove(0);
            }
            assert_eq!(layers, expected, "{args}");
            // All at once: nobody takes anything from the others.
            running.push((process, qmp));
        }
    }
    let count = || fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(count(), 2 + running.len() / 2);
    drop(running);
    assert_eq!(count(), 2);
}

#[tokio::test]
async fn an_overlay_goes_with_a_qemu_that_fails_and_stays_with_one_that_is_let_go() {
    let directory = tempfile::tempdir().unwrap();
    let names = || fs::read_dir(directory.path()).unwrap().count();
    let disk = "-drive if=virtio,file=base.raw,format=raw";
    let fails = machine(directory.path(), "virtio0", None, &format!("{disk} -no-such-option"));
    let plan = rewrite(&fails, &in_directory(directory.path(), false)).unwrap();
    Process::start(plan).await.unwrap_err();
    assert_eq!(names(), 2);

    let works = machine(directory.path(), "virtio0", None, disk);
    for ephemeral in [false, true] {
        let plan = rewrite(&works, &in_directory(directory.path(), ephemeral)).unwrap();
        let (mut process, _qmp) = Process::start(plan).await.unwrap();
        process.keep_overlays();
        process.kill().await;
        drop(process);
        assert_eq!(names(), 3);
    }
    // A thrown-away guest writes to no disk at all.
    let isolated = RewriteOptions { isolated: true, ..in_directory(directory.path(), true) };
    let plan = rewrite(&works, &isolated).unwrap();
    let (_process, _qmp) = Process::start(plan).await.unwrap();
}

#[test]
fn two_disks_are_not_given_as_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut machine =
        machine(directory.path(), "virtio0", None, "-drive if=virtio,file=base.raw,format=raw");
    let other = Disk { device: "virtio1".into(), ..machine.disks[0].clone() };
    machine.disks.push(other);
    let refusal = rewrite(&machine, &in_directory(directory.path(), true)).unwrap_err().to_string();
    assert!(refusal.contains("virtio0") && refusal.contains("virtio1"), "{refusal}");
}
