//! Reverts, each with one fault at some moment: whatever is done to the processes, the guest
//! goes on with right memory, or it is ended and that is told. It never sees a wrong byte.
//!
//! What is done to which revert, and when, follows from a seed, which is printed:
//! SNAPBACK_TORTURE_SEED repeats it. `make torture` runs the long one and prints how long a guest
//! waits for the next server; SNAPBACK_TORTURE sets the number of reverts.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::damage::flip;
use crate::harness::{Dir, Ended, Reverted, send_signal, text, wait_gone};
use crate::interrupts::UNFILLED;
use crate::killed_reverts::{SLOWLY, SUCCESSOR, process};
use crate::shared::shared;
use crate::support::{Qemu, Result, SOON, process_gone, wait_for};
use crate::tests;

tests! {
    some_faults
}

/// Reverts of the short run, and of the long one by default.
const FEW: u64 = 10;
const MANY: u64 = 200;

/// The seed where none is given.
const SEED: u64 = 1;

/// How memory is filled: it takes one to two seconds.
const FILLING: [&str; 3] = ["--fill-rate", "40M", "--no-working-set"];

/// The longest time from `running` to a fault, in milliseconds: some come when all is over.
const LATEST: u64 = 1500;

/// How long a stopped process stands still.
const STANDS_STILL: Duration = Duration::from_millis(300);

/// What is done to a revert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    KillServer,
    KillServerTwice,
    KillKeeper,
    KillKeeperThenServer,
    KillBoth,
    KillQemu,
    StopServer,
    StopKeeper,
    StopQemu,
    /// The server gets no more memory (RLIMIT_AS, getrlimit(2)).
    StarveServer,
    /// Bytes of the image are wrong for a while.
    FlipBytes,
    /// The image ends early for a while.
    TruncateImage,
}

impl Fault {
    const ALL: [Fault; 12] = [
        Fault::KillServer,
        Fault::KillServerTwice,
        Fault::KillKeeper,
        Fault::KillKeeperThenServer,
        Fault::KillBoth,
        Fault::KillQemu,
        Fault::StopServer,
        Fault::StopKeeper,
        Fault::StopQemu,
        Fault::StarveServer,
        Fault::FlipBytes,
        Fault::TruncateImage,
    ];

    /// Whether it is done to the image, and not to a process.
    fn is_of_the_image(self) -> bool {
        matches!(self, Fault::FlipBytes | Fault::TruncateImage)
    }

    /// Whether the guest may be ended by it.
    fn may_end_the_guest(self) -> bool {
        matches!(self, Fault::KillBoth | Fault::KillQemu | Fault::StarveServer)
    }
}

/// Numbers that follow from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// One revert and what is done to it.
#[derive(Debug, Clone, Copy)]
struct Round {
    number: u64,
    qemu: Qemu,
    way: &'static str,
    fault: Fault,
    /// When, from `running` on.
    after: Duration,
}

impl Round {
    /// The round of this number. The first ones have every fault once, and then every way.
    fn new(number: u64, random: &mut Random) -> Round {
        const FAULTS: u64 = Fault::ALL.len() as u64;
        const MAPPED: u64 = FAULTS + 1;
        let fault = match Fault::ALL.get(number as usize) {
            Some(fault) => *fault,
            None => random.pick(&Fault::ALL),
        };
        let way = match number {
            // A guest depends on its server by these two.
            0..FAULTS => random.pick(&["uffd", "socket"]),
            FAULTS => "eager",
            MAPPED => "map",
            _ => random.pick(&["uffd", "uffd", "socket", "socket", "eager", "map"]),
        };
        // Nobody serves a guest whose memory is mapped, and an eager one has all of it before it
        // runs.
        let way = if fault.is_of_the_image() { random.pick(&["uffd", "socket"]) } else { way };
        // Only QEMU 8.1 and later map images.
        let qemu = if way == "map" { Qemu::V10 } else { random.pick(&Qemu::ALL) };
        let after = Duration::from_millis(random.below(LATEST));
        Round { number, qemu, way, fault, after }
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Round { number, qemu, way, fault, after } = self;
        let (qemu, fault) = (format!("{qemu:?}"), format!("{fault:?}"));
        write!(f, "{number:>4}  {qemu:<4}{way:<7} {fault:<21}after {:>4} ms: ", after.as_millis())
    }
}

fn some_faults(dir: &Dir) -> Result<()> {
    rounds(dir, FEW)
}

#[test]
#[ignore = "it takes many minutes: `make torture`"]
fn many_faults() -> Result<()> {
    crate::harness::in_a_folder(|dir| rounds(dir, asked()))
}

/// Reverts of the long run.
fn asked() -> u64 {
    let asked = std::env::var("SNAPBACK_TORTURE").ok();
    asked.and_then(|number| number.parse().ok()).unwrap_or(MANY)
}

/// From what all that is random follows.
pub fn seed() -> Result<u64> {
    let asked = std::env::var("SNAPBACK_TORTURE_SEED").ok();
    Ok(asked.map_or(Ok(SEED), |seed| seed.parse())?)
}

fn rounds(dir: &Dir, count: u64) -> Result<()> {
    let seed = seed()?;
    println!("{count} reverts with seed {seed}");
    let flat = dir.path("flat.snap");
    let image = &shared(Qemu::V10)?.image;
    dir.snapback(&["flatten", "--layout", "flat", text(image), text(&flat)]).succeed()?;
    let mut random = Random(seed);
    for number in 0..count {
        let round = Round::new(number, &mut random);
        let came = tortured(dir, round, &flat).map_err(|e| format!("{round}{e}"))?;
        println!("{round}{came}");
    }
    Ok(())
}

/// Carries a round out. Returns what came of it.
fn tortured(dir: &Dir, round: Round, flat: &Path) -> Result<String> {
    let shared = shared(round.qemu)?;
    let image = if round.way == "map" { flat } else { &shared.image };
    let name = format!("round-{}", round.number);
    let to = dir.make(&name)?;
    let own = to.join("own.snap");
    let image = match round.fault.is_of_the_image() {
        true => {
            fs::copy(image, &own)?;
            &own
        }
        false => image,
    };
    let command = dir.revert(image, &shared.from, &to).with(&FILLING).with(&["--place", round.way]);
    let mut guest = Reverted::of(command, &to)?;
    let server = guest.server.as_ref().ok_or("no server")?.pid();
    // It is over with most of the ways before long.
    let keeper = processes(dir, " keeper -- ").first().copied();
    std::thread::sleep(round.after);
    match round.fault.is_of_the_image() {
        true => damage_for_a_while(&own, round.fault, &shared.image)?,
        false => inject(dir, round, server, keeper, guest.pid)?,
    }

    let ended = guest.server.take().ok_or("no server")?.end()?;
    let told: Vec<String> = ended.events.iter().filter_map(worth_telling).collect();
    let came = match (ended.event("resident"), ended.event("error")) {
        (Ok(_), _) if round.fault == Fault::KillQemu => {
            wait_gone(guest.pid)?;
            "it had all its memory when its QEMU was killed".to_owned()
        }
        (Ok(resident), _) => {
            assert_eq!(resident["pages"], resident["total"], "{ended:?}");
            guest.check(&shared.nonce)?;
            "it has all its memory, and all is right".to_owned()
        }
        (_, error) => without_resident(dir, round, &mut guest, &shared.nonce, &ended, error.ok())?,
    };
    drop(guest);
    wait_for(SOON, "the servers to end", || Ok(processes(dir, "").is_empty().then_some(())))?;
    clean_up(dir, &to)?;
    Ok([told, vec![came]].concat().join("; "))
}

/// What came of a revert that did not tell of all its memory.
fn without_resident(
    dir: &Dir,
    round: Round,
    guest: &mut Reverted,
    nonce: &str,
    ended: &Ended,
    error: Option<&serde_json::Value>,
) -> Result<String> {
    // A server that was killed when QEMU had everything could not tell of it any more.
    if error.is_none() && listed(dir, guest.pid)?.is_none_or(|run| run["present"] == 1.0) {
        guest.check(nonce)?;
        return Ok("its server had done all, and all is right".to_owned());
    }
    if !round.fault.may_end_the_guest() {
        return Err(format!("the guest was given up: {ended:?}").into());
    }
    match error {
        Some(error) => {
            wait_gone(guest.pid)?;
            Ok(format!("its guest was ended: {}", error["message"]))
        }
        // Nobody is left to tell of it.
        None => {
            let run = listed(dir, guest.pid)?.ok_or("it is not listed")?;
            assert!(run["server_pid"].is_null() && run["keeper_pid"].is_null(), "{run}");
            let (image, pid) = (run["image"].as_str().ok_or("no image")?, guest.pid.to_string());
            let resumed = dir.snapback(&["resume", image, "--pid", &pid]).end()?;
            if resumed.event("resident").is_ok() {
                guest.check(nonce)?;
                return Ok("its guest waited, was taken up by hand, and all is right".to_owned());
            }
            // By socket it can be taken up only where QEMU answers.
            let id = run["id"].as_str().ok_or("no id")?;
            dir.snapback(&["stop", id]).succeed()?;
            wait_gone(guest.pid)?;
            Ok("its guest waited for ever, was listed so, and was ended by hand".to_owned())
        }
    }
}

/// The revert that is recorded of a QEMU.
fn listed(dir: &Dir, pid: u32) -> Result<Option<serde_json::Value>> {
    let events = dir.snapback(&["ps"]).succeed()?.events;
    Ok(events.into_iter().find(|run| run["qemu_pid"] == pid))
}

fn worth_telling(event: &serde_json::Value) -> Option<String> {
    let name = event["event"].as_str()?;
    match name {
        "taken_over" => {
            let after_ms = event["after_ms"].as_f64().unwrap_or(f64::NAN);
            Some(format!("taken over after {after_ms:.0} ms"))
        }
        "degraded" | "stopped" | "repaired" => Some(name.to_owned()),
        _ => None,
    }
}

/// Processes of the program in the folder with these words on their command line.
fn processes(dir: &Dir, words: &str) -> Vec<u32> {
    let ours = dir.processes().into_iter().filter(|(_, line)| !line.contains("-machine"));
    ours.filter(|(_, line)| line.contains(words)).map(|(pid, _)| pid).collect()
}

/// Does it to the processes. Those that have ended by then are let be.
fn inject(dir: &Dir, round: Round, server: u32, keeper: Option<u32>, qemu: u32) -> Result<()> {
    let keeper_lives = |keeper: &u32| processes(dir, " keeper -- ").contains(keeper);
    let keeper = keeper.filter(keeper_lives);
    // Our child, which is waited for later: its number stays its own.
    let kill_server = || send_signal(server, libc::SIGKILL);
    let signal_keeper = |signal| keeper.iter().for_each(|keeper| send_signal(*keeper, signal));
    let stand_still = |pid| {
        send_signal(pid, libc::SIGSTOP);
        std::thread::sleep(STANDS_STILL);
        send_signal(pid, libc::SIGCONT);
    };
    match round.fault {
        Fault::KillServer => kill_server(),
        Fault::KillServerTwice => {
            kill_server();
            if keeper.is_some() {
                // It may have ended well before it was seen.
                let successor = wait_for(SOON, "a successor, or the end", || {
                    let successors = processes(dir, SUCCESSOR);
                    let keepers = processes(dir, " keeper -- ");
                    Ok((!successors.is_empty() || keepers.is_empty()).then_some(successors))
                })?;
                successor.iter().for_each(|pid| send_signal(*pid, libc::SIGKILL));
            }
        }
        Fault::KillKeeper => signal_keeper(libc::SIGKILL),
        Fault::KillKeeperThenServer => {
            signal_keeper(libc::SIGKILL);
            if let Some(keeper) = keeper {
                wait_gone(keeper)?;
                // The next has everything once it holds what comes last (`keeper::Held`).
                let last = if round.way == "uffd" { 71 } else { 70 };
                wait_for(SOON, "another keeper, or the end", || {
                    let keepers = processes(dir, " keeper -- ");
                    let holds = |keeper: &u32| {
                        std::fs::read_link(format!("/proc/{keeper}/fd/{last}")).is_ok()
                    };
                    let is_over = processes(dir, " revert ").is_empty();
                    Ok((is_over || keepers.iter().any(holds)).then_some(()))
                })?;
            }
            kill_server();
        }
        Fault::KillBoth => {
            send_signal(server, libc::SIGSTOP);
            signal_keeper(libc::SIGKILL);
            kill_server();
        }
        Fault::KillQemu => send_signal(qemu, libc::SIGKILL),
        Fault::StopServer => stand_still(server),
        Fault::StopKeeper => keeper.into_iter().for_each(stand_still),
        Fault::StopQemu => stand_still(qemu),
        Fault::StarveServer => starve(server),
        Fault::FlipBytes | Fault::TruncateImage => {}
    }
    Ok(())
}

/// Damages an image, and repairs it from a whole copy.
fn damage_for_a_while(image: &Path, fault: Fault, whole: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(image)?;
    let len = file.metadata()?.len();
    match fault {
        // Memory lies between what describes it, at both ends.
        Fault::FlipBytes => {
            for place in (len / 8..len / 8 * 7).step_by((len / 64) as usize) {
                flip(image, place)?;
            }
        }
        _ => file.set_len(len / 2)?,
    }
    std::thread::sleep(STANDS_STILL);
    fs::copy(whole, image)?;
    Ok(())
}

/// Lets a process have no more address space than it has (prlimit(2)).
fn starve(pid: u32) {
    let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    // SAFETY: prlimit(2) reads the limit, which lives until it returns; the null pointer says
    // that the old one is not wanted. It fails for a process that has ended, which is let be.
    unsafe { libc::prlimit(pid as i32, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
}

/// Removes what a round has left, by the program where it was killed.
fn clean_up(dir: &Dir, to: &Path) -> Result<()> {
    dir.snapback(&["gc", "--yes"]).succeed()?;
    assert!(dir.recorded()?.is_empty(), "{:?}", dir.recorded()?);
    Ok(std::fs::remove_dir_all(to)?)
}

#[test]
#[ignore = "it takes many minutes: `make torture`"]
fn how_long_a_guest_waits_for_the_next_server() -> Result<()> {
    // While memory is filled, and as often while it is not.
    let kills = (asked() / 2).max(1);
    crate::harness::in_a_folder(|dir| {
        for (what, args) in [("filling", SLOWLY), ("idle", UNFILLED)] {
            let mut waits = (0..kills)
                .map(|number| wait_after_a_kill(dir, &args, &dir.path(&format!("{what}-{number}"))))
                .collect::<Result<Vec<_>>>()?;
            println!("from SIGKILL of the server, while {what}, {kills} times, in ms:");
            waits.sort_by(|one, other| one.beat_ms.total_cmp(&other.beat_ms));
            print_shares("to the guest's next heartbeat", waits.iter().map(|wait| wait.beat_ms));
            waits.sort_by(|one, other| one.served_ms.total_cmp(&other.served_ms));
            print_shares("until it is served again", waits.iter().map(|wait| wait.served_ms));
        }
        Ok(())
    })
}

/// Prints the median and other shares of sorted numbers.
fn print_shares(what: &str, sorted: impl ExactSizeIterator<Item = f64>) {
    let sorted: Vec<f64> = sorted.collect();
    let at = |share: f64| sorted[((sorted.len() as f64 * share).ceil() as usize).max(1) - 1];
    println!("  {what:<30} p50 {:>6.1}  p99 {:>6.1}  max {:>6.1}", at(0.5), at(0.99), at(1.0));
}

struct Wait {
    beat_ms: f64,
    served_ms: f64,
}

/// Kills the server of a guest. Each has a revert of its own: later successors of one server
/// wait before they start.
fn wait_after_a_kill(dir: &Dir, args: &[&str], to: &PathBuf) -> Result<Wait> {
    /// Heartbeats after which a guest has what it uses, if nothing else is filled.
    const SETTLED: u64 = 10;
    let shared = shared(Qemu::V10)?;
    std::fs::create_dir(to)?;
    let mut guest = Reverted::of(dir.revert(&shared.image, &shared.from, to).with(args), to)?;
    let first = guest.log.wait_beat(0, SOON)?;
    let beat = guest.log.wait_beat(first.number + SETTLED, SOON)?;
    let mut server = guest.server.take().ok_or("no server")?;
    server.signal(libc::SIGKILL);
    let killed = Instant::now();
    let after = guest.log.last_beat().map_or(beat.number, |last| last.number);
    let beat_ms = loop {
        if guest.log.last_beat().is_some_and(|last| last.number > after) {
            break killed.elapsed().as_secs_f64() * 1e3;
        }
        if killed.elapsed() > SOON {
            let (said, lives) = (server.said(), !process_gone(guest.pid));
            return Err(format!("the guest did not go on (QEMU lives: {lives}): {said:?}").into());
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    let told = server.wait("taken_over")?;
    let served_ms = told["after_ms"].as_f64().ok_or("no time")?;
    let successor = process(dir, SUCCESSOR)?;
    send_signal(successor, libc::SIGTERM);
    server.end()?.event("resident")?;
    guest.check(&shared.nonce)?;
    drop(guest);
    std::fs::remove_dir_all(to)?;
    Ok(Wait { beat_ms, served_ms })
}
