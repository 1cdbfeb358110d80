//! The daemon killed at random moments of takes, resets and releases: guests that were taken run on,
//! right and complete, and the next daemon takes them up.
//!
//! What is asked for, and when the daemon is killed, follows from a seed, which is printed:
//! SNAPBACK_TORTURE_SEED repeats it. `make torture` runs the long one; SNAPBACK_KILLS sets the
//! number of kills.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Dir, print_times, send_signal, wait_gone};
use crate::pools::{Daemon, Taken};
use crate::support::{Qemu, Result, SOON, http_request, process_gone, wait_for};
use crate::tests;
use crate::torture::{Random, seed};

tests! {
    killed_a_few_times
    a_guest_killed_in_its_reset_goes_back_all_the_way
}

/// Kills of the short run, and of the long one by default.
const FEW: u64 = 2;
const MANY: u64 = 50;

/// The most guests that are kept from one kill to the next.
const KEPT: usize = 3;

/// The latest moment at which the daemon is killed, in milliseconds.
const LATEST: u64 = 1500;

fn killed_a_few_times(dir: &Dir) -> Result<()> {
    kills(dir, Qemu::V10, FEW)
}

#[test]
#[ignore = "it takes many minutes: `make torture`"]
fn killed_many_times() -> Result<()> {
    let asked = std::env::var("SNAPBACK_KILLS").ok().and_then(|number| number.parse().ok());
    let kills_each = asked.unwrap_or(MANY).div_ceil(2);
    for qemu in Qemu::ALL {
        crate::harness::in_a_folder(|dir| kills(dir, qemu, kills_each))?;
    }
    Ok(())
}

fn kills(dir: &Dir, qemu: Qemu, count: u64) -> Result<()> {
    let seed = seed()?;
    println!("{count} kills of a daemon on {qemu:?}, with seed {seed}");
    let mut random = Random(seed);
    let mut daemon = Daemon::start(dir)?;
    // Slowly, so that some are killed while memory is incomplete.
    daemon.pool(dir, qemu, 2, &["--preload", "none", "--fill-delay", "0.1", "--max", "8"])?;
    // The guests by their ids, as they were seen last.
    let mut guests: BTreeMap<String, Taken> = BTreeMap::new();
    let (mut listening, mut serving) = (Vec::new(), Vec::new());
    for number in 0..count {
        let after = Duration::from_millis(random.below(LATEST));
        let known: BTreeSet<String> = guests.keys().cloned().collect();
        let (sure, unsure) = work_until_killed(daemon, known, &mut random, after)?;
        let killed = Instant::now();
        daemon = Daemon::start(dir)?;
        listening.push(killed.elapsed().as_secs_f64() * 1e3);
        let (status, body) = daemon.request("POST", "/v1/pools/booted/take", "")?;
        assert_eq!(status, 200, "{body}");
        serving.push(killed.elapsed().as_secs_f64() * 1e3);
        let taken: Value = serde_json::from_str(&body)?;
        let new = taken["id"].as_str().ok_or("no id")?.to_owned();

        // One that was just going back is taken back again, by a new process.
        let list = wait_for(SOON, "all guests to run", || {
            let list = daemon.get("/v1/guests")?;
            let list = list.as_array().ok_or("no list")?.clone();
            Ok(list.iter().all(runs).then_some(list))
        })?;
        let ids: BTreeSet<&str> = list.iter().filter_map(|guest| guest["id"].as_str()).collect();
        for id in &sure {
            assert!(ids.contains(id.as_str()), "kill {number}: {id} is gone; {ids:?}");
        }
        // Of a take that was not answered nobody knows the id.
        let expected = |id: &&&str| sure.contains(**id) || unsure.contains(**id) || **id == new;
        let unknown: Vec<_> = ids.iter().filter(|id| !expected(id)).collect();
        assert!(unknown.len() <= 1, "kill {number}: {unknown:?}");
        guests.retain(|id, _| ids.contains(id.as_str()));
        for guest in &list {
            let id = guest["id"].as_str().ok_or("no id")?;
            let taken = match guests.remove(id) {
                Some(taken) => taken.now_in(&guest["qemu_pid"])?,
                None => Taken::of(guest)?,
            };
            guests.entry(id.to_owned()).or_insert(taken).check_anew(qemu)?;
        }
        while guests.len() > KEPT {
            let ids: Vec<_> = guests.keys().cloned().collect();
            let id = &ids[random.below(ids.len() as u64) as usize];
            daemon.ask(dir, &["release", id]).succeed()?;
            guests.remove(id);
        }
        println!(
            "  {number:>3}  after {:>4} ms: {} guests are right",
            after.as_millis(),
            list.len()
        );
    }
    print_longest("from the start of the next daemon until it listens", &mut listening);
    print_longest("until a guest was taken", &mut serving);
    daemon.ask(dir, &["pool", "remove", "booted"]).succeed()?;
    daemon.end()
}

/// Whether a guest has the process that the daemon says.
fn runs(guest: &Value) -> bool {
    guest["qemu_pid"].as_u64().is_some_and(|pid| !process_gone(pid as u32))
}

fn print_longest(what: &str, times: &mut [f64]) {
    print_times(what, times);
    println!("  the longest: {:.0} ms", times.last().copied().unwrap_or_default());
}

/// Takes, resets and releases guests of a daemon until it has been killed. Returns the ids of the
/// guests that are taken for sure, and of those of which nobody has heard.
fn work_until_killed(
    daemon: Daemon,
    known: BTreeSet<String>,
    random: &mut Random,
    after: Duration,
) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (socket, over) = (daemon.socket.clone(), AtomicBool::new(false));
    let mut own = Random(random.below(u64::MAX));
    std::thread::scope(|scope| {
        let (over, socket) = (&over, &socket);
        let worker = scope.spawn(move || {
            let (mut sure, mut unsure) = (known, BTreeSet::new());
            while !over.load(Ordering::Acquire) {
                let all: Vec<_> = sure.iter().cloned().collect();
                let pick = |own: &mut Random| all[own.below(all.len() as u64) as usize].clone();
                match own.below(4) {
                    _ if all.len() < 2 => {
                        let body = ask(socket, "POST", "/v1/pools/booted/take");
                        sure.extend(
                            body.as_ref().and_then(|guest| Some(guest["id"].as_str()?.into())),
                        );
                    }
                    0 => {
                        let id = pick(&mut own);
                        sure.remove(&id);
                        if ask(socket, "DELETE", &format!("/v1/guests/{id}")).is_none() {
                            unsure.insert(id);
                        }
                    }
                    1 | 2 => {
                        let id = pick(&mut own);
                        let _ = ask(socket, "POST", &format!("/v1/guests/{id}/reset"));
                    }
                    _ => {
                        let body = ask(socket, "POST", "/v1/pools/booted/take");
                        sure.extend(
                            body.as_ref().and_then(|guest| Some(guest["id"].as_str()?.into())),
                        );
                    }
                }
            }
            (sure, unsure)
        });
        std::thread::sleep(after);
        let killed = daemon.kill();
        over.store(true, Ordering::Release);
        let done = worker.join().map_err(|_| "the worker has panicked")?;
        killed.map(|()| done)
    })
}

/// What is answered; nothing where it is no success, or the daemon was killed.
fn ask(socket: &Path, method: &str, path: &str) -> Option<Value> {
    let stream = UnixStream::connect(socket).ok()?;
    let answer = http_request(stream, method, path, "", "");
    let status = answer.as_ref().map_or("none".to_owned(), |(status, _)| status.to_string());
    println!("       {method} {path}: {status}");
    let (status, body) = answer.ok()?;
    match status {
        204 => Some(Value::Null),
        200 => serde_json::from_str(&body).ok(),
        _ => None,
    }
}

/// A guest of which two moments are mixed must not go on: the next daemon takes it back all the way.
fn a_guest_killed_in_its_reset_goes_back_all_the_way(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &[])?;
    let mut taken = daemon.take(dir)?;
    let path = format!("/v1/guests/{}", taken.id);
    wait_for(SOON, "its writes to be tracked", || {
        Ok((daemon.get(&path)?["resettable"] == true).then_some(()))
    })?;
    // QEMU answers no more, so that the reset stays where it is.
    send_signal(taken.pid(), libc::SIGSTOP);
    let asking = UnixStream::connect(&daemon.socket)?;
    write!(&asking, "POST {path}/reset HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let saved = dir.path("state").join("guests").join(&taken.id);
    wait_for(SOON, "the reset to be noted", || {
        Ok(std::fs::read_to_string(&saved)?.contains(r#""resetting":true"#).then_some(()))
    })?;
    let before = taken.pid();
    daemon.kill()?;
    let daemon = Daemon::start(dir)?;
    let now = wait_for(SOON, "another process", || {
        let guest = daemon.get(&path)?;
        Ok((guest["resets"] == 1).then_some(guest))
    })?;
    wait_gone(before)?;
    taken = taken.now_in(&now["qemu_pid"])?;
    taken.check(Qemu::V10)?;
    daemon.ask(dir, &["release", &taken.id]).succeed()?;
    daemon.end()
}
