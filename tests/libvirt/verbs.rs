//! A reverted domain is one of libvirt's own: its verbs work as on any other.

use std::fs;

use crate::harness::{Dir, text};
use crate::reverting::{Saved, options};
use crate::saving::save;
use crate::support::libvirt::Libvirt;
use crate::support::{Attached, Oracle, Result, SOON, wait_for};
use crate::tests;

tests! {
    a_reverted_domain_is_one_of_libvirts_own
}

fn a_reverted_domain_is_one_of_libvirts_own(dir: &Dir) -> Result<()> {
    let mut options = options("verbs");
    options.has_terminal = true;
    let saved = Saved::make(dir, &options, |_, _| Ok(()))?;
    saved.revert(dir, &["--replace"]).succeed()?;
    let attached = || Attached::to(saved.libvirt.pid_of(saved.name)?, &saved.folder);

    // Its console.
    let console = saved.libvirt.console(saved.name, &dir.path("printed"))?;
    wait_for(SOON, "the guest's heartbeat", || {
        Ok(console.printed.text().contains("BEAT ").then_some(()))
    })?;
    drop(console);

    // Snapshots of its disks, and block jobs.
    saved.virsh("snapshot-create-as", &["own", "--disk-only", "--no-metadata"])?;
    saved.virsh("blockcommit", &["vda", "--active", "--pivot", "--wait", "--shallow"])?;
    saved.virsh("snapshot-create-as", &["internal"])?;
    // A domain with snapshots does not migrate.
    saved.virsh("snapshot-delete", &["internal"])?;

    // Hot-plug, and out again.
    let disk = saved.folder.join("plugged.raw");
    fs::write(&disk, vec![0; 1 << 20])?;
    saved.virsh("attach-disk", &[text(&disk), "vdz", "--targetbus", "virtio", "--live"])?;
    saved.virsh("detach-disk", &["vdz", "--live"])?;
    wait_for(SOON, "the guest to let go of the disk", || {
        Ok((!saved.virsh("domblklist", &[])?.contains("vdz")).then_some(()))
    })?;

    // Saved and restored, by libvirt itself.
    let file = saved.libvirt.path("verbs.save");
    saved.virsh("save", &[text(&file)])?;
    saved.libvirt.virsh(&["restore", text(&file)])?;
    let mut guest = attached()?;
    saved.check(&mut guest)?;
    std::mem::forget(guest);

    // By us, and reverted once more: what the first start has left is not in the image's start.
    save(dir, saved.libvirt, saved.name, "again.snap").succeed()?;
    let again = Saved { image: dir.path("again.snap"), ..saved };
    let (mut guest, _) = again.replaced(dir)?;
    again.check(&mut guest)?;
    let live = again.virsh("dumpxml", &[])?;
    assert_eq!(live.matches("'-incoming'").count(), 1, "{live}");
    std::mem::forget(guest);

    // It moves to another host, and ends when it is told to.
    let elsewhere = migrate(&again)?;
    let mut oracle = Oracle::connect(&again.folder.join(MOVED))?;
    assert_eq!(oracle.nonce()?, again.nonce);
    assert!(oracle.check()?.ok());
    assert!(oracle.ask("disk check /dev/vda 64 7")?.starts_with("ok"));
    elsewhere.virsh(&["shutdown", again.name, "--mode", "acpi"])?;
    wait_for(SOON, "the guest to heed its power button", || {
        Ok((!elsewhere.virsh(&["list", "--name"])?.contains(again.name)).then_some(()))
    })?;

    // It starts anew as it was defined.
    again.virsh("start", &[])?;
    assert!(!again.virsh("dumpxml", &[])?.contains("incoming"));
    again.virsh("destroy", &[])?;
    Ok(())
}

/// The name of the socket of a guest that has moved to another host; the one that it has left takes
/// its own along.
const MOVED: &str = "moved.sock";

/// Migrates a domain, while it runs, to another libvirt.
fn migrate(saved: &Saved) -> Result<Libvirt> {
    let elsewhere = Libvirt::start_elsewhere()?;
    let xml = saved.folder.join("moved.xml");
    let here = saved.virsh("dumpxml", &["--migratable"])?;
    fs::write(&xml, here.replace("serial1.sock", MOVED))?;
    let uri = elsewhere.uri();
    let to = [&uri, "tcp://127.0.0.1", "--xml", text(&xml)];
    // The disks are the same files on both hosts.
    saved.virsh("migrate", &[&to[..], &["--live", "--unsafe"]].concat())?;
    assert!(!saved.libvirt.virsh(&["list", "--name"])?.contains(saved.name));
    Ok(elsewhere)
}
