//! The page server and its keeper in their sandbox: they are in it while they serve, and can do
//! all that they have to.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::harness::{
    Dir, Ended, Reverted, Running, STOP_AT, send_signal, text, wait_gone, wait_stopped,
};
use crate::interrupts::UNFILLED;
use crate::killed_reverts::{SUCCESSOR, kill_both, process};
use crate::shared::{copy, shared};
use crate::support::{Qemu, Result, SOON, wait_for};
use crate::{tests, tests_on_both};

tests_on_both! {
    all_that_serve_are_in_the_sandbox
    a_working_set_is_recorded_from_inside
}

tests! {
    a_guest_that_is_taken_up_by_hand_is_served_from_inside
    a_broker_that_is_silent_or_gone_hangs_nobody
    a_chain_is_served_on_by_a_successor_inside
    a_detached_server_is_in_the_sandbox
    a_server_that_dies_on_its_way_inside_is_followed_by_one_inside
    a_server_that_is_to_keep_its_rights_does
    an_image_that_others_can_read_is_warned_about
}

/// Whether each thread of a process is behind a seccomp filter and can't gain rights by exec
/// (proc_pid_status(5)).
fn is_inside(pid: u32) -> bool {
    let inside = |status: String| {
        ["Seccomp:\t2\n", "NoNewPrivs:\t1\n"].iter().all(|field| status.contains(field))
    };
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut statuses =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    statuses.all(inside)
}

/// Waits until a process is inside.
fn wait_inside(pid: u32) -> Result<()> {
    wait_for(SOON, "a process to be in its sandbox", || Ok(is_inside(pid).then_some(())))
}

const KEEPER: &str = " keeper -- ";
const BROKER: &str = " broker ";

fn server(guest: &mut Reverted) -> Result<&mut Running> {
    guest.server.as_mut().ok_or_else(|| "no server".into())
}

/// Has a successor finish. The exit status is that of the first server, which was killed.
fn finished(guest: &mut Reverted, successor: u32) -> Result<Ended> {
    send_signal(successor, libc::SIGTERM);
    let ended = guest.server.take().ok_or("no server")?.end()?;
    let resident = ended.event("resident")?;
    assert_eq!(resident["pages"], resident["total"], "{ended:?}");
    Ok(ended)
}

fn all_that_serve_are_in_the_sandbox(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let mut guest =
        Reverted::of(dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED), &to)?;
    let first = server(&mut guest)?.pid();
    wait_inside(first)?;
    let (keeper, broker) = (process(dir, KEEPER)?, process(dir, BROKER)?);
    wait_inside(keeper)?;
    assert!(!is_inside(guest.pid) && !is_inside(broker));

    // What is started from inside is inside.
    send_signal(keeper, libc::SIGKILL);
    wait_gone(keeper)?;
    let keeper = process(dir, KEEPER)?;
    wait_for(SOON, "the new keeper", || {
        // What it is told last but one.
        Ok(fs::read_link(format!("/proc/{keeper}/fd/74")).is_ok().then_some(()))
    })?;
    wait_inside(keeper)?;
    server(&mut guest)?.signal(libc::SIGKILL);
    server(&mut guest)?.wait("taken_over")?;
    let successor = process(dir, SUCCESSOR)?;
    assert!(is_inside(successor));
    guest.check(&shared.nonce)?;

    let ended = finished(&mut guest, successor)?;
    assert!(ended.stderr.is_empty(), "{ended:?}");
    [successor, keeper, broker].into_iter().try_for_each(wait_gone)?;
    assert_eq!(dir.names("reverted")?, ["qmp.sock", "serial0.log", "serial1.sock"]);
    guest.check(&shared.nonce)
}

fn a_working_set_is_recorded_from_inside(dir: &Dir, qemu: Qemu) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(qemu, &image)?;
    let mut guest = dir.reverted(&image, &shared.from, "reverted")?;
    let ended = guest.resident()?;
    assert!(ended.stderr.is_empty(), "{ended:?}");
    assert_eq!(dir.names(".")?, ["reverted", "vm.snap", "vm.snap.ws"]);
    // It is used, and followed by another.
    let shown = dir.snapback(&["working-set", text(&image)]).succeed()?;
    assert!(shown.event("working_set")?["pages"].as_u64().is_some_and(|pages| pages > 0));
    guest.check(&shared.nonce)
}

fn a_chain_is_served_on_by_a_successor_inside(dir: &Dir) -> Result<()> {
    let base = dir.path("base.snap");
    let shared = copy(Qemu::V7, &base)?;
    let to = dir.make("first")?;
    let mut first = Reverted::of(dir.revert(&base, &shared.from, &to), &to)?;
    first.resident()?;
    let top = dir.path("top.snap");
    dir.save(&first, "top.snap").with(&["--parent", text(&base)]).succeed()?;
    let nonce = first.oracle.nonce()?;
    drop(first);

    let to = dir.make("second")?;
    let from = dir.path("first");
    let mut second = Reverted::of(dir.revert(&top, &from, &to).with(&UNFILLED), &to)?;
    wait_inside(server(&mut second)?.pid())?;
    wait_inside(process(dir, KEEPER)?)?;
    server(&mut second)?.signal(libc::SIGKILL);
    server(&mut second)?.wait("taken_over")?;
    let successor = process(dir, SUCCESSOR)?;
    let ended = finished(&mut second, successor)?;
    assert!(ended.stderr.is_empty(), "{ended:?}");
    second.check(&nonce)
}

fn a_guest_that_is_taken_up_by_hand_is_served_from_inside(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let to = dir.make("reverted")?;
    let mut guest =
        Reverted::of(dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED), &to)?;
    guest.log.wait_beat(0, SOON)?;
    kill_both(dir, &mut guest)?;
    let pid = guest.pid.to_string();
    let resume = dir.snapback(&["resume", text(&shared.image), "--pid", &pid]);
    let mut resumed = resume.with(&UNFILLED[..2]).start()?;
    resumed.wait("taken_over")?;
    wait_inside(resumed.pid())?;
    let (keeper, broker) = (process(dir, KEEPER)?, process(dir, BROKER)?);
    wait_inside(keeper)?;
    resumed.signal(libc::SIGTERM);
    let ended = resumed.succeed()?;
    assert!(ended.event("resident").is_ok() && ended.stderr.is_empty(), "{ended:?}");
    [keeper, broker].into_iter().try_for_each(wait_gone)?;
    guest.check(&shared.nonce)
}

fn a_broker_that_is_silent_or_gone_hangs_nobody(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    for (name, signal) in [("silent", libc::SIGSTOP), ("gone", libc::SIGKILL)] {
        let to = dir.make(name)?;
        let mut guest =
            Reverted::of(dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED), &to)?;
        let server = server(&mut guest)?;
        wait_inside(server.pid())?;
        let broker = process(dir, BROKER)?;
        send_signal(broker, signal);
        server.signal(libc::SIGTERM);
        guest.resident()?;
        wait_gone(broker)?;
        guest.check(&shared.nonce)?;
    }
    Ok(())
}

fn a_detached_server_is_in_the_sandbox(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to);
    let ended = revert.with(&UNFILLED).with(&["--detach"]).succeed()?;
    let event = ended.event("detached")?;
    let server = event["server_pid"].as_u64().ok_or("no server")? as u32;
    wait_inside(server)?;
    let log = event["log"].as_str().ok_or("no log")?.to_owned();
    send_signal(server, libc::SIGTERM);
    wait_gone(server)?;
    let log = fs::read_to_string(Path::new(&log))?;
    assert!(log.contains("\"resident\"") && !log.contains("WARN"), "{log}");
    let pid = ended.event("running")?["pid"].as_u64().ok_or("no QEMU")? as u32;
    send_signal(pid, libc::SIGKILL);
    wait_gone(pid)
}

fn a_server_that_dies_on_its_way_inside_is_followed_by_one_inside(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED);
    let mut guest = Reverted::of(revert.env(STOP_AT, "outside"), &to)?;
    server(&mut guest)?.wait_stopped()?;
    let (keeper, broker) = (process(dir, KEEPER)?, process(dir, BROKER)?);
    server(&mut guest)?.signal(libc::SIGKILL);
    server(&mut guest)?.wait("taken_over")?;
    let successor = process(dir, SUCCESSOR)?;
    // It comes the same way, with a broker of its own.
    wait_stopped(successor)?;
    wait_gone(broker)?;
    assert!(!is_inside(successor) && !is_inside(keeper));
    let broker = process(dir, BROKER)?;
    send_signal(successor, libc::SIGCONT);
    wait_inside(successor)?;
    wait_inside(keeper)?;
    let ended = finished(&mut guest, successor)?;
    assert!(ended.stderr.is_empty(), "{ended:?}");
    [successor, keeper, broker].into_iter().try_for_each(wait_gone)?;
    guest.check(&shared.nonce)
}

fn a_server_that_is_to_keep_its_rights_does(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to);
    let slow = ["--no-sandbox", "--no-working-set", "--fill-rate", "1M"];
    let mut guest = Reverted::of(revert.with(&slow), &to)?;
    let server = server(&mut guest)?;
    // From here on it would be. It may have been told ahead of `running`.
    if !server.said().iter().any(|line| line.contains("placing")) {
        server.wait("placing")?;
    }
    server.wait("progress")?;
    server.wait("progress")?;
    let pid = server.pid();
    assert!(!is_inside(pid) && !is_inside(process(dir, KEEPER)?));
    assert!(!dir.processes().iter().any(|(_, line)| line.contains(BROKER)));
    send_signal(pid, libc::SIGTERM);
    guest.resident()?;
    guest.check(&shared.nonce)
}

fn an_image_that_others_can_read_is_warned_about(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V10, &image)?;
    let info = || dir.snapback(&["info", text(&image)]);
    assert!(info().succeed()?.event("warning").is_err());
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640))?;
    let remedy = format!("its group may read `{0}`", image.display());
    let warns = |ended: &Ended| -> Result<bool> {
        let says = ended.event("warning")?["says"].as_str().unwrap_or_default().to_owned();
        Ok(says.starts_with(&remedy) && says.contains("`chmod 600 "))
    };
    assert!(warns(&info().succeed()?)?);
    let told = info().plain().end()?;
    assert!(told.stderr.starts_with(&format!("snapback: warning: {remedy}")), "{told:?}");

    let mut guest = dir.reverted(&image, &shared.from, "reverted")?;
    assert!(warns(&guest.resident()?)?);
    let saved = dir.save(&guest, "next.snap").with(&["--parent", text(&image)]).succeed()?;
    assert!(warns(&saved)?);
    guest.check(&shared.nonce)
}
