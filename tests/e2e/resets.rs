//! A guest goes back to its image inside its own QEMU, again and again.

use std::path::{Path, PathBuf};

use serde_json::json;
use snapback::image::Image;
use snapback::page::{BlockId, Location, PAGE_SIZE, Page, PageSource};

use crate::harness::{Dir, Reverted, Running, Snapback, in_a_folder, send_signal, text, wait_gone};
use crate::moments::records;
use crate::shared::{MIB, options, shared};
use crate::support::{
    Contact, Disk, Fill, Guest, GuestOptions, Qemu, Result, SOON, SerialLog, cont, debian,
    pmemsave, qmp, query_status, stop, wait_for, wait_until,
};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_guest_is_reset_again_and_again
    disk_and_memory_go_back_together
    a_guest_outlives_whoever_tracks_it
    a_resettable_guest_is_saved
    a_reset_that_fails_half_way_ends_in_a_new_process
}

tests_on_both_at_length! {
    every_page_is_the_images_after_a_reset
    a_database_under_load_goes_back
}

tests! {
    a_guest_with_a_new_device_gets_a_new_process
    a_flat_image_is_served_to_a_resettable_guest
    mapped_memory_goes_back
}

/// How often a guest is reset: `make torture` does so a hundred times.
pub fn rounds() -> u64 {
    std::env::var("SNAPBACK_RESETS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(4)
}

/// A revert of the shared guest whose `reset` is to be had.
pub fn resettable(command: Snapback, folder: &Path) -> Result<Reverted> {
    let mut guest = Reverted::of(command.with(&["--resettable"]), folder)?;
    server(&mut guest)?.wait("resettable")?;
    Ok(guest)
}

fn server(guest: &mut Reverted) -> Result<&mut Running> {
    Ok(guest.server.as_mut().ok_or("its server has been waited for")?)
}

/// Has a guest reset in place. Returns how long the server says that it took, and the pages.
pub fn reset(dir: &Dir, guest: &mut Contact) -> Result<(f64, u64)> {
    let ended = dir.snapback(&["reset", "--in-place", "--qmp", text(&guest.qmp_path)]).succeed()?;
    let event = ended.event("reset")?;
    assert_eq!(event["how"], "in_place", "{ended:?}");
    let took = event["took_ms"].as_f64().ok_or("no time")?;
    Ok((took, event["pages"].as_u64().ok_or("no pages")?))
}

fn a_guest_is_reset_again_and_again(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    let first = guest.log.wait_beat(0, SOON)?;
    for round in 0..rounds() {
        let last = guest.log.wait_beat(first.number + 30 + round % 7, SOON)?;
        let (took, pages) = reset(dir, &mut guest)?;
        println!("reset {round}: {pages} pages in {took:.1} ms");
        guest.log = SerialLog::from_now(&to.join("serial0.log"));
        let beat = guest.log.wait_beat(0, SOON)?;
        assert!(beat.number < last.number, "{beat:?}, after {last:?}");
        guest.check(&shared.nonce)?;
    }
    Ok(())
}

/// A guest that appends records to a file, each followed by fsync, and keeps in memory how far it
/// has come: what it has on its disk after a reset is what it had at the moment, and goes on so.
fn disk_and_memory_go_back_together(dir: &Dir, qemu: Qemu) -> Result<()> {
    disk_and_memory(dir, qemu, false)
}

/// The same where QEMU maps its memory.
#[test]
#[ignore = "the same as with memory that is tracked: `make torture`"]
fn disk_and_mapped_memory_go_back_together() -> Result<()> {
    in_a_folder(|dir| disk_and_memory(dir, Qemu::V10, true))
}

fn disk_and_memory(dir: &Dir, qemu: Qemu, mapped: bool) -> Result<()> {
    let mut guest = recording(dir, qemu)?;
    let nonce = guest.oracle.nonce()?;
    wait_for(SOON, "records", || Ok((records(&mut guest)? > 20).then_some(())))?;
    dir.save(&guest, "vm.snap").succeed()?;
    let from = guest.dir.clone();
    drop(guest.kill());
    let to = dir.make("reverted")?;
    let revert = match mapped {
        true => dir.revert(&flattened(dir, &dir.path("vm.snap"))?, &from, &to),
        false => dir.revert(&dir.path("vm.snap"), &from, &to),
    };
    let revert = if mapped { revert.with(&["--place", "map"]) } else { revert };
    let mut guest = resettable(revert, &to)?;
    let mut first = None;
    for round in 0..rounds() {
        records_go_back(dir, &mut guest, &mut first)?;
        if round % 5 == 0 {
            let checked = guest.oracle.ask_within("records check", SOON * 5)?;
            assert!(checked.starts_with("ok "), "round {round}: {checked}");
            guest.check(&nonce)?;
        }
    }
    Ok(())
}

/// Has a guest write records, and resets it: it has fewer then, about as many as after the `first`
/// reset.
pub fn records_go_back(dir: &Dir, guest: &mut Contact, first: &mut Option<u64>) -> Result<()> {
    let now = records(guest)?;
    wait_for(SOON, "records", || Ok((records(guest)? > now + 50).then_some(())))?;
    let before = records(guest)?;
    reset(dir, guest)?;
    let after = records(guest)?;
    let first = *first.get_or_insert(after);
    assert!(after < before && after <= first + 50, "{before}, then {after}, not {first}");
    Ok(())
}

/// A guest with a disk to which it writes numbered records.
pub fn recording(dir: &Dir, qemu: Qemu) -> Result<Guest> {
    let disk = Disk::new("disk", &dir.path("disk.raw"));
    disk.make_ext4(48)?;
    let fill = Fill::Mib(24);
    let options = GuestOptions { disks: vec![disk], fill, rate: 500, ..options(qemu) };
    let mut guest = Guest::boot(&options)?;
    guest.oracle.ask("records start /dev/vda 0")?;
    Ok(guest)
}

/// A database at work in a real userland is whole after each reset.
fn a_database_under_load_goes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = debian::make_disk(&dir.path("disk.qcow2"))?;
    let mut guest = Guest::boot(&debian::options(qemu, disk))?;
    debian::start_pgbench(&mut guest.oracle, 2)?;
    debian::start_journal(&mut guest.oracle)?;
    wait_until(debian::PATIENCE, "commits", || debian::acknowledged(&guest).len() > 20)?;
    dir.save(&guest, "vm.snap").succeed()?;
    let from = guest.dir.clone();
    drop(guest.kill());
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&dir.path("vm.snap"), &from, &to), &to)?;
    for _ in 0..rounds() {
        let told = debian::acknowledged(&guest).len();
        wait_until(debian::PATIENCE, "more commits", || {
            debian::acknowledged(&guest).len() > told + 5
        })?;
        reset(dir, &mut guest)?;
    }
    let told = debian::acknowledged(&guest).len();
    wait_until(debian::PATIENCE, "more commits", || debian::acknowledged(&guest).len() > told + 2)?;
    debian::stop_load(&mut guest.oracle)?;
    debian::check(&mut guest.oracle)
}

/// The memory of a guest that stands still at its moment is compared with the image from outside.
fn every_page_is_the_images_after_a_reset(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&options(qemu))?;
    let nonce = guest.oracle.nonce()?;
    // QEMU before 9.0 runs a guest that was saved while it stood still.
    stop(&guest.qmp_path)?;
    dir.save(&guest, "vm.snap").succeed()?;
    let from = guest.dir.clone();
    drop(guest.kill());
    let (image, to) = (dir.path("vm.snap"), dir.make("reverted")?);
    let guest = resettable(dir.revert(&image, &from, &to), &to)?;
    compare_after_resets(dir, guest, &image, &nonce)?;
    if qemu == Qemu::V7 {
        return Ok(());
    }
    // The same where QEMU maps it.
    let (flat, to) = (flattened(dir, &image)?, dir.make("mapped")?);
    let revert = dir.revert(&flat, &from, &to).with(&["--place", "map"]);
    compare_after_resets(dir, resettable(revert, &to)?, &image, &nonce)
}

/// Resets a guest that was saved while it stood still, and compares it with its image.
fn compare_after_resets(dir: &Dir, mut guest: Reverted, image: &Path, nonce: &str) -> Result<()> {
    for _ in 0..3 {
        cont(&guest.qmp_path)?;
        let beat = guest.log.last_beat().map_or(0, |beat| beat.number);
        guest.log.wait_beat(beat + 20, SOON)?;
        reset(dir, &mut guest)?;
        assert_eq!(query_status(&guest.qmp_path)?, "paused");
        let memory = dir.path("memory");
        let len = MIB << 20;
        pmemsave(&guest.qmp_path, 0, len, &memory)?;
        let wrong = differing(image, &memory, len)?;
        assert!(wrong.is_empty(), "{wrong:x?}");
    }
    cont(&guest.qmp_path)?;
    guest.check(nonce)
}

/// Where the main memory in a file differs from that of an image: addresses of pages.
pub fn differing(image: &Path, memory: &Path, len: u64) -> Result<Vec<u64>> {
    let image = Image::open(image)?;
    let block = image.manifest().blocks.iter().position(|block| block.name == "pc.ram");
    let block = BlockId(block.ok_or("no main memory")? as u16);
    let (memory, mut reader) = (std::fs::read(memory)?, image.reader()?);
    let mut wrong = Vec::new();
    for number in 0..len / PAGE_SIZE as u64 {
        let now = &memory[number as usize * PAGE_SIZE..][..PAGE_SIZE];
        let same = match image.locate(Page { block, number })? {
            Location::Zero => now.iter().all(|byte| *byte == 0),
            Location::Stored { chunk, slot } => {
                now == &reader.read(chunk)?[slot * PAGE_SIZE..][..PAGE_SIZE]
            }
        };
        if !same {
            wrong.push(number * PAGE_SIZE as u64);
        }
    }
    Ok(wrong)
}

/// What has been plugged in since would stay: the guest gets a new QEMU instead.
fn a_guest_with_a_new_device_gets_a_new_process(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    let device = json!({ "driver": "virtio-rng-pci", "id": "new" });
    qmp(&guest.qmp_path, "device_add", device)?;
    let socket = guest.qmp_path.clone();
    let refused = dir.snapback(&["reset", "--in-place", "--qmp", text(&socket)]).end()?;
    assert_eq!(
        (refused.code, &refused.event("error")?["code"]),
        (Some(3), &"not_resettable".into())
    );
    assert!(refused.event("error")?["message"].as_str().is_some_and(|m| m.contains("`new (")));
    guest.check(&shared.nonce)?;
    let mut replaced = replace(dir, &guest)?;
    wait_gone(guest.pid)?;
    replaced.check(&shared.nonce)
}

/// Resets a guest that can't be reset in place.
fn replace(dir: &Dir, guest: &Reverted) -> Result<Reverted> {
    let ended = dir.snapback(&["reset", "--qmp", text(&guest.qmp_path)]).succeed()?;
    assert_eq!(ended.event("reset")?["how"], "new_process", "{ended:?}");
    let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")? as u32;
    Reverted::alone(pid, &guest.dir)
}

/// A server that is killed takes nothing with it: the guest runs on, untracked.
fn a_guest_outlives_whoever_tracks_it(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    reset(dir, &mut guest)?;
    send_signal(server(&mut guest)?.pid(), libc::SIGKILL);
    let beat = guest.log.last_beat().map_or(0, |beat| beat.number);
    guest.log.wait_beat(beat + 20, SOON)?;
    guest.check(&shared.nonce)?;
    let mut replaced = replace(dir, &guest)?;
    wait_gone(guest.pid)?;
    replaced.check(&shared.nonce)
}

/// A save write-protects memory as well: whoever tracks it lets go.
fn a_resettable_guest_is_saved(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    let checked = dir.snapback(&["check", "--qmp", text(&guest.qmp_path)]).succeed()?;
    assert!(checked.events.iter().any(|item| {
        item["item"] == "background-snapshot"
            && item["says"].as_str().is_some_and(|s| s.contains("tracked"))
    }));
    dir.save(&guest, "again.snap").succeed()?;
    guest.resident()?;
    guest.check(&shared.nonce)?;
    let mut again = dir.reverted(&dir.path("again.snap"), &to, "again-of-it")?;
    again.check(&shared.nonce)
}

/// A reset that fails once the guest has been stopped never lets it run: a mixture of two moments
/// is replaced.
fn a_reset_that_fails_half_way_ends_in_a_new_process(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    // Somebody takes away what QEMU is to load.
    qmp(&guest.qmp_path, "blockdev-del", json!({ "node-name": "snapback-state" }))?;
    let mut replaced = replace(dir, &guest)?;
    wait_gone(guest.pid)?;
    replaced.check(&shared.nonce)?;
    let ended = guest.server.ok_or("no server")?.end()?;
    let error = ended.event("error")?;
    assert_eq!((ended.code, &error["code"]), (Some(1), &"qemu_failed".into()), "{ended:?}");
    Ok(())
}

/// A reset of mapped memory costs more: a flat image is served instead, unless mapping is asked for.
fn a_flat_image_is_served_to_a_resettable_guest(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let flat = flattened(dir, &shared.image)?;
    let to = dir.make("reverted")?;
    let mut guest = resettable(dir.revert(&flat, &shared.from, &to), &to)?;
    reset(dir, &mut guest)?;
    guest.check(&shared.nonce)
}

/// Memory that QEMU maps, at random times under load. QEMU maps parts of a file from 8.1 on.
fn mapped_memory_goes_back(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let (flat, to) = (flattened(dir, &shared.image)?, dir.make("reverted")?);
    let revert = dir.revert(&flat, &shared.from, &to).with(&["--place", "map"]);
    let mut guest = resettable(revert, &to)?;
    for round in 0..rounds() {
        let last = guest.log.wait_beat(0, SOON)?.number;
        let last = guest.log.wait_beat(last + 10 + round % 7, SOON)?;
        let (took, pages) = reset(dir, &mut guest)?;
        println!("reset {round}: {pages} pages in {took:.1} ms");
        assert!(pages > 0);
        guest.log = SerialLog::from_now(&to.join("serial0.log"));
        let beat = guest.log.wait_beat(0, SOON)?;
        assert!(beat.number < last.number, "{beat:?}, after {last:?}");
        guest.check(&shared.nonce)?;
    }
    Ok(())
}

/// A flat copy of an image.
pub fn flattened(dir: &Dir, image: &Path) -> Result<PathBuf> {
    let flat = dir.path("flat.snap");
    dir.snapback(&["flatten", text(image), text(&flat), "--layout", "flat"]).succeed()?;
    Ok(flat)
}
