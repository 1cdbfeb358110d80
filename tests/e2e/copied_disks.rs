//! Disks that are copied with the snapshot: it is complete then, and the guest goes on in its own
//! files.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::bare::query;
use crate::harness::{Dir, STOP_AT, text};
use crate::killed::kill_at_its_step;
use crate::support::{
    Disk, Fill, Guest, GuestOptions, Qemu, Result, cont, query_status, run, stop,
};
use crate::trouble::Tmpfs;
use crate::{tests, tests_on_both_at_length};

tests! {
    a_copy_that_fails_leaves_the_guest_on_its_disks
    disks_that_cant_be_cloned_are_told_beforehand
    disks_are_cloned_where_the_file_system_can
}

tests_on_both_at_length! {
    copies_are_of_the_moment_and_travel_with_their_image
    a_paused_guests_disks_are_copied
}

/// Pages that a guest writes to each disk: what tells one moment from another. A guest under TCG takes
/// seconds for 16 MiB.
const PAGES: u64 = 1024;
/// What fills a disk that is too small for a copy of both.
const MANY: u64 = 4096;

fn boot(dir: &Dir, qemu: Qemu) -> Result<Guest> {
    let disks = Disk::two(&dir.path(""), 64)?;
    let fill = Fill::Mib(16);
    let options =
        GuestOptions { qemu, mib: 128, fill, writers: 0, disks, ..GuestOptions::default() };
    let mut guest = Guest::boot(&options)?;
    guest.oracle.ask("idle")?;
    Ok(guest)
}

fn on_both_disks(guest: &mut Guest, ask: &str, seed: &str) -> Result<()> {
    pages_on_both_disks(guest, ask, PAGES, seed)
}

fn pages_on_both_disks(guest: &mut Guest, ask: &str, pages: u64, seed: &str) -> Result<()> {
    for device in ["vda", "vdb"] {
        let answer = guest.oracle.ask(&format!("disk {ask} /dev/{device} {pages} {seed}"))?;
        assert!(ask != "check" || answer == "ok", "{device}, {seed}: {answer}");
    }
    Ok(())
}

/// The files that the guest's disks are on.
fn files(guest: &Guest) -> Result<Vec<Value>> {
    let disks = query(&guest.qmp_path, "query-block")?;
    Ok(disks.as_array().ok_or("no disks")?.iter().map(|d| d["inserted"]["file"].clone()).collect())
}

/// What a save or its failure may leave: the guest's own files alone, and no job or node of ours.
fn is_on_its_own_files(dir: &Dir, guest: &Guest, before: &[Value]) -> Result<()> {
    assert_eq!(files(guest)?, before);
    assert_eq!(query(&guest.qmp_path, "query-jobs")?, json!([]));
    let nodes = query(&guest.qmp_path, "query-named-block-nodes")?;
    let ours = |node: &&Value| node["node-name"].as_str().is_some_and(|n| n.starts_with("snap-"));
    assert_eq!(nodes.as_array().ok_or("no nodes")?.iter().find(ours), None);
    assert!(dir.names(".")?.iter().all(|name| !name.contains(".snap-")), "{:?}", dir.names("."));
    Ok(())
}

fn copies_are_of_the_moment_and_travel_with_their_image(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = boot(dir, qemu)?;
    on_both_disks(&mut guest, "write", "1")?;
    let sum = guest.oracle.sum()?;
    let before = files(&guest)?;

    let there = dir.make("there")?;
    let image = there.join("vm.snap");
    let save = dir.snapback(&["save", "--qmp", text(&guest.qmp_path), text(&image)]);
    let mut saving = save.with(&["--disks", "copy"]).start()?;
    saving.wait("moment")?;
    on_both_disks(&mut guest, "write", "2")?;
    let ended = saving.succeed()?;
    let steps =
        ["checked", "ready", "moment", "disk_copied", "disk_copied", "folded", "folded", "saved"];
    assert_eq!(ended.steps(), steps);
    assert_eq!(ended.event("saved")?["disks"], json!([]));
    is_on_its_own_files(dir, &guest, &before)?;
    on_both_disks(&mut guest, "check", "2")?;
    let copies: Vec<String> =
        dir.names("there")?.into_iter().filter(|name| name.ends_with(".qcow2")).collect();
    assert_eq!(copies.len(), 2, "{copies:?}");
    for copy in &copies {
        assert_eq!(fs::metadata(there.join(copy))?.mode() & 0o777, 0o600);
    }
    let verified = dir.snapback(&["verify", text(&image)]);
    verified.succeed()?;

    // Image and copies go elsewhere; what they were made from is no more.
    let from = guest.dir.clone();
    drop(guest);
    let elsewhere = dir.path("elsewhere");
    fs::rename(&there, &elsewhere)?;
    for file in ["one.raw", "two.qcow2"] {
        fs::remove_file(dir.path(file))?;
    }
    let mut reverted = dir.reverted(&elsewhere.join("vm.snap"), &from, "reverted")?;
    reverted.resident()?;
    assert_eq!(reverted.oracle.sum()?, sum);
    for device in ["vda", "vdb"] {
        let answer = reverted.oracle.ask(&format!("disk check /dev/{device} {PAGES} 1"))?;
        assert_eq!(answer, "ok", "{device}");
    }
    Ok(())
}

fn a_paused_guests_disks_are_copied(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = boot(dir, qemu)?;
    on_both_disks(&mut guest, "write", "1")?;
    let before = files(&guest)?;
    stop(&guest.qmp_path)?;
    dir.save(&guest, "vm.snap").with(&["--disks", "copy"]).succeed()?;
    assert_eq!(files(&guest)?, before);
    cont(&guest.qmp_path)?;
    on_both_disks(&mut guest, "write", "2")?;
    let mut reverted = dir.reverted(&dir.path("vm.snap"), &guest.dir, "reverted")?;
    cont(&reverted.qmp_path)?;
    reverted.resident()?;
    for device in ["vda", "vdb"] {
        let answer = reverted.oracle.ask(&format!("disk check /dev/{device} {PAGES} 1"))?;
        assert_eq!(answer, "ok", "{device}");
    }
    is_on_its_own_files(dir, &guest, &before)?;
    on_both_disks(&mut guest, "check", "2")
}

/// A full disk, an interrupt and SIGKILL: the guest goes on in its own files, and nothing is left.
fn a_copy_that_fails_leaves_the_guest_on_its_disks(dir: &Dir) -> Result<()> {
    let mut guest = boot(dir, Qemu::V10)?;
    pages_on_both_disks(&mut guest, "write", MANY, "1")?;
    let before = files(&guest)?;
    let small = Tmpfs::mount(dir.make("small")?, "24m")?;
    let qmp = text(&guest.qmp_path).to_owned();
    let image = dir.path("small/vm.snap");
    // More room than is thought to be needed, and less than is.
    pages_on_both_disks(&mut guest, "write", MANY, "2")?;
    let save = |disks| dir.snapback(&["save", "--qmp", &qmp, text(&image), "--disks", disks]);
    fs::write(dir.path("small/other"), vec![1; 8 << 20])?;
    let failed = save("copy").with(&["--compress", "zstd"]).end()?;
    let refusal = failed.failure()?;
    assert!(failed.said.iter().any(|line| line.contains("no_space")), "{refusal}");
    is_on_its_own_files(dir, &guest, &before)?;
    assert_eq!(dir.names("small")?, ["other"]);
    fs::remove_file(dir.path("small/other"))?;
    drop(small);

    if cfg!(debug_assertions) {
        let save = || dir.save(&guest, "vm.snap").with(&["--disks", "copy"]);
        let names = dir.names(".")?;
        let saving = save().env(STOP_AT, "copied").start()?;
        saving.wait_stopped()?;
        saving.signal(libc::SIGINT);
        saving.signal(libc::SIGCONT);
        assert!(saving.end()?.failure()?.contains("interrupted"));
        assert_eq!(dir.names(".")?, names);
        is_on_its_own_files(dir, &guest, &before)?;

        kill_at_its_step(save().with(&["--no-keeper"]).env(STOP_AT, "copied").start()?)?;
        let recovered = save().with(&["--recover"]).succeed()?;
        assert_eq!(recovered.event("recovered")?["outcome"], "undone");
        assert_eq!(dir.names(".")?, names);
        is_on_its_own_files(dir, &guest, &before)?;

        // Killed once the image has its name: it is whole, with its copies.
        kill_at_its_step(save().with(&["--no-keeper"]).env(STOP_AT, "named").start()?)?;
        let recovered = save().with(&["--recover"]).succeed()?;
        assert_eq!(recovered.event("recovered")?["outcome"], "saved");
        is_on_its_own_files(dir, &guest, &before)?;
        let copies = dir.names(".")?.iter().filter(|name| name.contains(".disk")).count();
        assert_eq!(copies, 2);
    }
    assert_eq!(query_status(&guest.qmp_path)?, "running");
    on_both_disks(&mut guest, "check", "2")
}

fn disks_that_cant_be_cloned_are_told_beforehand(dir: &Dir) -> Result<()> {
    let small = Tmpfs::mount(dir.make("memory")?, "64m")?;
    let disk = dir.path("memory/disk.raw");
    let disks = vec![Disk::new("one", &disk)];
    disks[0].make(8)?;
    let fill = Fill::Mib(8);
    let guest = Guest::boot(&GuestOptions { mib: 128, fill, disks, ..GuestOptions::default() })?;
    let refusal = dir.save(&guest, "vm.snap").with(&["--disks", "reflink"]).fail()?;
    assert!(refusal.contains("--disks copy") && refusal.contains(text(&disk)), "{refusal}");
    assert_eq!(files(&guest)?, [json!(disk)]);
    drop((guest, small));
    Ok(())
}

/// A file system that can clone files. Dropping it unmounts it.
struct Xfs(PathBuf);

impl Xfs {
    fn mount(dir: &Dir) -> Result<Xfs> {
        let (file, at) = (dir.path("xfs.img"), dir.make("xfs")?);
        File::create(&file)?.set_len(320 << 20)?;
        run(Command::new("mkfs.xfs").arg("-q").arg(&file))?;
        run(Command::new("mount").args(["-o", "loop"]).args([&file, &at]))?;
        Ok(Xfs(at))
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg("-l").arg(&self.0));
    }
}

fn disks_are_cloned_where_the_file_system_can(dir: &Dir) -> Result<()> {
    let xfs = Xfs::mount(dir)?;
    let disk = xfs.0.join("disk.raw");
    let disks = vec![Disk::new("one", &disk)];
    disks[0].make(16)?;
    let fill = Fill::Mib(8);
    let options = GuestOptions { mib: 128, fill, writers: 0, disks, ..GuestOptions::default() };
    let mut guest = Guest::boot(&options)?;
    guest.oracle.ask("idle")?;
    guest.oracle.ask("disk write /dev/vda 2048 1")?;
    let ended = dir.save(&guest, "vm.snap").with(&["--disks", "reflink"]).succeed()?;
    guest.oracle.ask("disk write /dev/vda 2048 2")?;
    assert_eq!(files(&guest)?, [json!(disk)]);
    let copied = ended.event("disk_copied")?;
    let clone = Path::new(copied["file"].as_str().ok_or("no clone")?);
    assert_eq!((clone.parent(), clone.extension()), (disk.parent(), disk.extension()));
    let mut reverted = dir.reverted(&dir.path("vm.snap"), &guest.dir, "reverted")?;
    reverted.resident()?;
    assert_eq!(reverted.oracle.ask("disk check /dev/vda 2048 1")?, "ok");
    drop((reverted, guest));
    drop(xfs);
    Ok(())
}
