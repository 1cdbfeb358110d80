//! Saves on top of an image since which the guest's writes were tracked: what was not written is taken
//! from there unread. Compared, page by page, with QEMU's whole stream of the same moment.

use std::fs;
use std::path::Path;

use serde_json::Value;
use snapback::image::Image;

use crate::direct_reading::differing_pages;
use crate::filling::set_balloon;
use crate::harness::{
    Dir, Ended, Running, STOP_AT, Snapback, check, in_a_folder, send_signal, text, wait_gone,
};
use crate::resets::{reset, resettable};
use crate::shared::{MIB, options, shared};
use crate::support::{Contact, Guest, GuestOptions, Qemu, Result, SOON, SerialLog, wait_until};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    what_was_not_written_is_the_parents
}

tests! {
    a_tracker_that_is_killed_is_not_believed
}

#[test]
#[ignore = "a test of the others: `make torture`"]
fn a_save_that_takes_all_for_unchanged_is_caught() -> Result<()> {
    in_a_folder(takes_all_for_unchanged)
}

#[test]
#[ignore = "boots a guest of its own: `make torture`"]
fn what_a_balloon_gave_back_is_not_the_parents() -> Result<()> {
    in_a_folder(what_a_balloon_gave_back)
}

#[test]
#[ignore = "many minutes: `make torture`"]
fn many_saves_of_each_kind_of_memory() -> Result<()> {
    [Qemu::V7, Qemu::V10].into_iter().try_for_each(|qemu| in_a_folder(|dir| many_saves(dir, qemu)))
}

/// A save of the guest on top of an image, with QEMU's whole stream beside.
fn save_on(dir: &Dir, guest: &Contact, image: &str, parent: &Path) -> Snapback {
    let save = dir.save(guest, image).with(&["--disks", "none", "--parent", text(parent)]);
    save.env("SNAPBACK_TEST_STREAM", text(&dir.path("stream")))
}

/// How many pages of such an image differ from the stream, which is removed.
fn differing(dir: &Dir, image: &str) -> Result<u64> {
    let stream = dir.path("stream");
    let differing = differing_pages(&Image::open(dir.path(image))?, &stream)?;
    fs::remove_file(stream)?;
    Ok(differing)
}

/// What `saved` tells of how it was found out what has changed.
fn since(saved: &Value) -> Result<(&str, &Value)> {
    let since = &saved["changed_since"];
    Ok((since["by"].as_str().ok_or_else(|| format!("{saved}"))?, since))
}

/// That most of memory was taken from the parent unread.
fn assert_tracked(saved: &Value) -> Result<()> {
    let (by, since) = since(saved)?;
    let pages = since["pages"].as_u64().unwrap_or_default();
    // The guest's writers have 64 MiB.
    assert!(by == "write_protection" && pages > (MIB / 4) << 8, "{saved}");
    println!("{pages} pages were not read; {} were", saved["direct_pages"]);
    Ok(())
}

/// That all memory was compared, for a reason.
fn assert_compared(saved: &Value, reason: &str) -> Result<()> {
    let (by, since) = since(saved)?;
    assert!(by == "comparing" && since["why"].as_str().is_some_and(|why| why.contains(reason)));
    Ok(())
}

/// Has the guest write for some beats from now on.
fn write_on(guest: &mut Contact) -> Result<()> {
    guest.log = SerialLog::from_now(&guest.dir.join("serial0.log"));
    let beat = guest.log.wait_beat(0, SOON)?;
    guest.log.wait_beat(beat.number + 20, SOON).map(drop)
}

/// Saves a guest that writes, as one to be reset; its tracker runs until it is dropped.
fn save_to_be_reset(
    dir: &Dir,
    guest: &Contact,
    image: &str,
    parent: &Path,
) -> Result<(Running, Value)> {
    let save = save_on(dir, guest, image, parent).with(&["--resettable"]);
    let mut tracker = save.env("SNAPBACK_TEST_FAULTS", "whole stream").start()?;
    let saved = tracker.wait("saved")?;
    tracker.wait("resettable")?;
    Ok((tracker, saved))
}

/// Saves a guest that writes, and that is tracked no more then.
fn save(dir: &Dir, guest: &Contact, image: &str, parent: &Path) -> Result<Ended> {
    let save = save_on(dir, guest, image, parent);
    save.env("SNAPBACK_TEST_FAULTS", "whole stream").succeed()
}

/// A save that stands still in the pause, once it was looked what is protected.
fn save_to_the_pause(dir: &Dir, guest: &Contact, image: &str, parent: &Path) -> Result<Running> {
    let save = save_on(dir, guest, image, parent).env(STOP_AT, "scanned");
    let saving = save.env("SNAPBACK_TEST_FAULTS", "whole stream").start()?;
    saving.wait_stopped()?;
    Ok(saving)
}

fn what_was_not_written_is_the_parents(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (shared, to) = (shared(qemu)?, dir.make("reverted")?);
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    // What was written ahead of a reset was written back, and is expected to be written again.
    write_on(&mut guest)?;
    reset(dir, &mut guest)?;
    write_on(&mut guest)?;
    let (tracker, saved) = save_to_be_reset(dir, &guest, "first.snap", &shared.image)?;
    assert_tracked(&saved)?;
    assert_eq!(differing(dir, "first.snap")?, 0);

    // Now it is the tracker of that save which tells.
    write_on(&mut guest)?;
    let (second, saved) = save_to_be_reset(dir, &guest, "second.snap", &dir.path("first.snap"))?;
    tracker.succeed()?;
    assert_tracked(&saved)?;
    assert_eq!(differing(dir, "second.snap")?, 0);

    // Whoever has come after that image is no help.
    let ended = save(dir, &guest, "third.snap", &dir.path("first.snap"))?;
    second.succeed()?;
    assert_compared(ended.event("saved")?, "since another image")?;
    assert_eq!(differing(dir, "third.snap")?, 0);
    guest.check(&shared.nonce)
}

fn takes_all_for_unchanged(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let (shared, to) = (shared(Qemu::V10)?, dir.make("reverted")?);
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    write_on(&mut guest)?;
    let save = save_on(dir, &guest, "vm.snap", &shared.image);
    save.env("SNAPBACK_TEST_FAULTS", "whole stream,takes all for unchanged").succeed()?;
    assert!(differing(dir, "vm.snap")? > 100, "the test does not see wrong pages");
    Ok(())
}

/// One that is killed in the pause, once it was looked what is protected, and one that was killed before.
fn a_tracker_that_is_killed_is_not_believed(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let (shared, to) = (shared(Qemu::V10)?, dir.make("reverted")?);
    let mut guest = resettable(dir.revert(&shared.image, &shared.from, &to), &to)?;
    write_on(&mut guest)?;
    // A save that is killed there leaves all as it was.
    drop(save_to_the_pause(dir, &guest, "killed.snap", &shared.image)?);
    wait_until(SOON, "the save's keeper to be done", || {
        dir.names(".").is_ok_and(|names| !names.iter().any(|name| name.contains("killed.snap")))
    })?;
    write_on(&mut guest)?;
    reset(dir, &mut guest)?;

    let saving = save_to_the_pause(dir, &guest, "first.snap", &shared.image)?;
    send_signal(guest.server.as_ref().ok_or("no server")?.pid(), libc::SIGKILL);
    saving.signal(libc::SIGCONT);
    let ended = saving.succeed()?;
    assert_compared(ended.event("saved")?, "has ended")?;
    assert_eq!(differing(dir, "first.snap")?, 0);
    guest.check(&shared.nonce)?;

    let save = dir.save(&guest, "second.snap").with(&["--parent", text(&dir.path("first.snap"))]);
    let detached = save.with(&["--resettable", "--detach"]).succeed()?;
    let tracker = detached.event("detached")?["server_pid"].as_u64().ok_or("no process")? as u32;
    send_signal(tracker, libc::SIGKILL);
    wait_gone(tracker)?;
    let ended = save_on(dir, &guest, "third.snap", &dir.path("second.snap"));
    let ended = ended.env("SNAPBACK_TEST_FAULTS", "whole stream").succeed()?;
    assert_compared(ended.event("saved")?, "nobody tracks")?;
    assert_eq!(differing(dir, "third.snap")?, 0);
    guest.check(&shared.nonce)
}

/// A chain of saves, some of which were preceded by a reset.
fn many_saves(dir: &Dir, qemu: Qemu) -> Result<()> {
    let backends = [None, Some("memory-backend-memfd,share=on".to_string())];
    for (memory_backend, vcpus) in backends.into_iter().zip([1, 4]) {
        let options = GuestOptions { memory_backend, vcpus, rate: 0, ..options(qemu) };
        let mut guest = Guest::boot(&options)?;
        let nonce = guest.oracle.nonce()?;
        let name = |round: u64| format!("{vcpus}-{round}.snap");
        let mut tracker = dir.save(&guest, &name(0)).with(&["--resettable"]).start()?;
        tracker.wait("resettable")?;
        for round in 1..=10 {
            write_on(&mut guest)?;
            if round % 3 == 0 {
                reset(dir, &mut guest)?;
                write_on(&mut guest)?;
            }
            let parent = dir.path(&name(round - 1));
            let (next, saved) = save_to_be_reset(dir, &guest, &name(round), &parent)?;
            std::mem::replace(&mut tracker, next).succeed()?;
            assert_eq!(since(&saved)?.0, "write_protection", "{saved}");
            println!("{qemu:?}, {vcpus} vCPUs: {}", saved["changed_since"]);
            assert_eq!(differing(dir, &name(round))?, 0, "round {round}");
        }
        assert_eq!(guest.oracle.nonce()?, nonce);
        check(&mut guest)?;
    }
    Ok(())
}

/// Pages that were protected, and are missing or zeros by now.
fn what_a_balloon_gave_back(dir: &Dir) -> Result<()> {
    const RAM: u64 = 256;
    let options = GuestOptions { mib: RAM, virtio_balloon: true, ..options(Qemu::V10) };
    let mut guest = Guest::boot(&options)?;
    let nonce = guest.oracle.nonce()?;
    let mut tracker = dir.save(&guest, "vm.snap").with(&["--resettable"]).start()?;
    tracker.wait("resettable")?;
    // Some of it is used again, some not.
    for mib in [RAM - 64, RAM, RAM - 32] {
        set_balloon(&guest.qmp_path, mib)?;
    }
    write_on(&mut guest)?;
    let ended = save(dir, &guest, "child.snap", &dir.path("vm.snap"))?;
    tracker.succeed()?;
    let (by, _) = since(ended.event("saved")?)?;
    assert_eq!((by, differing(dir, "child.snap")?), ("write_protection", 0));
    assert_eq!(guest.oracle.nonce()?, nonce);
    check(&mut guest)
}
