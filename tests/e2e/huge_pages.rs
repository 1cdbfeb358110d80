//! Memory that was in huge pages is in huge pages again after a revert.

use serde_json::Value;

use crate::harness::{Dir, Ended, Reverted, check};
use crate::shared::{options, shared};
use crate::support::{Fill, Guest, GuestOptions, Pidfd, Qemu, Result, huge_bytes};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    memory_comes_back_in_huge_pages
}

tests! {
    collapsing_is_interrupted_without_harm
    qemu_may_end_while_its_memory_is_collapsed
    memory_that_came_by_the_socket_is_left_as_it_is
}

/// RAM of the guest, in MiB.
const RAM: u64 = 256;

/// A guest most of whose memory is in use: huge pages of nothing but zeros, which a guest's
/// kernel leaves, are given back by a revert for good.
fn guest(qemu: Qemu) -> Result<Guest> {
    let fill = Fill::Percent(88);
    Guest::boot(&GuestOptions { mib: RAM, fill, zero_percent: 1, writers: 1, ..options(qemu) })
}

/// Bytes in huge pages, before and after, as the program tells.
fn told(ended: &Ended) -> Result<(u64, u64, &Value)> {
    let event = ended.event("collapsed")?;
    let bytes = |name: &str| event[name].as_u64().ok_or(format!("no {name}: {event}"));
    Ok((bytes("before_bytes")?, bytes("after_bytes")?, &event["stopped"]))
}

fn memory_comes_back_in_huge_pages(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut original = guest(qemu)?;
    let nonce = original.oracle.nonce()?;
    // A save puts memory into small pages.
    let before = huge_bytes(original.pid, RAM)?;
    assert!(before > 64 << 20, "this host gives guests no huge pages: {before} bytes");
    dir.save(&original, "vm.snap").succeed()?;
    let image = dir.path("vm.snap");

    let revert = |name: &str, args: &[&str]| {
        let to = dir.make(name)?;
        let command = dir.revert(&image, &original.dir, &to).with(&["--place", "uffd"]).with(args);
        Reverted::of(command, &to)
    };
    let mut reverted = revert("left", &["--no-collapse"])?;
    let ended = reverted.resident()?;
    assert!(ended.event("collapsed").is_err(), "{ended:?}");
    let left = huge_bytes(reverted.pid, RAM)?;
    assert!(left < before / 2, "{left} bytes are in huge pages, of {before}");
    drop(reverted);

    let mut reverted = revert("collapsed", &[])?;
    let ended = reverted.resident()?;
    let (small, huge, stopped) = told(&ended)?;
    assert!(small < before / 2 && huge * 10 >= before * 9, "{before}: {small}, then {huge}");
    assert!(stopped.is_null(), "{stopped}");
    let seen = huge_bytes(reverted.pid, RAM)?;
    assert!(seen * 10 >= before * 9, "{seen} bytes are in huge pages, of {before}");
    reverted.check(&nonce)?;

    // It can be saved like any other.
    let to = dir.make("again")?;
    dir.save(&reverted, "again.snap").succeed()?;
    reverted.check(&nonce)?;
    let from = reverted.dir.clone();
    let mut again = Reverted::of(dir.revert(&dir.path("again.snap"), &from, &to), &to)?;
    again.resident()?;
    again.check(&nonce)?;
    check(&mut original)
}

/// Slow enough to be in time for an interrupt.
const SLOWLY: [&str; 5] = ["--place", "uffd", "--fill-rate", "16M", "--no-working-set"];

fn collapsing_is_interrupted_without_harm(dir: &Dir) -> Result<()> {
    let original = shared(Qemu::V7)?;
    let to = dir.make("to")?;
    let command = dir.revert(&original.image, &original.from, &to).with(&SLOWLY);
    let mut reverted = Reverted::of(command, &to)?;
    let server = reverted.server.as_mut().ok_or("no server")?;
    server.wait("resident")?;
    server.signal(libc::SIGINT);
    let ended = reverted.resident()?;
    let (_, _, stopped) = told(&ended)?;
    assert_eq!(stopped, "interrupted");
    reverted.check(&original.nonce)
}

fn qemu_may_end_while_its_memory_is_collapsed(dir: &Dir) -> Result<()> {
    let original = shared(Qemu::V7)?;
    let to = dir.make("to")?;
    let command = dir.revert(&original.image, &original.from, &to).with(&SLOWLY);
    let mut reverted = Reverted::of(command, &to)?;
    reverted.server.as_mut().ok_or("no server")?.wait("resident")?;
    Pidfd::open(reverted.pid)?.kill()?;
    let ended = reverted.resident()?;
    assert!(ended.event("collapsed").is_err(), "{ended:?}");
    Ok(())
}

fn memory_that_came_by_the_socket_is_left_as_it_is(dir: &Dir) -> Result<()> {
    let original = shared(Qemu::V7)?;
    let to = dir.make("to")?;
    let by_socket = ["--place", "socket"];
    let command = dir.revert(&original.image, &original.from, &to).with(&by_socket);
    let mut reverted = Reverted::of(command, &to)?;
    let ended = reverted.resident()?;
    assert!(ended.event("collapsed").is_err(), "{ended:?}");
    reverted.check(&original.nonce)
}
