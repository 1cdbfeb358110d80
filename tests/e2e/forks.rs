//! Guests that are forked while they run: clones and the guest itself go on from one moment, each
//! with its memory and disks right.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;

use serde_json::Value;

use crate::harness::{Dir, Ended, Reverted, check, send_signal, text};
use crate::killed::{ask_disks, boot};
use crate::support::{Fill, Guest, GuestOptions, Qemu, Result};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    disks_are_those_of_the_moment
}

tests_on_both_at_length! {
    clones_and_their_source_go_on
}

tests! {
    an_image_is_kept_as_well
    clones_that_lose_their_source_are_stopped_and_named
}

/// The clones that a fork has told to run, by their names.
fn clones(dir: &Dir, ended: &Ended) -> Result<BTreeMap<String, Reverted>> {
    let running = ended.events.iter().filter(|event| event["event"] == "running");
    let take = |event: &Value| {
        let name = event["name"].as_str().ok_or("a clone without a name")?;
        let pid = event["qemu_pid"].as_u64().ok_or("a clone without a process")?;
        assert!(event["since_moment_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{event}");
        let qmp = event["qmp"].as_str().ok_or("a clone without a control socket")?;
        assert!(std::fs::metadata(qmp)?.file_type().is_socket());
        Ok((name.to_owned(), Reverted::alone(pid as u32, &dir.path(name))?))
    };
    running.map(take).collect()
}

/// A guest that rewrites its memory all the time.
fn busy(qemu: Qemu) -> GuestOptions {
    GuestOptions { qemu, fill: Fill::Mib(96), rate: 2000, writers: 2, ..GuestOptions::default() }
}

fn clones_and_their_source_go_on(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&busy(qemu))?;
    let nonce = guest.oracle.nonce()?;
    let fork = ["fork", "--qmp", text(&guest.qmp_path)];
    let own = dir.path("{name}");
    let fork = dir.snapback(&fork).with(&["--count", "2", "--name", "f{n}", "--dir", text(&own)]);
    let ended = fork.succeed()?;
    let told: Vec<&str> = ended.events.iter().filter_map(|event| event["event"].as_str()).collect();
    let first = |name: &str| told.iter().position(|event| *event == name);
    assert!(first("moment") < first("running") && first("running") < first("resident"), "{told:?}");
    let mut clones = clones(dir, &ended)?;
    assert_eq!(clones.keys().collect::<Vec<_>>(), ["f1", "f2"]);
    for clone in clones.values_mut() {
        clone.check(&nonce)?;
    }
    assert_eq!(guest.oracle.nonce()?, nonce);
    check(&mut guest)?;
    // It can be forked again, and be saved.
    drop(clones);
    let own = dir.path("again");
    let fork = ["fork", "--qmp", text(&guest.qmp_path), "--name", "again", "--dir", text(&own)];
    let ended = dir.snapback(&fork).succeed()?;
    for clone in self::clones(dir, &ended)?.values_mut() {
        clone.check(&nonce)?;
    }
    dir.save(&guest, "vm.snap").succeed()?;
    check(&mut guest)
}

fn disks_are_those_of_the_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = boot(dir, qemu)?;
    ask_disks(&mut guest, "write")?;
    let nonce = guest.oracle.nonce()?;
    let own = dir.path("{name}");
    let fork = ["fork", "--qmp", text(&guest.qmp_path), "--count", "2", "--dir", text(&own)];
    let ended = dir.snapback(&fork).succeed()?;
    let mut clones = clones(dir, &ended)?;
    assert_eq!(clones.len(), 2);
    for clone in clones.values_mut() {
        ask_disks(clone, "check")?;
        ask_disks(clone, "write")?;
        clone.check(&nonce)?;
    }
    // What they have written is their own.
    ask_disks(&mut guest, "check")?;
    ask_disks(&mut guest, "write")?;
    check(&mut guest)?;
    for clone in clones.values_mut() {
        ask_disks(clone, "check")?;
    }
    Ok(())
}

fn an_image_is_kept_as_well(dir: &Dir) -> Result<()> {
    let mut guest = Guest::boot(&busy(Qemu::V10))?;
    let nonce = guest.oracle.nonce()?;
    let (image, own) = (dir.path("vm.snap"), dir.path("clone"));
    let fork = ["fork", "--qmp", text(&guest.qmp_path), "--keep", text(&image)];
    let ended = dir.snapback(&fork).with(&["--name", "clone", "--dir", text(&own)]).succeed()?;
    ended.event("saved")?;
    for clone in clones(dir, &ended)?.values_mut() {
        clone.check(&nonce)?;
    }
    let mut reverted = dir.reverted(&image, &guest.dir, "reverted")?;
    reverted.check(&nonce)?;
    reverted.resident()?;
    Ok(())
}

fn clones_that_lose_their_source_are_stopped_and_named(dir: &Dir) -> Result<()> {
    // Large enough that it is not captured when its clone runs.
    let options = GuestOptions { mib: 1024, fill: Fill::Mib(600), ..busy(Qemu::V10) };
    let guest = Guest::boot(&options)?;
    let own = dir.path("clone");
    let fork = ["fork", "--qmp", text(&guest.qmp_path), "--name", "clone", "--dir", text(&own)];
    let mut fork = dir.snapback(&fork).start()?;
    fork.wait("moment")?;
    send_signal(guest.pid, libc::SIGKILL);
    let ended = fork.end()?;
    // Either all was captured before, or the clone does not go on.
    match ended.code {
        Some(0) => drop(clones(dir, &ended)?),
        _ => assert!(ended.stderr.contains("QEMU") || ended.stderr.contains("lost"), "{ended:?}"),
    }
    Ok(())
}
