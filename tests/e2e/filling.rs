//! In what order memory is filled, how fast, and what is remembered of it.

use std::fs;

use serde_json::Value;

use crate::harness::{Dir, Reverted, text};
use crate::shared::{copy, shared};
use crate::support::{Qemu, Result};
use crate::{tests, tests_on_both};

tests_on_both! {
    a_working_set_is_recorded_and_brought_first
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
    let image = dir.path("vm.snap");
    let shared = copy(qemu, &image)?;
    let error = dir.snapback(&["working-set", text(&image)]).fail()?;
    assert!(error.contains("no working set has been recorded yet"), "{error}");

    let mut first = dir.reverted(&image, &shared.from, "first")?;
    let demanded = demands(&mut first)?;
    let shown = dir.snapback(&["working-set", text(&image)]).succeed()?;
    let set = shown.event("working_set")?;
    assert_eq!(set["identity"], info(dir, &image)?["identity"]);
    assert!(set["pages"].as_u64() > Some(0) && set["pages"].as_u64() <= Some(demanded), "{set}");

    // With what was demanded in place before it runs, it demands less.
    let to = dir.make("second")?;
    let command = dir.revert(&image, &shared.from, &to).with(&["--preload"]);
    let mut second = Reverted::of(command, &to)?;
    second.check(&shared.nonce)?;
    let again = demands(&mut second)?;
    assert!(again < demanded, "{again} demands after {demanded}");
    first.check(&shared.nonce)?;
    second.check(&shared.nonce)
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

fn info(dir: &Dir, image: &std::path::Path) -> Result<Value> {
    Ok(dir.snapback(&["info", text(image)]).succeed()?.events[0].clone())
}
