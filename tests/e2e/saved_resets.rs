//! A guest that was saved and goes on in its QEMU is taken back to the image there, again and again.

use serde_json::json;

use crate::backends::Pool;
use crate::harness::{Dir, Running, check, send_signal, text, wait_gone};
use crate::hotplug::words;
use crate::moments::records;
use crate::resets::{differing, recording, records_go_back, reset, rounds};
use crate::shared::{MIB, options};
use crate::support::{
    Contact, Guest, GuestOptions, Qemu, Result, SOON, SerialLog, cont, pmemsave, qmp, query_status,
    stop, wait_for,
};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_saved_guest_is_reset_again_and_again
    disk_and_memory_of_a_saved_guest_go_back_together
    cards_with_the_same_rom_are_told_apart
}

tests_on_both_at_length! {
    the_last_save_is_gone_back_to
    shared_memory_of_a_saved_guest_goes_back
    huge_pages_of_a_saved_guest_go_back
}

tests! {
    a_saved_guest_outlives_whoever_tracks_it
    every_page_of_a_saved_guest_is_the_images
    a_mixture_of_two_moments_does_not_run
    what_can_not_be_reset_is_told_before_it_is_saved
}

/// Saves a guest so that it can be reset. What tracks it runs until it is dropped.
fn save(dir: &Dir, guest: &Contact, image: &str) -> Result<Running> {
    let mut tracker = dir.save(guest, image).with(&["--resettable"]).start()?;
    tracker.wait("resettable")?;
    Ok(tracker)
}

/// Has a guest run for so many beats.
fn run_on(guest: &mut Contact, beats: u64) -> Result<u64> {
    let beat = guest.log.last_beat().map_or(0, |beat| beat.number);
    Ok(guest.log.wait_beat(beat + beats, SOON)?.number)
}

/// Resets a guest, and checks that it has gone back and that its memory is right.
fn goes_back(dir: &Dir, guest: &mut Contact, nonce: &str, beats: u64) -> Result<()> {
    let last = run_on(guest, beats)?;
    let (took, pages) = reset(dir, guest)?;
    println!("{pages} pages in {took:.1} ms");
    guest.log = SerialLog::from_now(&guest.dir.join("serial0.log"));
    let beat = guest.log.wait_beat(0, SOON)?;
    assert!(beat.number < last, "{beat:?}, after {last}");
    assert_eq!(guest.oracle.nonce()?, nonce);
    check(guest)
}

fn a_saved_guest_is_reset_again_and_again(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&options(qemu))?;
    let nonce = guest.oracle.nonce()?;
    let mut tracker = dir.save(&guest, "vm.snap").with(&["--resettable", "--prove"]).start()?;
    tracker.wait("proved")?;
    tracker.wait("resettable")?;
    for round in 0..rounds() {
        goes_back(dir, &mut guest, &nonce, 30 + round % 7)?;
    }
    // The image is as good as any other, and so is the guest without its tracker.
    tracker.signal(libc::SIGINT);
    tracker.succeed()?;
    run_on(&mut guest, 20)?;
    check(&mut guest)?;
    assert_eq!(dir.recorded()?, [""; 0]);
    let from = guest.dir.clone();
    dir.reverted(&dir.path("vm.snap"), &from, "reverted")?.check(&nonce)
}

/// What it has on its disk after a reset is what it had at the moment, and goes on so.
fn disk_and_memory_of_a_saved_guest_go_back_together(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = recording(dir, qemu)?;
    let nonce = guest.oracle.nonce()?;
    wait_for(SOON, "records", || Ok((records(&mut guest)? > 20).then_some(())))?;
    let _tracker = save(dir, &guest, "vm.snap")?;
    let mut first = None;
    for _ in 0..rounds() {
        records_go_back(dir, &mut guest, &mut first)?;
        let checked = guest.oracle.ask_within("records check", SOON * 5)?;
        assert!(checked.starts_with("ok "), "{checked}");
        assert_eq!(guest.oracle.nonce()?, nonce);
        check(&mut guest)?;
    }
    Ok(())
}

/// A guest that is saved a second time goes back to that moment from then on: disks too.
fn the_last_save_is_gone_back_to(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = recording(dir, qemu)?;
    let nonce = guest.oracle.nonce()?;
    let first = save(dir, &guest, "first.snap")?;
    reset(dir, &mut guest)?;
    wait_for(SOON, "records", || Ok((records(&mut guest)? > 50).then_some(())))?;
    let second = save(dir, &guest, "second.snap")?;
    first.succeed()?;
    for _ in 0..2 {
        let now = records(&mut guest)?;
        wait_for(SOON, "records", || Ok((records(&mut guest)? > now + 20).then_some(())))?;
        reset(dir, &mut guest)?;
        assert!(records(&mut guest)? > 50);
        let checked = guest.oracle.ask_within("records check", SOON * 5)?;
        assert!(checked.starts_with("ok "), "{checked}");
    }
    // A save that nobody wants to go back to ends it.
    dir.save(&guest, "third.snap").succeed()?;
    second.succeed()?;
    assert_eq!(guest.oracle.nonce()?, nonce);
    check(&mut guest)
}

/// QEMU has several blocks of the same content, and of the same length as others.
fn cards_with_the_same_rom_are_told_apart(dir: &Dir, qemu: Qemu) -> Result<()> {
    let args = words(
        "-netdev user,id=a -device e1000,netdev=a -netdev user,id=b -device e1000,netdev=b \
         -netdev user,id=c -device virtio-net-pci,netdev=c -vga std -device secondary-vga",
    );
    let mut guest = Guest::boot(&GuestOptions { args, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    let _tracker = save(dir, &guest, "vm.snap")?;
    for _ in 0..2 {
        goes_back(dir, &mut guest, &nonce, 20)?;
    }
    Ok(())
}

fn shared_memory_of_a_saved_guest_goes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    on_backend(dir, qemu, "memory-backend-memfd,share=on")
}

fn huge_pages_of_a_saved_guest_go_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let _pool = Pool::of(MIB + 16)?;
    on_backend(dir, qemu, "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M")
}

fn on_backend(dir: &Dir, qemu: Qemu, backend: &str) -> Result<()> {
    let memory_backend = Some(backend.to_owned());
    let mut guest = Guest::boot(&GuestOptions { memory_backend, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    let _tracker = save(dir, &guest, "vm.snap")?;
    for _ in 0..2 {
        goes_back(dir, &mut guest, &nonce, 10)?;
    }
    Ok(())
}

/// In the background. A tracker that is killed takes nothing with it.
fn a_saved_guest_outlives_whoever_tracks_it(dir: &Dir) -> Result<()> {
    let mut guest = Guest::boot(&options(Qemu::V7))?;
    let nonce = guest.oracle.nonce()?;
    let ended = dir.save(&guest, "vm.snap").with(&["--resettable", "--detach"]).succeed()?;
    assert_eq!(ended.steps(), ["checked", "moment", "saved", "resettable", "detached"]);
    let run = dir.snapback(&["ps"]).succeed()?;
    let id = ended.event("detached")?["id"].as_str().ok_or("no id")?.to_owned();
    assert_eq!(
        (&run.event("run")?["id"], &run.event("run")?["qemu_pid"]),
        (&id.clone().into(), &guest.pid.into())
    );
    goes_back(dir, &mut guest, &nonce, 20)?;
    let by_id = dir.snapback(&["reset", &id]).succeed()?;
    assert_eq!(by_id.event("reset")?["how"], "in_place");
    let tracker = ended.event("detached")?["server_pid"].as_u64().ok_or("no process")? as u32;
    send_signal(tracker, libc::SIGKILL);
    wait_gone(tracker)?;
    guest.log = SerialLog::from_now(&guest.dir.join("serial0.log"));
    run_on(&mut guest, 20)?;
    check(&mut guest)?;
    let refused = dir.snapback(&["reset", "--qmp", text(&guest.qmp_path)]).end()?;
    assert_eq!(refused.event("error")?["code"], "not_resettable", "{refused:?}");
    // It is taken up anew by another save, and ended with its tracker.
    let again = dir.save(&guest, "again.snap").with(&["--resettable", "--detach"]).succeed()?;
    goes_back(dir, &mut guest, &nonce, 20)?;
    let id = again.event("detached")?["id"].as_str().ok_or("no id")?.to_owned();
    dir.snapback(&["stop", &id]).succeed()?;
    wait_gone(guest.pid)
}

/// The memory of a guest that stands still at its moment is compared with the image from outside.
fn every_page_of_a_saved_guest_is_the_images(dir: &Dir) -> Result<()> {
    let mut guest = Guest::boot(&options(Qemu::V10))?;
    let nonce = guest.oracle.nonce()?;
    stop(&guest.qmp_path)?;
    let _tracker = save(dir, &guest, "vm.snap")?;
    for _ in 0..3 {
        cont(&guest.qmp_path)?;
        run_on(&mut guest, 20)?;
        reset(dir, &mut guest)?;
        guest.log = SerialLog::from_now(&guest.dir.join("serial0.log"));
        assert_eq!(query_status(&guest.qmp_path)?, "paused");
        let memory = dir.path("memory");
        let len = MIB << 20;
        pmemsave(&guest.qmp_path, 0, len, &memory)?;
        let wrong = differing(&dir.path("vm.snap"), &memory, len)?;
        assert!(wrong.is_empty(), "{wrong:x?}");
    }
    cont(&guest.qmp_path)?;
    assert_eq!(guest.oracle.nonce()?, nonce);
    check(&mut guest)
}

/// A reset that fails once the guest has been stopped ends QEMU, whoever has started it.
fn a_mixture_of_two_moments_does_not_run(dir: &Dir) -> Result<()> {
    let guest = Guest::boot(&options(Qemu::V10))?;
    let tracker = save(dir, &guest, "vm.snap")?;
    // Somebody takes away what QEMU is to load.
    qmp(&guest.qmp_path, "blockdev-del", json!({ "node-name": "snapback-state" }))?;
    let failed = dir.snapback(&["reset", "--qmp", text(&guest.qmp_path)]).end()?;
    assert_eq!(failed.event("error")?["code"], "qemu_failed", "{failed:?}");
    wait_gone(guest.pid)?;
    let ended = tracker.end()?;
    assert_eq!((ended.code, &ended.event("error")?["code"]), (Some(1), &"qemu_failed".into()));
    assert_eq!(dir.recorded()?, [""; 0]);
    Ok(())
}

fn what_can_not_be_reset_is_told_before_it_is_saved(dir: &Dir) -> Result<()> {
    let guest = recording(dir, Qemu::V7)?;
    let options = ["--resettable", "--memory-only"];
    let refused = dir.save(&guest, "vm.snap").with(&options).end()?;
    assert_eq!(refused.event("error")?["code"], "not_resettable", "{refused:?}");
    assert!(refused.failure()?.contains("is no part of the snapshot"), "{refused:?}");
    let check = ["check", "--qmp", text(&guest.qmp_path), "--resettable"];
    dir.snapback(&check).succeed()?;
    dir.snapback(&check).with(&["--memory-only"]).fail()?;
    // This QEMU protects no memory of a guest that stands still.
    stop(&guest.qmp_path)?;
    assert!(dir.save(&guest, "vm.snap").with(&["--resettable"]).fail()?.contains("stands still"));
    assert_eq!(dir.names(".")?, ["disk.raw"]);
    Ok(())
}
