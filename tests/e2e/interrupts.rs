//! Ctrl-C, or a polite end, at every phase of a save and of a revert.
//!
//! A phase can't be held up from outside. But with QEMU stopped (SIGSTOP) nothing
//! goes beyond the phase at hand; a test that was too late for it tries again.

use std::fs;

use crate::bare::query;
use crate::harness::{Dir, Ended, Reverted, Running, check, send_signal, text, wait_gone};
use crate::shared::{Borrowed, borrow, shared};
use crate::support::{Qemu, Result, SOON, query_status, wait_until};
use crate::trouble::write_script;
use crate::{tests, tests_on_both};

tests_on_both! {
    a_save_is_interrupted_before_the_moment
    a_save_is_interrupted_after_the_moment
    a_revert_is_interrupted_before_the_guest_runs
    a_revert_is_interrupted_while_the_guest_needs_it
}

tests! {
    a_save_is_interrupted_while_qemu_does_not_answer
    a_revert_is_interrupted_before_qemu_is_up
    a_detached_revert_is_interrupted_before_qemu_is_up
}

/// How often a test tries to be in time for a phase.
const TRIES: usize = 20;

/// A process that stands still. Dropping it lets it go on.
struct Stopped(u32);

impl Stopped {
    fn new(pid: u32) -> Stopped {
        send_signal(pid, libc::SIGSTOP);
        Stopped(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        send_signal(self.0, libc::SIGCONT);
    }
}

/// Waits until the program listens for signals.
fn wait_listening(program: &Running) -> Result<()> {
    let caught = |bit: u64| {
        let status = fs::read_to_string(format!("/proc/{}/status", program.pid())).ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        Some(u64::from_str_radix(mask.trim(), 16).ok()? >> (bit - 1) & 1 == 1)
    };
    wait_until(SOON, "the program to listen for signals", || {
        [libc::SIGINT, libc::SIGTERM].into_iter().all(|signal| caught(signal as u64) == Some(true))
    })
}

/// Interrupts saves until one comes to nothing by that.
fn interrupt_saves(
    dir: &Dir,
    original: &mut Borrowed,
    interrupt: impl Fn(&Borrowed, &mut Running) -> Result<()>,
) -> Result<()> {
    let capabilities = query(&original.qmp_path, "query-migrate-capabilities")?;
    for _ in 0..TRIES {
        let mut save = dir.save(original, "vm.snap").start()?;
        interrupt(original, &mut save)?;
        let ended = save.end()?;
        if ended.code == Some(0) {
            fs::remove_file(dir.path("vm.snap"))?;
            continue;
        }
        let told = ended.failure()?;
        assert!(told.contains("interrupted: the guest runs on"), "{told}");
        assert!(dir.names(".")?.is_empty());
        assert_eq!(query_status(&original.qmp_path)?, "running");
        assert_eq!(query(&original.qmp_path, "query-migrate-capabilities")?, capabilities);
        check(original)?;
        // Nothing stands in the way of another.
        dir.save(original, "vm.snap").succeed()?;
        return check(original);
    }
    Err("the save was always faster".into())
}

fn a_save_is_interrupted_before_the_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    interrupt_saves(dir, &mut borrow(qemu)?, |original, save| {
        save.wait("checked")?;
        let stopped = Stopped::new(original.pid);
        save.signal(libc::SIGINT);
        drop(stopped);
        Ok(())
    })
}

fn a_save_is_interrupted_after_the_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    interrupt_saves(dir, &mut borrow(qemu)?, |_, save| {
        save.wait("moment")?;
        save.signal(libc::SIGTERM);
        Ok(())
    })
}

fn a_save_is_interrupted_while_qemu_does_not_answer(dir: &Dir) -> Result<()> {
    let mut original = borrow(Qemu::V7)?;
    let stopped = Stopped::new(original.pid);
    let save = dir.save(&original, "vm.snap").start()?;
    wait_listening(&save)?;
    save.signal(libc::SIGINT);
    let told = save.end()?.failure()?;
    assert!(told.contains("interrupted"), "{told}");
    drop(stopped);
    check(&mut original)
}

/// What an interrupted revert has to leave: nothing.
fn is_gone(dir: &Dir, folder: &str, ended: &Ended) -> Result<()> {
    let told = ended.failure()?;
    assert!(told.contains("interrupted"), "{told}");
    if let Ok(ready) = ended.event("qemu_ready") {
        wait_gone(ready["pid"].as_u64().ok_or("no pid")? as u32)?;
    }
    assert_eq!(dir.sockets(folder)?, Vec::<String>::new());
    Ok(())
}

fn a_revert_is_interrupted_before_qemu_is_up(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let (script, to) = (dir.path("qemu"), dir.make("reverted")?);
    write_script(&script, Qemu::V7, "touch started; while :; do sleep 0.1; done")?;
    let args = ["--qemu", text(&script)];
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&args).start()?;
    wait_until(SOON, "QEMU to be started", || to.join("started").exists())?;
    revert.signal(libc::SIGTERM);
    is_gone(dir, "reverted", &revert.end()?)
}

fn a_detached_revert_is_interrupted_before_qemu_is_up(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let (script, to) = (dir.path("qemu"), dir.make("reverted")?);
    write_script(&script, Qemu::V7, "touch started; while :; do sleep 0.1; done")?;
    let args = ["--qemu", text(&script), "--detach"];
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&args).start()?;
    wait_until(SOON, "QEMU to be started", || to.join("started").exists())?;
    revert.signal(libc::SIGINT);
    is_gone(dir, "reverted", &revert.end()?)?;
    assert!(dir.names("snapback")?.is_empty());
    Ok(())
}

fn a_revert_is_interrupted_before_the_guest_runs(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    for number in 0..TRIES {
        let name = format!("reverted-{number}");
        let to = dir.make(&name)?;
        let mut revert = dir.revert(&shared.image, &shared.from, &to).start()?;
        let pid = revert.wait("qemu_ready")?["pid"].as_u64().ok_or("no pid")? as u32;
        let stopped = Stopped::new(pid);
        revert.signal(if qemu == Qemu::V7 { libc::SIGINT } else { libc::SIGTERM });
        let event = revert.wait_any(&["error", "running"])?;
        if event["event"] == "error" {
            let ended = revert.end()?;
            // It was killed as it stood.
            std::mem::forget(stopped);
            return is_gone(dir, &name, &ended);
        }
        // Too late. It goes on, and must not be left to itself.
        drop(stopped);
        let _ = revert.end()?;
        send_signal(pid, libc::SIGKILL);
        wait_gone(pid)?;
    }
    Err("the revert was always faster".into())
}

fn a_revert_is_interrupted_while_the_guest_needs_it(dir: &Dir, qemu: Qemu) -> Result<()> {
    // Once finishes what is under way, twice ends it.
    let (mut once, mut twice) = (false, false);
    for number in 0..TRIES {
        let shared = shared(qemu)?;
        let name = format!("reverted-{number}");
        let to = dir.make(&name)?;
        let mut revert = dir.revert(&shared.image, &shared.from, &to).start()?;
        let pid = revert.wait("running")?["pid"].as_u64().ok_or("no pid")? as u32;
        let stopped = Stopped::new(pid);
        revert.signal(libc::SIGINT);
        let event = revert.wait_any(&["still_needed", "resident"])?;
        let in_time = event["event"] == "still_needed";
        if in_time && once {
            revert.signal(libc::SIGTERM);
            let ended = revert.end()?;
            std::mem::forget(stopped);
            is_gone(dir, &name, &ended)?;
            twice = true;
            break;
        }
        drop(stopped);
        let mut guest = Reverted::take(revert, pid, &to)?;
        guest.resident()?;
        guest.check(&shared.nonce)?;
        once |= in_time;
    }
    assert!(once && twice, "the revert was always faster");
    Ok(())
}
