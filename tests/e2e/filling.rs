//! In what order memory is filled, how fast, and what is remembered of it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Dir, Reverted, check, text};
use crate::shared::{MIB, copy, options, shared};
use crate::support::{Guest, GuestOptions, Qemu, Qmp, Result, SOON, wait_for};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_working_set_is_recorded_and_brought_first
    a_balloon_may_inflate_while_memory_is_filled
}

tests_on_both_at_length! {
    a_working_set_is_harvested_from_a_guest_that_is_thrown_away
}

tests! {
    a_useless_working_set_is_ignored
    filling_waits_for_a_quiet_guest_and_hurries_when_interrupted
}

fn demands(reverted: &mut Reverted) -> Result<u64> {
    let ended = reverted.resident()?;
    ended.event("resident")?["demands"].as_u64().ok_or("no count of demands".into())
}

fn a_working_set_is_recorded_and_brought_first(dir: &Dir, qemu: Qemu) -> Result<()> {
    // A guest that does the same at every revert, and touches little.
    let mut guest = Guest::boot(&GuestOptions { writers: 0, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    let image = dir.path("vm.snap");
    dir.save(&guest, "vm.snap").succeed()?;
    let error = dir.snapback(&["working-set", text(&image)]).fail()?;
    assert!(error.contains("no working set has been recorded yet"), "{error}");

    // What is demanded before filling begins is the working set.
    let first = watched(dir, &image, &guest, "first", &[])?;
    let shown = dir.snapback(&["working-set", text(&image)]).succeed()?;
    let set = shown.event("working_set")?;
    assert_eq!(set["identity"], info(dir, &image)?["identity"]);
    assert_eq!(set["pages"].as_u64(), Some(first), "{set}");

    // With that in place before it runs, the guest demands little more.
    let second = watched(dir, &image, &guest, "second", &["--preload"])?;
    assert!(second * 2 < first, "{second} demands after {first}");
    assert_eq!(guest.oracle.nonce()?, nonce);
    check(&mut guest)
}

/// Reverts a guest, lets it run for some heartbeats before its memory is filled, and
/// returns how many pages it demanded.
fn watched(
    dir: &Dir,
    image: &std::path::Path,
    guest: &Guest,
    name: &str,
    more: &[&str],
) -> Result<u64> {
    let to = dir.make(name)?;
    let slow = ["--fill-delay", "100000"];
    let command = dir.revert(image, &guest.dir, &to).with(&slow).with(more);
    let mut reverted = Reverted::of(command, &to)?;
    let beat = reverted.log.wait_beat(0, SOON)?;
    reverted.log.wait_beat(beat.number + 20, SOON)?;
    reverted.server.as_ref().ok_or("no server")?.signal(libc::SIGINT);
    let demanded = demands(&mut reverted)?;
    check(&mut reverted)?;
    Ok(demanded)
}

fn a_working_set_is_harvested_from_a_guest_that_is_thrown_away(
    dir: &Dir,
    qemu: Qemu,
) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(qemu, &image)?;
    let log = fs::metadata(shared.from.join("serial0.log"))?.len();
    let args = ["working-set", text(&image), "--harvest", "--window", "1"];
    let ended = dir.snapback(&args).succeed()?;
    assert!(ended.event("working_set")?["pages"].as_u64() > Some(0));
    assert_eq!(dir.names(".")?, ["vm.snap", "vm.snap.ws"]);
    // The throw-away guest, whose log is the living one's by its command line, wrote
    // nothing there: no heartbeat came twice.
    let text = fs::read_to_string(shared.from.join("serial0.log"))?;
    let beats: Vec<u64> = text[log as usize..]
        .lines()
        .filter_map(|line| line.strip_prefix("BEAT ")?.split(' ').next()?.parse().ok())
        .collect();
    assert!(beats.is_sorted(), "two guests wrote one log");
    Ok(())
}

fn a_useless_working_set_is_ignored(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V7, &image)?;
    for useless in [&b"nonsense"[..], &[0; 4096], b""] {
        fs::write(dir.path("vm.snap.ws"), useless)?;
        let folder = format!("to-{}", useless.len());
        let mut reverted = dir.reverted(&image, &shared.from, &folder)?;
        reverted.check(&shared.nonce)?;
        let server = reverted.server.take().ok_or("no server")?.end()?;
        assert_eq!(server.code, Some(0));
        assert!(server.stderr.contains("reverting without a working set"), "{}", server.stderr);
        // It has been replaced by one that is of use.
        dir.snapback(&["working-set", text(&image)]).succeed()?;
    }
    Ok(())
}

fn filling_waits_for_a_quiet_guest_and_hurries_when_interrupted(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("to")?;
    let slow = ["--no-working-set", "--fill-delay", "100000", "--fill-rate", "1K"];
    let command = dir.revert(&shared.image, &shared.from, &to).with(&slow);
    let mut reverted = Reverted::of(command, &to)?;
    reverted.oracle.ping()?;
    let server = reverted.server.as_mut().ok_or("no server")?;
    let progress = server.wait("progress")?;
    assert!(progress["pages"].as_u64() < progress["total"].as_u64(), "{progress}");
    server.signal(libc::SIGINT);
    server.wait("still_needed")?;
    reverted.resident()?;
    reverted.check(&shared.nonce)
}

/// QEMU keeps what the guest puts into its balloon as long as a postcopy migration comes in.
/// Were it to give those pages back, the guest would wait forever for the ones that were in
/// place: they are installed only once.
fn a_balloon_may_inflate_while_memory_is_filled(dir: &Dir, qemu: Qemu) -> Result<()> {
    const RAM: u64 = 2 * MIB;
    let mut guest = Guest::boot(&GuestOptions { mib: RAM, virtio_balloon: true, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    for mib in [RAM - 32, RAM] {
        set_balloon(&guest.qmp_path, mib)?;
    }
    let image = dir.path("vm.snap");
    dir.save(&guest, "vm.snap").succeed()?;

    let to = dir.make("to")?;
    let slow = ["--no-working-set", "--fill-delay", "100000", "--fill-rate", "1K"];
    let mut reverted = Reverted::of(dir.revert(&image, &guest.dir, &to).with(&slow), &to)?;
    for mib in [RAM - 32, RAM, RAM - 16] {
        set_balloon(&reverted.qmp_path, mib)?;
    }
    let server = reverted.server.as_mut().ok_or("no server")?;
    let progress = server.wait("progress")?;
    assert!(progress["pages"].as_u64() < progress["total"].as_u64(), "{progress}");
    server.signal(libc::SIGINT);
    reverted.resident()?;
    reverted.check(&nonce)?;

    // Now it does give them back, and the guest gets new ones.
    for mib in [RAM - 32, RAM] {
        set_balloon(&reverted.qmp_path, mib)?;
    }
    reverted.check(&nonce)
}

/// Leaves the guest that many MiB, and waits until its balloon holds the rest.
pub fn set_balloon(socket: &Path, mib: u64) -> Result<()> {
    let bytes = mib << 20;
    let mut qmp = Qmp::connect(socket)?;
    qmp.execute("balloon", json!({"value": bytes}))?;
    let mut actual = 0;
    wait_for(SOON, "the balloon", || {
        let balloon = qmp.execute("query-balloon", json!({}))?;
        actual = balloon["actual"].as_u64().ok_or("no actual size")?;
        Ok((actual == bytes).then_some(()))
    })
    .map_err(|e| format!("{e}: {actual} bytes are the guest's, not {bytes}").into())
}

fn info(dir: &Dir, image: &std::path::Path) -> Result<Value> {
    Ok(dir.snapback(&["info", text(image)]).succeed()?.events[0].clone())
}
