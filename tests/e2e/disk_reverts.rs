//! Guests with disks, reverted: each with its own, none with another's, and never with one
//! that is not what it was.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::harness::{Dir, Reverted, check, text, wait_gone};
use crate::shared::options;
use crate::support::{
    Bus, Contact, Disk, Format, Given, Guest, GuestOptions, Pidfd, Qemu, Result, SOON, SerialLog,
    wait_for,
};
use crate::tests_on_both_at_length;

tests_on_both_at_length! {
    disks_are_reverted_side_by_side
}

/// Where the guest finds its disks.
const DEVICES: [&str; 5] = ["vda", "vdb", "vdc", "sda", "sdb"];

/// Pages of each disk that are written.
const PAGES: u32 = 16;

fn disks(dir: &Dir) -> Result<Vec<Disk>> {
    fs::create_dir(dir.path("disks"))?;
    let disk = |id: &str, bus, given, format| {
        let file = dir.path("disks").join(id);
        Disk { id: id.into(), bus, given, file, format }
    };
    let disks = vec![
        disk("blk", Bus::VirtioBlk, Given::Blockdev, Format::Raw),
        disk("auto", Bus::VirtioBlk, Given::DriveIf, Format::Qcow2),
        disk("scsi", Bus::VirtioScsi, Given::Drive, Format::Qcow2),
        disk("ide", Bus::Ide, Given::BlockdevJson, Format::Raw),
        disk("more", Bus::VirtioBlk, Given::Blockdev, Format::Qcow2),
    ];
    disks.iter().try_for_each(|disk| disk.make(8))?;
    Ok(disks)
}

/// Each disk's own.
fn seeds(seed: u32) -> impl Iterator<Item = (&'static str, u32)> {
    DEVICES.into_iter().zip(seed * 10..)
}

fn write(guest: &mut Contact, seed: u32) -> Result<()> {
    for (device, seed) in seeds(seed) {
        guest.oracle.ask(&format!("disk write /dev/{device} {PAGES} {seed}"))?;
    }
    Ok(())
}

#[track_caller]
fn holds(guest: &mut Contact, seed: u32) -> Result<()> {
    for (device, seed) in seeds(seed) {
        let answer = guest.oracle.ask(&format!("disk check /dev/{device} {PAGES} {seed}"))?;
        assert_eq!(answer, "ok", "{device}");
    }
    Ok(())
}

/// Every file with its length and the time of its last change.
fn stamps(files: &[PathBuf]) -> Result<Vec<(u64, SystemTime)>> {
    let stamp = |file: &PathBuf| {
        let meta = fs::metadata(file)?;
        Ok((meta.len(), meta.modified()?))
    };
    files.iter().map(stamp).collect()
}

fn paths(events: &[Value], field: &str) -> Vec<PathBuf> {
    let disks = events.iter().filter(|event| event["event"] == "disk");
    disks.filter_map(|event| Some(event[field].as_str()?.into())).collect()
}

fn disks_are_reverted_side_by_side(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disks = disks(dir)?;
    let mut guest = Guest::boot(&GuestOptions { disks, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    write(&mut guest, 1)?;
    let image = dir.path("vm.snap");
    dir.save(&guest, "vm.snap").succeed()?;
    // The original goes on, over the same frozen files.
    write(&mut guest, 2)?;

    // One keeps what it writes, in a folder of its own choice.
    let overlays = dir.make("overlays")?;
    let to = dir.make("first")?;
    let revert = dir.revert(&image, &guest.dir, &to).with(&["--overlay-dir", text(&overlays)]);
    let mut first = Reverted::of(revert, &to)?;
    holds(&mut first, 1)?;
    let ended = first.resident()?;
    let frozen = paths(&ended.events, "frozen");
    let before = stamps(&frozen)?;
    let own = paths(&ended.events, "overlay");
    assert_eq!((frozen.len(), own.len(), dir.names("overlays")?.len()), (5, 5, 5));
    for overlay in &own {
        assert_eq!(overlay.parent(), Some(&*overlays));
        assert_eq!(fs::metadata(overlay)?.permissions().mode() & 0o777, 0o600);
    }

    // One leaves nothing, although nobody stays to clean up.
    let names = dir.names(".")?;
    let to = dir.make("second")?;
    let revert = dir.revert(&image, &guest.dir, &to).with(&["--ephemeral", "--detach"]);
    let ended = revert.succeed()?;
    assert_eq!(paths(&ended.events, "overlay").len(), 0);
    let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")? as u32;
    let process = Pidfd::open(pid)?;
    let server = ended.event("detached")?["server_pid"].as_u64().ok_or("no server")? as u32;
    let mut second = crate::support::Attached::to(pid, &to)?;
    second.log = SerialLog::whole(&to.join("serial0.log"));

    holds(&mut second, 1)?;
    write(&mut first, 3)?;
    write(&mut second, 4)?;
    holds(&mut guest, 2)?;
    holds(&mut first, 3)?;
    holds(&mut second, 4)?;
    first.check(&nonce)?;
    check(&mut second)?;
    wait_gone(server)?;
    process.kill()?;
    drop(second);
    let after = dir.names(".")?;
    let left: Vec<_> = after.iter().filter(|name| !names.contains(name)).collect();
    assert!(
        left.iter().all(|name| ["second", "snapback", "vm.snap.ws"].contains(&name.as_str())),
        "{left:?}"
    );
    assert_eq!(stamps(&frozen)?, before);

    // A reverted guest is a guest like any other.
    let again = dir.path("again.snap");
    dir.save(&first, "again.snap").succeed()?;
    write(&mut first, 5)?;
    let mut third = dir.reverted(&again, &first.dir, "third")?;
    third.resident()?;
    holds(&mut third, 3)?;
    assert_eq!(stamps(&frozen)?, before);

    // A guest that only shows its working set writes nowhere.
    let names = dir.names(".")?;
    dir.snapback(&["working-set", text(&image), "--harvest", "--window", "1"]).succeed()?;
    assert_eq!((stamps(&frozen)?, dir.names(".")?), (before, names));

    let from = guest.dir.clone();
    drop((third, first));
    let _folder = guest.kill();
    only_the_right_disks_are_taken(dir, &image, &from, &frozen)
}

/// A disk that is gone, changed, or another is refused by its name, before anything starts.
fn only_the_right_disks_are_taken(
    dir: &Dir,
    image: &Path,
    from: &Path,
    frozen: &[PathBuf],
) -> Result<()> {
    let names = dir.names(".")?;
    let revert = |name: &str, args: &[&str]| {
        let to = dir.path("refused").join(name);
        fs::create_dir_all(&to)?;
        Ok::<_, crate::support::Error>(dir.revert(image, from, &to).with(args))
    };
    let at = |id: &str| {
        let found = frozen.iter().find(|file| file.ends_with(format!("disks/{id}")));
        found.cloned().ok_or_else(|| format!("{id} is not among {frozen:?}"))
    };
    let elsewhere = dir.path("elsewhere");

    // Moved: where it is has to be said, and only the same will do.
    let blk = at("blk")?;
    fs::rename(&blk, &elsewhere)?;
    let refusal = revert("missing", &[])?.fail()?;
    assert!(refusal.contains(text(&blk)) && refusal.contains("is not there"), "{refusal}");
    assert!(refusal.contains("--disk blk="), "{refusal}");
    let ide = format!("blk={}", text(&at("ide")?));
    let refusal = revert("another", &["--disk", &ide])?.fail()?;
    assert!(refusal.contains("its content is another"), "{refusal}");
    let moved = format!("blk={}", text(&elsewhere));
    let refusal = revert("unknown", &["--disk", &moved.replace("blk", "kbl")])?.fail()?;
    assert!(refusal.contains("no captured disk") && refusal.contains("more"), "{refusal}");
    let to = dir.make("moved")?;
    let command = dir.revert(image, from, &to).with(&["--ephemeral", "--disk", &moved]);
    let mut reverted = Reverted::of(command, &to)?;
    reverted.resident()?;
    holds(&mut reverted, 1)?;
    drop(reverted);
    fs::rename(&elsewhere, &blk)?;

    // Written to, if only with what was there.
    let more = at("more")?;
    let modified = fs::metadata(&more)?.modified()?;
    let file = fs::File::options().write(true).open(&more)?;
    file.set_modified(modified + Duration::from_secs(1))?;
    let refusal = revert("touched", &[])?.fail()?;
    assert!(refusal.contains(text(&more)) && refusal.contains("was written to"), "{refusal}");
    file.set_modified(modified)?;

    // No room for what the guest would write.
    let refusal = revert("nowhere", &["--overlay-dir", "/nowhere/at/all"])?.fail()?;
    assert!(refusal.contains("/nowhere/at/all"), "{refusal}");

    fs::remove_dir_all(dir.path("refused"))?;
    fs::remove_dir_all(dir.path("moved"))?;
    wait_for(SOON, "processes to end", || Ok(dir.processes().is_empty().then_some(())))?;
    assert_eq!(dir.names(".")?, names);
    Ok(())
}
