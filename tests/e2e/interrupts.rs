//! Ctrl-C, or a polite end, at every phase of a save and of a revert.
//!
//! A phase can't be held up from outside. But with QEMU stopped (SIGSTOP) nothing
//! goes beyond the phase at hand; a test that was too late for it tries again.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::bare::{Bare, query};
use crate::harness::{Dir, Ended, Reverted, Running, check, send_signal, text, wait_gone};
use crate::moments::{records, records_on};
use crate::shared::{Borrowed, borrow, options, shared};
use crate::support::{
    Attached, Disk, Fill, Format, Guest, GuestOptions, Qemu, Result, SOON, qmp, query_status,
    wait_for, wait_until,
};
use crate::trouble::write_script;
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_save_is_interrupted_before_the_moment
    a_save_is_interrupted_after_the_moment
    a_save_of_a_guest_that_writes_to_its_disks_is_interrupted
    a_save_that_was_killed_is_recovered
    a_revert_is_interrupted_before_the_guest_runs
    a_revert_is_interrupted_while_the_guest_needs_it
}

tests_on_both_at_length! {
    a_guest_that_is_migrated_before_its_revert_has_ended_lives
}

tests! {
    a_save_is_interrupted_while_qemu_does_not_answer
    a_slow_save_is_interrupted_after_qemu_has_sent_all
    a_second_interrupt_gives_a_guest_up
    a_command_that_never_ends_is_not_waited_for_after_an_interrupt
    a_revert_is_interrupted_while_it_checks_the_image
    a_revert_is_interrupted_before_qemu_is_up
    a_detached_revert_is_interrupted_before_qemu_is_up
}

/// How often a test tries to be in time for a phase.
const TRIES: usize = 20;

/// Has a revert fill nothing by itself: the guest needs it until it is told to hurry.
pub const UNFILLED: [&str; 3] = ["--fill-delay", "1000000", "--no-working-set"];

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

/// Waits until the program has no thread of this name any more.
fn wait_without_thread(program: &Running, name: &str) -> Result<()> {
    let tasks = format!("/proc/{}/task", program.pid());
    let is_it = |task: std::io::Result<fs::DirEntry>| {
        let comm = task.and_then(|task| fs::read_to_string(task.path().join("comm")));
        comm.is_ok_and(|comm| comm.trim() == name)
    };
    wait_until(SOON, &format!("the thread `{name}` to end"), || {
        fs::read_dir(&tasks).is_ok_and(|mut tasks| !tasks.any(is_it))
    })
}

/// Cancellation saves until one comes to nothing by that.
fn interrupt_saves(
    dir: &Dir,
    qemu: Qemu,
    args: &[&str],
    all_was_sent: bool,
    interrupt: impl Fn(&Borrowed, &mut Running) -> Result<()>,
) -> Result<()> {
    let original = &mut borrow(qemu)?;
    let capabilities = query(&original.qmp_path, "query-migrate-capabilities")?;
    for _ in 0..TRIES {
        let mut save = dir.save(original, "vm.snap").with(args).start()?;
        interrupt(original, &mut save)?;
        let ended = save.end()?;
        if ended.code == Some(0) {
            fs::remove_file(dir.path("vm.snap"))?;
            continue;
        }
        let told = ended.failure()?;
        assert!(told.contains("interrupted: the guest runs on"), "{told}");
        // QEMU 7.2 lets go of a guest only once it has sent all memory, if it has begun to.
        let drained = ended.event("draining").is_ok();
        assert!(!drained || qemu == Qemu::V7 && !all_was_sent);
        assert!(drained || qemu != Qemu::V7 || all_was_sent || ended.event("moment").is_err());
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
    interrupt_saves(dir, qemu, &[], false, |original, save| {
        save.wait("checked")?;
        let stopped = Stopped::new(original.pid);
        save.signal(libc::SIGINT);
        drop(stopped);
        Ok(())
    })
}

fn a_save_is_interrupted_after_the_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    interrupt_saves(dir, qemu, &[], false, |_, save| {
        save.wait("moment")?;
        save.signal(libc::SIGTERM);
        Ok(())
    })
}

/// Its overlays are folded back while it writes to them, and nothing of that is lost.
fn a_save_of_a_guest_that_writes_to_its_disks_is_interrupted(dir: &Dir, qemu: Qemu) -> Result<()> {
    const ROUNDS: usize = 3;
    let (first, second) = (dir.path("first.raw"), dir.path("second.raw"));
    let disks = vec![Disk::new("first", &first), Disk::new("second", &second)];
    disks[0].make_ext4(48)?;
    disks[1].make_ext4(48)?;
    let fill = Fill::Mib(24);
    let mut guest = Guest::boot(&GuestOptions { disks, fill, rate: 500, ..options(qemu) })?;
    let nonce = guest.oracle.nonce()?;
    guest.oracle.ask("records start /dev/vda 0")?;
    guest.oracle.ask("disk write /dev/vdb 64 1")?;

    let mut rounds = 0;
    for _ in 0..TRIES {
        let before = dir.names(".")?;
        let mut save = dir.save(&guest, "vm.snap").start()?;
        save.wait("moment")?;
        let told = records(&mut guest)?;
        save.signal(libc::SIGTERM);
        let ended = save.end()?;
        if ended.code == Some(0) {
            fs::remove_file(dir.path("vm.snap"))?;
            continue;
        }
        assert!(ended.failure()?.contains("interrupted: the guest runs on"), "{ended:?}");
        let folded = ended.events.iter().filter(|event| event["event"] == "folded").count();
        assert_eq!(folded, 2, "{ended:?}");
        assert_eq!(dir.names(".")?, before);
        assert_eq!(guest.oracle.ask("disk check /dev/vdb 64 1")?, "ok");
        wait_for(SOON, "more records", || Ok((records(&mut guest)? > told + 10).then_some(())))?;
        rounds += 1;
        if rounds == ROUNDS {
            break;
        }
    }
    assert_eq!(rounds, ROUNDS, "the save was always faster");
    let checked = guest.oracle.ask_within("records check", Duration::from_secs(300))?;
    assert!(checked.starts_with("ok "), "{checked}");
    check(&mut guest)?;
    // Nothing stands in the way of another.
    dir.save(&guest, "vm.snap").succeed()?;
    check(&mut guest)?;
    let written = records(&mut guest)?;
    let overlay = query(&guest.qmp_path, "query-block")?[0]["inserted"]["file"].clone();
    drop(guest);
    let overlay = Path::new(overlay.as_str().ok_or("no overlay")?);
    assert!(records_on(dir, overlay, Format::Qcow2, &nonce)? >= written);
    // What lies frozen below is whole by itself.
    records_on(dir, &first, Format::Raw, &nonce).map(drop)
}

/// A guest without disks.
fn a_save_that_was_killed_is_recovered(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&GuestOptions { rate: 0, ..options(qemu) })?;
    let recover = || {
        let ended = dir.save(&guest, "vm.snap").with(&["--recover"]).succeed()?;
        Ok::<_, crate::support::Error>(ended.event("recovered")?["outcome"].clone())
    };
    assert_eq!(recover()?, "nothing");
    for _ in 0..TRIES {
        let mut save = dir.save(&guest, "vm.snap").with(&["--no-keeper"]).start()?;
        save.wait("moment")?;
        save.signal(libc::SIGKILL);
        drop(save);
        if dir.path("vm.snap").exists() {
            fs::remove_file(dir.path("vm.snap"))?;
            continue;
        }
        assert_eq!(recover()?, "undone");
        check(&mut guest)?;
        dir.save(&guest, "vm.snap").succeed()?;
        return check(&mut guest);
    }
    Err("the save was always faster".into())
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

/// QEMU has sent all while much of it waits for its turn to be written.
fn a_slow_save_is_interrupted_after_qemu_has_sent_all(dir: &Dir) -> Result<()> {
    interrupt_saves(dir, Qemu::V7, &["--bandwidth", "16M"], true, |_, save| {
        save.wait("moment")?;
        wait_without_thread(save, "receive")?;
        save.signal(libc::SIGINT);
        Ok(())
    })
}

fn a_second_interrupt_gives_a_guest_up(dir: &Dir) -> Result<()> {
    for _ in 0..TRIES {
        let original = Bare::start(dir, Qemu::V7, &["-m", "1G"])?;
        let args = ["save", "--qmp", text(&original.socket), "vm.snap"];
        let mut save = dir.snapback(&args).start()?;
        save.wait("moment")?;
        let stopped = Stopped::new(original.pid());
        save.signal(libc::SIGINT);
        // QEMU may have sent everything by now, and stand still with its answers.
        if save.wait_any(&["draining", "saved"])?["event"] == "draining" {
            save.signal(libc::SIGTERM);
            let told = save.end()?.failure()?;
            assert!(told.contains("interrupted twice") && told.contains("may hang"), "{told}");
            assert!(!dir.path("vm.snap").exists());
            drop(stopped);
            let ended = dir.snapback(&args).with(&["--recover"]).succeed()?;
            assert_eq!(ended.event("recovered")?["outcome"], "undone");
            return dir.snapback(&args).succeed().map(drop);
        }
        fs::remove_file(dir.path("vm.snap"))?;
    }
    Err("the save was always faster".into())
}

fn a_command_that_never_ends_is_not_waited_for_after_an_interrupt(dir: &Dir) -> Result<()> {
    let original = Bare::start(dir, Qemu::V7, &[])?;
    // Its end has to be told to more than the shell.
    let command = "sleep 1000000 & echo $! >sleeper.new; mv sleeper.new sleeper; wait; wait";
    let args = ["save", "--qmp", text(&original.socket), "vm.snap", "--on-moment", command];
    let mut save = dir.snapback(&args).start()?;
    save.wait("saved")?;
    wait_until(SOON, "the command to be under way", || dir.path("sleeper").exists())?;
    save.signal(libc::SIGINT);
    let told = save.end()?.failure()?;
    assert!(told.contains("--on-moment") && told.contains("interrupted"), "{told}");
    dir.snapback(&["verify", "vm.snap"]).succeed()?;
    wait_gone(fs::read_to_string(dir.path("sleeper"))?.trim().parse()?)
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

fn a_revert_is_interrupted_while_it_checks_the_image(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    for _ in 0..TRIES {
        let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--check"]).start()?;
        wait_listening(&revert)?;
        revert.signal(libc::SIGINT);
        let ended = revert.end()?;
        is_gone(dir, "reverted", &ended)?;
        if ended.failure()?.contains("still being checked") {
            return Ok(());
        }
    }
    Err("the check was always faster".into())
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
    assert!(dir.recorded()?.is_empty());
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
    let shared = shared(qemu)?;
    // Once: it finishes.
    let to = dir.make("once")?;
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED);
    let mut guest = Reverted::of(revert, &to)?;
    let server = guest.server.as_mut().ok_or("no server")?;
    server.signal(if qemu == Qemu::V7 { libc::SIGINT } else { libc::SIGTERM });
    server.wait("still_needed")?;
    guest.resident()?;
    guest.check(&shared.nonce)?;

    // Twice: the guest ends with it. The first interrupt has it fill memory at full
    // speed, but it can't end before QEMU says so.
    let to = dir.make("twice")?;
    let mut revert = dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED).start()?;
    let pid = revert.wait("running")?["pid"].as_u64().ok_or("no pid")? as u32;
    let stopped = Stopped::new(pid);
    revert.signal(libc::SIGINT);
    revert.wait("still_needed")?;
    revert.signal(libc::SIGINT);
    let ended = revert.end()?;
    // It was killed as it stood.
    std::mem::forget(stopped);
    is_gone(dir, "twice", &ended)
}

/// The program is held up when QEMU has all memory, and hears of it only when somebody has
/// begun something else with the guest.
fn a_guest_that_is_migrated_before_its_revert_has_ended_lives(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let args = [&UNFILLED[..], &["--place", "uffd"]].concat();
    let mut revert = dir.revert(&shared.image, &shared.from, &to).with(&args).start()?;
    let pid = revert.wait("qemu_ready")?["pid"].as_u64().ok_or("no pid")? as u32;
    // It runs, and the direct way is open, whichever comes first.
    revert.wait_any(&["running", "placing"])?;
    revert.wait_any(&["running", "placing"])?;

    // Memory is filled although QEMU stands still; it can't confirm the end.
    let stopped = Stopped::new(pid);
    revert.signal(libc::SIGINT);
    wait_without_thread(&revert, "fill")?;
    let held_up = Stopped::new(revert.pid());
    drop(stopped);
    let socket = to.join("qmp.sock");
    let wait_status = |wanted: &str| {
        wait_until(SOON, wanted, || {
            query(&socket, "query-migrate").is_ok_and(|info| info["status"] == wanted)
        })
    };
    wait_status("completed")?;
    let nobody_reads = dir.path("nobody.sock");
    let _listener = UnixListener::bind(&nobody_reads)?;
    qmp(&socket, "migrate", json!({ "uri": format!("unix:{}", text(&nobody_reads)) }))?;
    wait_status("active")?;
    drop(held_up);

    let ended = revert.end()?;
    assert!(ended.code == Some(0) && ended.stderr.contains("memory is complete"), "{ended:?}");
    ended.event("resident")?;
    let mut guest = Attached::to(pid, &to)?;
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    check(&mut guest)
}
