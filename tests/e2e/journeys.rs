//! Saved, brought back, and nothing is amiss.

use std::fs;

use serde_json::{Value, json};

use crate::harness::{Dir, Reverted, check};
use crate::shared::{MIB, borrow, options, shared};
use crate::support::{
    Guest, GuestOptions, Qemu, Result, SOON, cont, pmemsave, qmp, query_status, stop,
};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_guest_in_full_swing_is_saved_and_comes_back
    a_guest_that_ran_is_reverted_paused
    one_image_is_reverted_twice_at_once
    a_reverted_guest_is_saved_and_reverted_again
}

tests_on_both_at_length! {
    a_paused_guest_is_saved_byte_for_byte
    a_guest_is_saved_three_times_in_a_row
}

tests! {
    a_save_tells_how_long_qemu_waited
}

fn a_guest_in_full_swing_is_saved_and_comes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (machine, vcpus) = if qemu == Qemu::V7 { ("pc", 1) } else { ("q35", 4) };
    let mut guest = Guest::boot(&GuestOptions {
        vcpus,
        machine: machine.into(),
        writers: 3,
        rate: 0,
        ..options(qemu)
    })?;
    let nonce = guest.oracle.nonce()?;
    let capabilities = query(&guest.qmp_path, "query-migrate-capabilities")?;
    let before = guest.log.wait_beat(0, SOON)?;

    let mut save = dir.save(&guest, "vm.snap").start()?;
    save.wait("moment")?;
    let after = guest.log.last_beat().unwrap();
    let ended = save.succeed()?;
    assert_eq!(ended.steps(), ["checked", "moment", "saved"]);
    assert!(ended.event("moment")?["pause_ms"].as_f64().is_some_and(|ms| ms > 0.0));
    assert_eq!(dir.names(".")?, ["vm.snap"]);
    assert_eq!(query_status(&guest.qmp_path)?, "running");
    assert_eq!(query(&guest.qmp_path, "query-migrate-capabilities")?, capabilities);
    check(&mut guest)?;

    let mut reverted = dir.reverted(&dir.path("vm.snap"), &guest.dir, "reverted")?;
    reverted.check(&nonce)?;
    let ended = reverted.resident()?;
    assert_eq!(ended.steps(), ["qemu_ready", "running", "resident"]);
    goes_on_from_the_moment(&reverted, before, after);
    stands_by_itself(dir, &reverted, "reverted")?;
    assert_eq!(query(&reverted.qmp_path, "query-migrate-capabilities")?, capabilities);
    reverted.check(&nonce)?;
    check(&mut guest)
}

/// More than the buffers hold, at a rate at which QEMU has sent all long before: it has
/// to wait, and so has whoever writes in the guest.
fn a_save_tells_how_long_qemu_waited(dir: &Dir) -> Result<()> {
    let mut guest = borrow(Qemu::V10)?;
    let slow = ["--bandwidth", "10M", "--compress", "none"];
    let ended = dir.save(&guest, "vm.snap").with(&slow).succeed()?;
    let saved = ended.event("saved")?;
    assert!(saved["pages"].as_u64().is_some_and(|pages| pages * 4096 > 64 << 20), "{saved}");
    assert!(saved["stalled_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{saved}");
    dir.snapback(&["verify", "vm.snap"]).succeed()?;
    check(&mut guest)
}

fn query(socket: &std::path::Path, command: &str) -> Result<Value> {
    qmp(socket, command, json!({}))
}

/// The guest's first heartbeat after a revert follows the last one before the moment,
/// which lay between `before` and `after`.
fn goes_on_from_the_moment(
    reverted: &Reverted,
    before: crate::support::Beat,
    after: crate::support::Beat,
) {
    let beats = reverted.log.beats();
    let first = beats[0];
    // The moment may have cut a heartbeat in two, of which neither half counts.
    assert!(
        before.number < first.number && first.number <= after.number + 2,
        "{first:?} {after:?}"
    );
    assert!(before.uptime_ms < first.uptime_ms);
    for pair in beats.windows(2) {
        assert_eq!(pair[0].number + 1, pair[1].number);
        // Those that were late come in the same millisecond.
        assert!(pair[0].uptime_ms <= pair[1].uptime_ms);
    }
}

/// QEMU is all that is left of a revert, and it is as one that was never reverted.
fn stands_by_itself(dir: &Dir, guest: &Reverted, folder: &str) -> Result<()> {
    let processes: Vec<_> = dir.processes().into_iter().map(|(pid, _)| pid).collect();
    assert_eq!(processes, [guest.pid]);
    assert_eq!(dir.names(folder)?, ["qmp.sock", "serial0.log", "serial1.sock"]);
    assert_eq!(dir.names(".")?, [folder, "vm.snap", "vm.snap.ws"]);
    for entry in fs::read_dir(format!("/proc/{}/fd", guest.pid))? {
        // Descriptors come and go.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        assert_ne!(target.to_string_lossy(), "anon_inode:[userfaultfd]");
    }
    // Flag `um`: memory that userfaultfd watches for missing pages (proc_pid_smaps(5)).
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid))?;
    let mut flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    assert!(!flags.any(|flags| flags.split_whitespace().any(|flag| flag == "um")));
    assert_eq!(query(&guest.qmp_path, "query-migrate")?["status"], "completed");
    assert_eq!(query_status(&guest.qmp_path)?, "running");
    Ok(())
}

fn a_paused_guest_is_saved_byte_for_byte(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (machine, vcpus) = if qemu == Qemu::V7 { ("q35", 4) } else { ("pc", 1) };
    let machine = machine.into();
    let mut guest = Guest::boot(&GuestOptions { vcpus, machine, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    stop(&guest.qmp_path)?;
    let ended = dir.save(&guest, "vm.snap").succeed()?;
    assert_eq!(ended.event("moment")?["pause_ms"], Value::Null);
    let paused = |status: &str| ["paused", "postmigrate"].contains(&status);
    assert!(paused(&query_status(&guest.qmp_path)?));

    let to = dir.make("reverted")?;
    let revert = dir.revert(&dir.path("vm.snap"), &guest.dir, &to);
    let mut reverted = Reverted::of(revert, &to)?;
    reverted.resident()?;
    assert!(paused(&query_status(&reverted.qmp_path)?));
    // Below 3 GiB, RAM begins at 0 and has no hole.
    let saved = |socket, name| {
        let file = dir.path(name);
        pmemsave(socket, 0, MIB << 20, &file)?;
        Ok::<_, crate::support::Error>(fs::read(file)?)
    };
    let (before, after) = (saved(&guest.qmp_path, "before")?, saved(&reverted.qmp_path, "after")?);
    assert_eq!(before.len() as u64, MIB << 20);
    let differs = (0..before.len()).find(|&at| before[at] != after[at]);
    assert!(differs.is_none(), "they differ first at {differs:x?}");

    cont(&guest.qmp_path)?;
    cont(&reverted.qmp_path)?;
    check(&mut guest)?;
    reverted.check(&nonce)
}

fn a_guest_that_ran_is_reverted_paused(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--", "-S"]);
    let mut reverted = Reverted::of(revert, &to)?;
    reverted.resident()?;
    assert_ne!(query_status(&reverted.qmp_path)?, "running");
    assert_eq!(reverted.log.text(), "");
    cont(&reverted.qmp_path)?;
    reverted.check(&shared.nonce)
}

fn one_image_is_reverted_twice_at_once(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let by = |way: &str, name: &str| {
        let to = dir.make(name)?;
        Reverted::of(dir.revert(&shared.image, &shared.from, &to).with(&["--place", way]), &to)
    };
    let mut first = by("auto", "first")?;
    let mut second = by("socket", "second")?;
    first.check(&shared.nonce)?;
    second.check(&shared.nonce)?;
    // Straight into memory is what is chosen where it can be had, as here.
    assert_eq!(first.resident()?.event("placing")?["way"], "uffd");
    assert_eq!(second.resident()?.event("placing")?["way"], "socket");
    first.check(&shared.nonce)?;
    second.check(&shared.nonce)
}

fn a_reverted_guest_is_saved_and_reverted_again(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let mut first = dir.reverted(&shared.image, &shared.from, "first")?;
    first.resident()?;
    // Something that only this one remembers.
    first.oracle.set_writers(0, 0)?;
    let sum = first.oracle.sum()?;
    dir.save(&first, "again.snap").succeed()?;
    first.check(&shared.nonce)?;
    let mut second = dir.reverted(&dir.path("again.snap"), &first.dir, "second")?;
    assert_eq!(second.oracle.sum()?, sum);
    second.resident()?;
    second.oracle.set_writers(2, 1000)?;
    second.check(&shared.nonce)?;
    first.check(&shared.nonce)
}

fn a_guest_is_saved_three_times_in_a_row(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&GuestOptions { rate: 0, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    dir.save(&guest, "vm.snap").succeed()?;
    dir.save(&guest, "other.snap").succeed()?;
    dir.save(&guest, "vm.snap").with(&["--force"]).succeed()?;
    check(&mut guest)?;
    assert_eq!(dir.names(".")?, ["other.snap", "vm.snap"]);
    for (image, folder) in [("other.snap", "first"), ("vm.snap", "second")] {
        let mut reverted = dir.reverted(&dir.path(image), &guest.dir, folder)?;
        reverted.resident()?;
        reverted.check(&nonce)?;
    }
    Ok(())
}
