//! A revert whose processes are killed while the guest depends on them: the guest goes on, its
//! memory is right, and nothing is left behind.

use std::time::{Duration, Instant};

use crate::bare::{Bare, query};
use crate::harness::{
    Dir, Reverted, Running, check, in_a_folder, print_times, send_signal, text, wait_gone,
};
use crate::interrupts::UNFILLED;
use crate::shared::{options, shared};
use crate::support::{Fill, Guest, GuestOptions, Pidfd, Qemu, Result, SOON, wait_for};
use crate::{tests, tests_on_both};

tests_on_both! {
    a_server_is_killed_while_it_fills
    a_server_is_killed_while_it_waits
    a_server_is_killed_that_serves_by_socket
    servers_are_killed_as_soon_as_they_serve
    a_keeper_is_killed_and_then_the_server
    qemu_is_killed_and_all_end_with_it
    both_are_killed_while_it_fills
    both_are_killed_while_it_waits
    both_are_killed_that_serve_by_socket
    a_server_by_socket_is_succeeded_directly
}

tests! {
    a_detached_server_is_killed
    a_server_that_dies_too_often_is_given_up
    a_server_that_stands_still_is_not_replaced
    a_revert_without_a_keeper_starts_none
    a_guest_that_is_served_or_another_images_is_not_taken_up
}

/// Fills memory, and takes some seconds for that.
pub const SLOWLY: [&str; 3] = ["--fill-rate", "12M", "--no-working-set"];

/// Fills memory all the while that a test takes.
const SLOWER: [&str; 3] = ["--fill-rate", "1M", "--no-working-set"];

/// What the command line of a new server begins with.
pub const SUCCESSOR: &str = "snapback resume --inherited";

/// A revert under way whose server may be killed.
struct Killed<'a> {
    dir: &'a Dir,
    guest: Reverted,
    nonce: &'static str,
}

impl<'a> Killed<'a> {
    fn start(dir: &'a Dir, qemu: Qemu, args: &[&str]) -> Result<Killed<'a>> {
        let shared = shared(qemu)?;
        let to = dir.make("reverted")?;
        let guest = Reverted::of(dir.revert(&shared.image, &shared.from, &to).with(args), &to)?;
        Ok(Killed { dir, guest, nonce: &shared.nonce })
    }

    /// The first server's output, which all its successors write to.
    fn server(&mut self) -> &mut Running {
        self.guest.server.as_mut().unwrap()
    }

    /// Kills the first server.
    fn kill_first(&mut self) {
        self.server().signal(libc::SIGKILL);
    }

    /// The process of the present server, which has taken over.
    fn successor(&self) -> Result<u32> {
        process(self.dir, SUCCESSOR)
    }

    /// Waits until another server serves, and the guest goes on. Returns the time from
    /// `killed` to the next heartbeat in milliseconds.
    fn taken_over(&mut self, restarts: u64) -> Result<()> {
        let beat = self.guest.log.last_beat().map_or(0, |beat| beat.number);
        let killed = Instant::now();
        let told = self.server().wait("taken_over")?;
        assert_eq!((&told["by"], told["restarts"].as_u64()), (&"keeper".into(), Some(restarts)));
        assert!(told["after_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{told}");
        if let Err(error) = self.guest.log.wait_beat(beat, SOON) {
            return Err(format!("{error}\nthe servers said {:?}", self.server().said()).into());
        }
        println!("the guest went on {:?} after a kill: {told}", killed.elapsed());
        Ok(())
    }

    /// Has the present server finish, and checks the guest and what is left.
    fn finish(mut self) -> Result<Reverted> {
        let server = self.successor()?;
        send_signal(server, libc::SIGTERM);
        let ended = self.guest.server.take().ok_or("no server")?.end()?;
        let resident = ended.event("resident")?;
        assert_eq!(resident["pages"], resident["total"], "{ended:?}");
        assert!(ended.event("error").is_err() && ended.stderr.is_empty(), "{ended:?}");
        wait_gone(server)?;
        self.guest.check(self.nonce)?;
        Ok(self.guest)
    }
}

/// The only process of the folder with these words on its command line.
pub fn process(dir: &Dir, words: &str) -> Result<u32> {
    wait_for(SOON, words, || {
        let mut all = dir.processes().into_iter().filter(|(_, line)| line.contains(words));
        Ok(all.next().map(|(pid, _)| pid))
    })
}

fn a_server_is_killed_while_it_fills(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut killed = Killed::start(dir, qemu, &SLOWLY)?;
    killed.server().wait("progress")?;
    killed.kill_first();
    killed.taken_over(1)?;
    killed.finish().map(drop)
}

fn a_server_is_killed_while_it_waits(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut killed = Killed::start(dir, qemu, &UNFILLED)?;
    let beat = killed.guest.log.wait_beat(0, SOON)?;
    killed.guest.log.wait_beat(beat.number + 5, SOON)?;
    killed.kill_first();
    killed.taken_over(1)?;
    // All that it has not touched yet comes from the new server.
    killed.guest.check(killed.nonce)?;
    killed.finish().map(drop)
}

fn a_server_is_killed_that_serves_by_socket(dir: &Dir, qemu: Qemu) -> Result<()> {
    let args = [&UNFILLED[..], &["--place", "socket"]].concat();
    let mut killed = Killed::start(dir, qemu, &args)?;
    killed.guest.log.wait_beat(0, SOON)?;
    killed.kill_first();
    killed.taken_over(1)?;
    killed.guest.check(killed.nonce)?;
    send_signal(killed.successor()?, libc::SIGKILL);
    killed.taken_over(2)?;
    killed.finish().map(drop)
}

/// Ten of them, which is the most in a minute; each may be at any step of taking over.
fn servers_are_killed_as_soon_as_they_serve(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut killed = Killed::start(dir, qemu, &SLOWLY)?;
    killed.kill_first();
    for restarts in 1..10 {
        killed.taken_over(restarts)?;
        send_signal(killed.successor()?, libc::SIGKILL);
    }
    killed.taken_over(10)?;
    killed.finish().map(drop)
}

fn a_keeper_is_killed_and_then_the_server(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut killed = Killed::start(dir, qemu, &UNFILLED)?;
    killed.guest.log.wait_beat(0, SOON)?;
    let mut first = process(dir, " keeper -- ")?;
    for restarts in 1..3 {
        send_signal(first, libc::SIGKILL);
        wait_gone(first)?;
        let second = process(dir, " keeper -- ")?;
        // It has been told everything once it holds what came last.
        wait_for(SOON, "the new keeper", || {
            let link = std::fs::read_link(format!("/proc/{second}/fd/71"));
            Ok(link.is_ok().then_some(()))
        })?;
        match restarts {
            1 => killed.kill_first(),
            _ => send_signal(killed.successor()?, libc::SIGKILL),
        }
        killed.taken_over(restarts)?;
        first = second;
    }
    killed.finish().map(drop)
}

fn qemu_is_killed_and_all_end_with_it(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut killed = Killed::start(dir, qemu, &UNFILLED)?;
    killed.kill_first();
    killed.taken_over(1)?;
    let (server, keeper) = (killed.successor()?, process(dir, " keeper -- ")?);
    send_signal(killed.guest.pid, libc::SIGKILL);
    let ended = killed.guest.server.take().ok_or("no server")?.end()?;
    assert!(ended.event("error")?["message"].as_str().is_some_and(|m| m.contains("QEMU")));
    wait_gone(server)?;
    wait_gone(keeper)
}

/// Kills the first server and its keeper, neither of which can replace the other.
pub fn kill_both(dir: &Dir, guest: &mut Reverted) -> Result<()> {
    let keeper = process(dir, " keeper -- ")?;
    let server = guest.server.take().ok_or("no server")?;
    server.signal(libc::SIGSTOP);
    server.wait_stopped()?;
    send_signal(keeper, libc::SIGKILL);
    wait_gone(keeper)?;
    server.signal(libc::SIGKILL);
    server.end().map(drop)
}

/// Both are killed under a guest that was reverted with `args`. Takes it up again with `resume`'s
/// `place`, and kills the new server too.
fn is_taken_up_again(dir: &Dir, qemu: Qemu, args: &[&str], place: &str) -> Result<()> {
    let mut killed = Killed::start(dir, qemu, args)?;
    let beat = killed.guest.log.wait_beat(0, SOON)?;
    killed.guest.log.wait_beat(beat.number + 2, SOON)?;
    kill_both(dir, &mut killed.guest)?;

    let image = &shared(qemu)?.image;
    let pid = killed.guest.pid.to_string();
    let resume = dir.snapback(&["resume", text(image), "--pid", &pid, "--place", place]);
    let paced = if args.contains(&SLOWER[0]) { &SLOWER[..2] } else { &UNFILLED[..2] };
    let beat = killed.guest.log.last_beat().map_or(0, |beat| beat.number);
    let mut resumed = resume.with(paced).start()?;
    let told = resumed.wait("taken_over")?;
    assert_eq!((&told["by"], told["restarts"].as_u64()), (&"resume".into(), Some(0)));
    println!("taken up again: {told}");
    killed.guest.log.wait_beat(beat, SOON)?;
    killed.guest.check(killed.nonce)?;

    // It has a keeper of its own, which holds all that a successor needs once QEMU goes on.
    let keeper = process(dir, " keeper -- ")?;
    wait_for(SOON, "the keeper", || {
        let holds = |fd: u32| std::fs::read_link(format!("/proc/{keeper}/fd/{fd}")).is_ok();
        Ok(holds(QEMU_HELD).then_some(()))
    })?;
    resumed.signal(libc::SIGKILL);
    killed.guest.server = Some(resumed);
    killed.taken_over(1)?;
    killed.guest.check(killed.nonce)?;
    let mut guest = killed.finish()?;
    assert_eq!(query(&guest.qmp_path, "query-migrate")?["status"], "completed");
    let image = dir.path("after.snap");
    dir.save(&guest, "after.snap").succeed()?;
    assert!(image.exists());
    check(&mut guest)
}

/// The number at which a keeper holds QEMU's pidfd.
const QEMU_HELD: u32 = 67;

fn both_are_killed_while_it_fills(dir: &Dir, qemu: Qemu) -> Result<()> {
    is_taken_up_again(dir, qemu, &SLOWER, "auto")
}

fn both_are_killed_while_it_waits(dir: &Dir, qemu: Qemu) -> Result<()> {
    is_taken_up_again(dir, qemu, &UNFILLED, "uffd")
}

fn both_are_killed_that_serve_by_socket(dir: &Dir, qemu: Qemu) -> Result<()> {
    // A guest that has all it needs leaves QEMU free to answer.
    let args = [&SLOWER[..], &["--place", "socket"]].concat();
    is_taken_up_again(dir, qemu, &args, "socket")
}

fn a_server_by_socket_is_succeeded_directly(dir: &Dir, qemu: Qemu) -> Result<()> {
    let args = [&UNFILLED[..], &["--place", "socket"]].concat();
    is_taken_up_again(dir, qemu, &args, "auto")
}

fn a_guest_that_is_served_or_another_images_is_not_taken_up(dir: &Dir) -> Result<()> {
    let mut killed = Killed::start(dir, Qemu::V7, &UNFILLED)?;
    killed.guest.log.wait_beat(0, SOON)?;
    let resume = |image: &std::path::Path, qmp: &std::path::Path| {
        dir.snapback(&["resume", text(image), "--qmp", text(qmp)]).fail()
    };
    let image = &shared(Qemu::V7)?.image;
    let refusal = resume(image, &killed.guest.qmp_path)?;
    assert!(refusal.contains("serves this guest"), "{refusal}");
    kill_both(dir, &mut killed.guest)?;
    let refusal = resume(&shared(Qemu::V10)?.image, &killed.guest.qmp_path)?;
    assert!(refusal.contains("is not this image's"), "{refusal}");

    // By hand it needs no more than that.
    let qmp = killed.guest.qmp_path.clone();
    dir.snapback(&["resume", text(image), "--qmp", text(&qmp), "--no-keeper"]).succeed()?;
    killed.guest.check(killed.nonce)
}

fn a_detached_server_is_killed(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    let args = [&UNFILLED[..], &["--detach"]].concat();
    let command = dir.revert(&shared.image, &shared.from, &to).with(&args);
    let mut guest = Reverted::of(command, &to)?;
    let detached = guest.server.take().ok_or("no server")?.succeed()?.event("detached")?.clone();
    guest.log.wait_beat(0, SOON)?;
    send_signal(detached["server_pid"].as_u64().ok_or("no server")? as u32, libc::SIGKILL);
    let server = process(dir, SUCCESSOR)?;
    guest.check(&shared.nonce)?;
    send_signal(server, libc::SIGTERM);
    wait_gone(server)?;
    let log = std::fs::read_to_string(detached["log"].as_str().ok_or("no log")?)?;
    assert!(log.contains("\"taken_over\"") && log.contains("\"resident\""), "{log}");
    guest.check(&shared.nonce)
}

fn a_server_that_dies_too_often_is_given_up(dir: &Dir) -> Result<()> {
    let mut killed = Killed::start(dir, Qemu::V7, &UNFILLED)?;
    killed.kill_first();
    for restarts in 1..=10 {
        killed.taken_over(restarts)?;
        send_signal(killed.successor()?, libc::SIGKILL);
    }
    let ended = killed.guest.server.take().ok_or("no server")?.end()?;
    assert!(ended.stderr.contains("killed too often"), "{ended:?}");
    wait_gone(killed.guest.pid)
}

fn a_server_that_stands_still_is_not_replaced(dir: &Dir) -> Result<()> {
    let mut killed = Killed::start(dir, Qemu::V7, &UNFILLED)?;
    let keeper = process(dir, " keeper -- ")?;
    for pid in [killed.server().pid(), keeper] {
        send_signal(pid, libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(300));
        send_signal(pid, libc::SIGCONT);
    }
    let beat = killed.guest.log.last_beat().map_or(0, |beat| beat.number);
    killed.guest.log.wait_beat(beat, SOON)?;
    killed.server().signal(libc::SIGTERM);
    let ended = killed.guest.resident()?;
    assert!(ended.event("taken_over").is_err(), "{ended:?}");
    wait_gone(keeper)?;
    killed.guest.check(killed.nonce)
}

fn a_revert_without_a_keeper_starts_none(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    let command = dir.revert(&shared.image, &shared.from, &to).with(&["--no-keeper"]);
    let mut guest = Reverted::of(command, &to)?;
    assert!(!dir.processes().iter().any(|(_, line)| line.contains(" keeper ")));
    guest.resident()?;
    guest.check(&shared.nonce)
}

/// Prints what docs/reliability.md tells of the keeper and of `resume`: on a machine that does
/// nothing else, `cargo test --release --features internals --test e2e -- --ignored --nocapture
/// figures_of_the_keeper`.
#[test]
#[ignore = "it measures"]
fn figures_of_the_keeper() -> Result<()> {
    for qemu in Qemu::ALL {
        in_a_folder(|dir| time_with_a_keeper(dir, qemu))?;
        in_a_folder(|dir| time_of_a_resume(dir, qemu))?;
    }
    Ok(())
}

/// The time until the guest runs, without and with a keeper, by turns.
fn time_with_a_keeper(dir: &Dir, qemu: Qemu) -> Result<()> {
    const REVERTS: usize = 21;
    let bare = Bare::start(dir, qemu, &[])?;
    let image = dir.path("vm.snap");
    dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]).succeed()?;
    let ways: [&[&str]; 2] = [&["--no-keeper"], &[]];
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..REVERTS {
        for (way, times) in ways.iter().zip(&mut times) {
            let ended = dir.snapback(&["revert", text(&image)]).with(way).succeed()?;
            let running = ended.event("running")?;
            let pid = running["pid"].as_u64().ok_or("no process")? as u32;
            Pidfd::open(pid)?.kill()?;
            wait_gone(pid)?;
            times.push(running["ms"].as_f64().ok_or("no time")?);
        }
    }
    for (way, times) in ["without", "with"].iter().zip(&mut times) {
        print_times(&format!("{qemu:?}, {way} a keeper: running after"), times);
    }
    Ok(())
}

/// How long a guest of 4 GiB is looked for that nobody serves any more, and what its keeper took.
fn time_of_a_resume(dir: &Dir, qemu: Qemu) -> Result<()> {
    let options = GuestOptions { mib: 4096, fill: Fill::Mib(1024), ..options(qemu) };
    let original = Guest::boot(&options)?;
    dir.save(&original, "vm.snap").succeed()?;
    let image = dir.path("vm.snap");
    for number in 0..5 {
        let to = dir.make(&format!("reverted{number}"))?;
        let revert = dir.revert(&image, &original.dir, &to).with(&SLOWLY);
        let mut guest = Reverted::of(revert, &to)?;
        let first = guest.log.wait_beat(0, SOON)?;
        guest.log.wait_beat(first.number + 10, SOON)?;
        let keeper = process(dir, " keeper -- ")?;
        let rollup = std::fs::read_to_string(format!("/proc/{keeper}/smaps_rollup"))?;
        let private: u64 = rollup
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        kill_both(dir, &mut guest)?;
        let pid = guest.pid.to_string();
        let resume = dir.snapback(&["resume", text(&image), "--pid", &pid]).with(&SLOWLY[..2]);
        let mut resumed = resume.start()?;
        let told = resumed.wait("taken_over")?;
        println!("{qemu:?}, 4 GiB: the keeper had {private} KiB of its own; resumed: {told}");
        drop(resumed);
    }
    Ok(())
}
