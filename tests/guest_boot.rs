//! The oracle guest itself: before it may judge a revert, it has to boot on every
//! QEMU, find its memory good, and find damage where there is some.

mod support;

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use support::{
    Attached, Bus, Disk, Fill, Format, Given, Guest, GuestOptions, Oracle, Qemu, Qmp, Result, SOON,
    convert, process_gone, qmp, query_status, resident_kib, run, spawn_bound, wait_for,
};

fn booted(qemu: Qemu) -> Result<Guest> {
    Guest::boot(&GuestOptions { qemu, ..GuestOptions::default() })
}

fn tells_good_memory_from_damaged(qemu: Qemu) -> Result<()> {
    let mut guest = booted(qemu)?;
    let version = qmp(&guest.qmp_path, "query-version", json!({}))?;
    let (major, minor) = qemu.version();
    assert_eq!(version["qemu"]["major"], major, "{version}");
    assert_eq!(version["qemu"]["minor"], minor, "{version}");
    assert_eq!(query_status(&guest.qmp_path)?, "running");

    // It lives: beats come, writers write, and what they met is good.
    let beat = guest.log.wait_beat(0, SOON)?;
    assert_eq!(guest.log.wait_beat(beat.number, SOON)?.bad, 0);
    let verdict = guest.oracle.check()?;
    assert!(verdict.ok(), "{verdict:?}");
    assert!(verdict.pages > 20_000 && verdict.zero > 1_000, "{verdict:?}");
    assert!(guest.oracle.stat("rewritten")? > 0);

    // Standing still, it is the same whenever it is asked.
    guest.oracle.set_writers(0, 0)?;
    let sum = guest.oracle.sum()?;
    assert_eq!(guest.oracle.sum()?, sum);

    // One flipped bit is noticed, told at once, and not forgotten.
    guest.oracle.ask("damage 7 100")?;
    let verdict = guest.oracle.check()?;
    assert_eq!((verdict.bad, verdict.ok()), (1, false));
    assert_ne!(guest.oracle.sum()?, sum);
    let complaint = wait_for(SOON, "a complaint", || {
        guest.oracle.ping()?;
        Ok(guest.oracle.complaints().first().cloned())
    })?;
    assert!(complaint.contains("page=7 offset=800 "), "{complaint}");
    assert_eq!(guest.log.complaints(), [complaint]);
    Ok(())
}

#[test]
fn tells_good_memory_from_damaged_on_qemu_7() -> Result<()> {
    tells_good_memory_from_damaged(Qemu::V7)
}

#[test]
fn tells_good_memory_from_damaged_on_qemu_10() -> Result<()> {
    tells_good_memory_from_damaged(Qemu::V10)
}

#[test]
fn answers_whoever_comes_after_a_peer_that_left_in_the_middle_of_a_question() -> Result<()> {
    let mut guest = booted(Qemu::V7)?;
    let nonce = guest.oracle.nonce()?;
    assert!(guest.log.text().contains(&nonce));
    // A question whose answer nobody stays for.
    let unanswered = guest.oracle.ask_within("check", Duration::from_millis(1));
    assert!(unanswered.is_err());
    let socket = guest.dir.join("serial1.sock");
    let former = std::mem::replace(&mut guest.oracle, Oracle::connect(&socket)?);
    drop(former);
    assert_eq!(guest.oracle.nonce()?, nonce);
    Ok(())
}

/// QEMU's own way to save and revert is right, so the oracle has to say so.
#[test]
fn finds_its_memory_whole_after_qemus_own_revert() -> Result<()> {
    let mut guest = booted(Qemu::V7)?;
    let nonce = guest.oracle.nonce()?;
    let folder = tempfile::tempdir()?;
    let stream = folder.path().join("stream");
    let mut monitor = Qmp::connect(&guest.qmp_path)?;
    monitor.execute("migrate", json!({"uri": format!("exec:cat > {}", stream.display())}))?;
    wait_for(SOON, "the migration to complete", || {
        let status = monitor.execute("query-migrate", json!({}))?;
        assert_ne!(status["status"], "failed", "{status}");
        Ok((status["status"] == "completed").then_some(()))
    })?;

    // The same command line, its files in another folder; the original lives on.
    let command_line = fs::read_to_string(format!("/proc/{}/cmdline", guest.pid))?;
    let (old, new) = (guest.dir.display().to_string(), folder.path().display().to_string());
    let mut command = Command::new(Qemu::V7.binary());
    command.args(
        command_line.trim_end_matches('\0').split('\0').skip(1).map(|arg| arg.replace(&old, &new)),
    );
    command.args(["-incoming", &format!("exec:cat {}", stream.display())]);
    let mut qemu = spawn_bound(command)?;

    let mut reverted = Attached::to(qemu.id(), folder.path())?;
    assert_eq!(reverted.oracle.nonce()?, nonce);
    assert!(reverted.log.wait_beat(1, SOON)?.uptime_ms > 0);
    let verdict = reverted.oracle.check()?;
    assert!(verdict.ok(), "{verdict:?}");
    drop(reverted);
    qemu.wait()?;
    Ok(())
}

#[test]
fn a_disk_keeps_what_was_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.raw");
    File::create(&image)?.set_len(4 << 20)?;
    let drive = format!("if=virtio,format=raw,file={}", image.display());
    let mut guest = Guest::boot(&GuestOptions {
        virtio_blk: true,
        vcpus: 2,
        args: vec!["-drive".into(), drive],
        ..GuestOptions::default()
    })?;
    guest.oracle.ask("disk write /dev/vda 512 1")?;
    assert_eq!(guest.oracle.ask("disk check /dev/vda 512 1")?, "ok");
    assert_eq!(guest.oracle.ask("disk check /dev/vda 512 2")?, "bad first=0");
    guest.oracle.ask("disk write /dev/vda 100 2")?;
    assert_eq!(guest.oracle.ask("disk check /dev/vda 512 2")?, "bad first=100");
    assert!(guest.oracle.ask("disk check /dev/vdb 1 1").is_err());
    Ok(())
}

#[test]
fn nothing_of_a_guest_is_left_when_it_is_dropped() -> Result<()> {
    let guest = booted(Qemu::V10)?;
    let (pid, dir) = (guest.pid, guest.dir.clone());
    assert!(!process_gone(pid) && resident_kib(pid)? > 100 << 10);
    drop(guest);
    assert!(process_gone(pid) && !dir.exists());
    Ok(())
}

#[test]
fn a_guest_that_can_not_be_says_why() {
    let options = GuestOptions { fill: Fill::Mib(4096), ..GuestOptions::default() };
    let error = Guest::boot(&options).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("oracle.fill_mib=4096 but only"), "{error}");
    let options = GuestOptions { args: vec!["-no-such-option".into()], ..options };
    let error = Guest::boot(&options).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("no-such-option: invalid option"), "{error}");
}

#[test]
fn disks_of_every_kind_are_there_and_hold_a_file_system() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = |id: &str, bus, given, format| {
        let file = folder.path().join(id);
        Disk { id: id.into(), bus, given, file, format }
    };
    let disks = vec![
        disk("blk", Bus::VirtioBlk, Given::Blockdev, Format::Raw),
        disk("auto", Bus::VirtioBlk, Given::DriveIf, Format::Qcow2),
        disk("scsi", Bus::VirtioScsi, Given::Drive, Format::Qcow2),
        disk("ide", Bus::Ide, Given::BlockdevJson, Format::Raw),
        disk("nvme", Bus::Nvme, Given::Blockdev, Format::Qcow2),
    ];
    disks.iter().try_for_each(|disk| disk.make_ext4(16))?;
    let mut guest = Guest::boot(&GuestOptions { disks, ..GuestOptions::default() })?;
    for device in ["vda", "vdb", "sda", "sdb", "nvme0n1"] {
        let started = guest.oracle.ask(&format!("records start /dev/{device} 0"))?;
        assert!(started.starts_with("ok ledger="), "{started}");
        wait_for(SOON, "ten records", || {
            let checked = guest.oracle.ask("records check")?;
            assert!(checked.starts_with("ok "), "{checked}");
            Ok((!checked.ends_with("acknowledged=0")).then_some(()))
        })?;
        guest.oracle.ask("records stop")?;
    }
    for (id, format) in [("blk", Format::Raw), ("nvme", Format::Qcow2)] {
        let copy = folder.path().join("copy");
        convert(&folder.path().join(id), format, &copy, Format::Raw)?;
        run(Command::new("/sbin/e2fsck").args(["-fn"]).arg(&copy))?;
    }
    let time = guest.oracle.ask("time")?;
    assert!(time.starts_with("wall_ms=") && time.contains(" rtc_s="), "{time}");
    Ok(())
}
