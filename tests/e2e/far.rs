//! Guests that are brought back from a repository in an object store, before their snapshot has
//! arrived: a real server of S3 behind a network of the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{Dir, Reverted, Snapback, send_signal, text, wait_gone, wait_stopped};
use crate::killed_reverts::{SUCCESSOR, process};
use crate::support::proxy::{Fault, Proxy};
use crate::support::s3::{BUCKET, S3Server, environment};
use crate::support::{Disk, Fill, Guest, GuestOptions, Qemu, Result, SOON, debian, wait_for};
use crate::torture::{Random, seed};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    a_guest_runs_before_its_snapshot_has_arrived
}

tests! {
    a_store_that_dies_and_comes_back_costs_time_alone
    a_guest_is_stopped_while_its_store_is_away_and_goes_on_by_itself
    a_server_is_killed_and_another_goes_on_from_the_repository
    a_few_random_faults_cost_time_alone
}

/// A store, the network before it, and a cache on this side.
struct Site {
    server: S3Server,
    proxy: Proxy,
    cache: PathBuf,
}

impl Site {
    fn open(dir: &Dir) -> Result<Site> {
        let server = S3Server::start(&dir.make("store")?)?;
        let proxy = Proxy::start(server.address())?;
        Ok(Site { server, proxy, cache: dir.path("cache") })
    }

    /// A command that reaches the store.
    fn reaches(&self, command: Snapback) -> Snapback {
        let command = command.env("SNAPBACK_REPOSITORY", &format!("s3://{BUCKET}/site"));
        environment(self.proxy.address())
            .iter()
            .fold(command, |c, (name, value)| c.env(name, value))
    }

    /// A revert of the latest snapshot into the directory `to`, with nothing but the repository.
    fn revert(&self, dir: &Dir, from: &Path, to: &Path, more: &[&str]) -> Snapback {
        let name = format!("s3://{BUCKET}/site/web1@latest");
        let path = format!("{}={}", text(from), text(to));
        let revert = dir.snapback(&["revert", &name, "--path", &path]);
        let revert = revert.with(&["--cache", text(&self.cache), "--overlay-dir", text(to)]);
        self.reaches(revert.with(more))
    }
}

/// A guest with two disks, which stands still: with the sum of its memory.
pub fn boot(dir: &Dir, qemu: Qemu) -> Result<(Guest, String)> {
    let disks = Disk::two(&dir.path(""), 64)?;
    let fill = Fill::Mib(48);
    let options =
        GuestOptions { qemu, mib: 160, fill, writers: 0, disks, ..GuestOptions::default() };
    let mut guest = Guest::boot(&options)?;
    guest.oracle.ask("idle")?;
    for device in ["vda", "vdb"] {
        guest.oracle.ask(&format!("disk write /dev/{device} 2048 1"))?;
    }
    let sum = guest.oracle.sum()?;
    Ok((guest, sum))
}

/// Such a guest that has been saved, pushed and ended: nothing is left of it but the repository. Returns
/// where its sockets were, and the sum of its memory.
fn push(dir: &Dir, site: &Site, qemu: Qemu) -> Result<(PathBuf, String)> {
    let (guest, sum) = boot(dir, qemu)?;
    dir.save(&guest, "vm.snap").with(&["--disks", "copy"]).succeed()?;
    let from = guest.dir.clone();
    drop(guest);
    site.reaches(dir.snapback(&["init"])).succeed()?;
    let image = dir.path("vm.snap");
    // At the other site, the guest's directory is this one, unless a revert says otherwise.
    let profile = format!("{}={}", text(&from), text(&dir.path("drill")));
    let push = dir.snapback(&["push", text(&image), "--name", "web1", "--path", &profile]);
    site.reaches(push).succeed()?;
    for name in dir.names(".")? {
        let path = dir.path(&name);
        if path.is_file() {
            fs::remove_file(path)?;
        }
    }
    Ok((from, sum))
}

/// Memory and disks are those of the moment.
pub fn is_right(reverted: &mut Reverted, sum: &str) -> Result<()> {
    assert_eq!(reverted.oracle.sum()?, sum);
    for device in ["vda", "vdb"] {
        let answer = reverted.oracle.ask(&format!("disk check /dev/{device} 2048 1"))?;
        assert_eq!(answer, "ok", "{device}");
    }
    Ok(())
}

fn a_guest_runs_before_its_snapshot_has_arrived(dir: &Dir, qemu: Qemu) -> Result<()> {
    let site = Site::open(dir)?;
    let (from, sum) = push(dir, &site, qemu)?;
    site.proxy.set_latency(Duration::from_millis(5));

    let to = dir.make("first")?;
    let before = site.proxy.bytes().0;
    let slow = ["--fill-delay", "100000", "--no-working-set"];
    let mut reverted = Reverted::of(site.revert(dir, &from, &to, &slow), &to)?;
    // It runs, and has asked for what it needs alone.
    reverted.oracle.ping()?;
    let needed = site.proxy.bytes().0 - before;
    is_right(&mut reverted, &sum)?;
    reverted.server.as_mut().ok_or("no server")?.signal(libc::SIGINT);
    let ended = reverted.resident()?;
    let all = ended.event("disks_resident")?["fetched_bytes"].as_u64().ok_or("no bytes")?;
    assert!(needed < all / 2, "{needed} of {all} bytes were fetched until it answered");
    is_right(&mut reverted, &sum)?;
    drop(reverted);

    // What was fetched is here: next to nothing is fetched again.
    let before = site.proxy.bytes().0;
    let to = dir.make("second")?;
    let mut reverted = Reverted::of(site.revert(dir, &from, &to, &[]), &to)?;
    reverted.resident()?.event("disks_resident")?;
    is_right(&mut reverted, &sum)?;
    let again = site.proxy.bytes().0 - before;
    assert!(again < 64 << 10, "{again} bytes were fetched again");
    assert!(dir.names("second")?.iter().any(|name| name.ends_with(".qcow2")));
    drop(reverted);

    // This host can run it, once it has the directory that the profile names.
    let name = format!("s3://{BUCKET}/site/web1@latest");
    let here = || {
        let check = dir.snapback(&["check", &name, "--here", "--cache", text(&site.cache)]);
        site.reaches(check)
    };
    let refused = here().end()?;
    assert!(refused.failure()?.contains("files"), "{refused:?}");
    let missing = refused.events.iter().filter(|item| item["state"] == "missing");
    let says: Vec<String> = missing.map(|item| item["says"].to_string()).collect();
    let drill = dir.path("drill");
    assert!(!says.is_empty() && says.iter().all(|says| says.contains(text(&drill))), "{says:?}");
    dir.make("drill")?;
    here().succeed()?;

    // The drill does the same as a revert, and leaves nothing.
    let drill = dir.snapback(&["drill", "web1@latest"]);
    let drilled = site.reaches(drill.with(&["--cache", text(&site.cache)])).succeed()?;
    assert_eq!(drilled.event("drilled")?["machine"], "web1");
    assert_eq!(dir.names("drill")?, Vec::<String>::new());
    Ok(())
}

fn a_store_that_dies_and_comes_back_costs_time_alone(dir: &Dir) -> Result<()> {
    let mut site = Site::open(dir)?;
    let (from, sum) = push(dir, &site, Qemu::V10)?;
    site.proxy.set_latency(Duration::from_millis(20));
    let to = dir.make("reverted")?;
    let revert = site.revert(dir, &from, &to, &["--store-timeout", "2"]);
    let mut reverted = Reverted::of(revert, &to)?;
    site.server.kill();
    // It is told that the guest waits, and nothing is wrong but that.
    reverted.server.as_mut().ok_or("no server")?.wait("degraded")?;
    site.server.start_again()?;
    reverted.resident()?.event("disks_resident")?;
    is_right(&mut reverted, &sum)?;
    wait_for(SOON, "the lease to end", || {
        let leases = site.server.objects().join("site/leases");
        let left = fs::read_dir(leases).map_or(0, |entries| entries.count());
        Ok((left == 0).then_some(()))
    })
}

fn a_guest_is_stopped_while_its_store_is_away_and_goes_on_by_itself(dir: &Dir) -> Result<()> {
    let mut site = Site::open(dir)?;
    let (from, sum) = push(dir, &site, Qemu::V10)?;
    let to = dir.make("reverted")?;
    let slow = ["--fill-delay", "100000", "--no-working-set", "--store-timeout", "1"];
    let mut reverted = Reverted::of(site.revert(dir, &from, &to, &slow), &to)?;
    reverted.oracle.ping()?;
    let mut server = reverted.server.take().ok_or("no server")?;
    site.server.kill();
    std::thread::scope(|scope| -> Result<()> {
        // It needs all of its memory, and then its disks.
        let asked = scope.spawn(|| is_right(&mut reverted, &sum).map_err(|e| e.to_string()));
        assert_eq!(server.wait("stopped")?["reason"], "store");
        let waits = || {
            let ps = dir.snapback(&["ps"]).succeed()?;
            Ok((ps.event("run")?["waits_for"] == "store").then_some(()))
        };
        wait_for(SOON, "ps to tell what is waited for", waits)?;
        let ps = dir.snapback(&["ps"]).plain().succeed()?;
        assert!(ps.said.iter().any(|line| line.contains("waiting for the store")), "{ps:?}");
        site.server.start_again()?;
        server.wait("repaired")?;
        let asked = asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(asked?)
    })?;
    let ps = dir.snapback(&["ps"]).succeed()?;
    assert!(ps.event("run")?["waits_for"].is_null(), "{ps:?}");
    server.signal(libc::SIGINT);
    reverted.server = Some(server);
    reverted.resident()?.event("disks_resident")?;
    is_right(&mut reverted, &sum)
}

fn a_server_is_killed_and_another_goes_on_from_the_repository(dir: &Dir) -> Result<()> {
    let mut site = Site::open(dir)?;
    let (from, sum) = push(dir, &site, Qemu::V10)?;
    let to = dir.make("reverted")?;
    let slow = ["--fill-delay", "100000", "--no-working-set"];
    let revert = site.revert(dir, &from, &to, &slow);
    let stops = revert.env("SNAPBACK_TEST_STOP_AT", "revert-before-disks");
    let mut reverted = Reverted::of(stops, &to)?;
    reverted.oracle.ping()?;
    let mut server = reverted.server.take().ok_or("no server")?;

    // The store is away as well: the guest waits for both.
    site.server.kill();
    server.signal(libc::SIGKILL);
    let waits = || {
        let ps = dir.snapback(&["ps"]).succeed()?;
        Ok((ps.event("run")?["waits_for"] == "store").then_some(()))
    };
    wait_for(SOON, "ps to tell that the guest waits for the store", waits)?;
    site.server.start_again()?;
    let told = server.wait("taken_over")?;
    assert_eq!((&told["by"], &told["restarts"]), (&"keeper".into(), &1.into()));
    is_right(&mut reverted, &sum)?;
    let ps = dir.snapback(&["ps"]).succeed()?;
    assert!(ps.event("run")?["waits_for"].is_null(), "{ps:?}");

    // Once more, with all memory in place, and disks that are not.
    let successor = process(dir, SUCCESSOR)?;
    send_signal(successor, libc::SIGINT);
    server.wait("resident")?;
    wait_stopped(successor)?;
    send_signal(successor, libc::SIGKILL);
    assert_eq!(server.wait("taken_over")?["restarts"], 2);
    let successor = process(dir, SUCCESSOR)?;
    wait_stopped(successor)?;
    send_signal(successor, libc::SIGCONT);
    let ended = server.end()?;
    ended.event("disks_resident")?;
    assert!(ended.event("error").is_err() && ended.stderr.is_empty(), "{ended:?}");
    wait_gone(successor)?;
    is_right(&mut reverted, &sum)
}

fn a_few_random_faults_cost_time_alone(dir: &Dir) -> Result<()> {
    random_faults(dir, 2)
}

#[test]
#[ignore = "it takes many minutes: `make torture`"]
fn a_hundred_random_faults() -> Result<()> {
    crate::harness::in_a_folder(|dir| random_faults(dir, 100))
}

/// Reverts, each with a cold cache and a network that fails in its own way at a time of its own: the guest is
/// right in the end, and nothing but time is lost.
fn random_faults(dir: &Dir, count: u64) -> Result<()> {
    let seed = seed()?;
    let mut site = Site::open(dir)?;
    let (from, sum) = push(dir, &site, Qemu::V10)?;
    let mut random = Random(seed);
    for number in 0..count {
        let fault = match random.below(7) {
            0 => Some(Fault::Status(503, "<Error><Code>SlowDown</Code></Error>")),
            1 => Some(Fault::Status(500, "")),
            2 => Some(Fault::Drop),
            3 => Some(Fault::Truncate(random.below(100_000))),
            4 => Some(Fault::Alter(random.below(4_000))),
            5 => Some(Fault::Stall(Duration::from_millis(random.below(1_500)))),
            _ => None,
        };
        // Altered objects are asked for twice: more often in a row they are what the store has.
        let times = if matches!(fault, Some(Fault::Alter(_))) { 1 } else { 1 + random.below(20) };
        let after = random.below(60);
        println!("fault {number} (seed {seed}): {fault:?}, {times} times, after {after} requests");
        site.proxy.set_latency(Duration::from_millis(random.below(10)));
        let name = format!("reverted{number}");
        let to = dir.make(&name)?;
        let _ = fs::remove_dir_all(&site.cache);
        let requests = site.proxy.requests();
        let revert = site.revert(dir, &from, &to, &["--store-timeout", "20"]);
        let mut reverted = Reverted::of(revert, &to)?;
        wait_for(SOON, "requests", || {
            let is_time = site.proxy.requests() >= requests + after;
            // There may be no more of them.
            let is_over = reverted.server.as_mut().is_none_or(|server| {
                server.said().iter().any(|line| line.contains("disks_resident"))
            });
            Ok((is_time || is_over).then_some(()))
        })?;
        match fault {
            Some(fault) => site.proxy.fail("GET", "packs", times, fault),
            None => {
                site.server.kill();
                site.server.start_again()?;
            }
        }
        is_right(&mut reverted, &sum).map_err(|error| format!("fault {number}: {error}"))?;
        reverted.resident().map_err(|error| format!("fault {number}: {error}"))?;
        is_right(&mut reverted, &sum)?;
        site.proxy.heal();
        drop(reverted);
        fs::remove_dir_all(&to)?;
    }
    Ok(())
}

/// Saved on one host, under load, and reverted on another with nothing but the repository: all that had been
/// committed is there, in memory and on the disk.
#[test]
#[ignore = "it takes minutes: `make torture`"]
fn a_database_goes_on_at_another_site() -> Result<()> {
    crate::harness::in_a_folder(|dir| {
        let site = Site::open(dir)?;
        let here = dir.make("here")?;
        let disk = debian::make_disk(&here.join("disk.qcow2"))?;
        let mut guest = Guest::boot(&debian::options(Qemu::V10, disk))?;
        debian::start_pgbench(&mut guest.oracle, 2)?;
        debian::start_journal(&mut guest.oracle)?;
        wait_for(debian::PATIENCE, "commits", || {
            Ok((debian::acknowledged(&guest).len() > 50).then_some(()))
        })?;
        site.reaches(dir.snapback(&["init"])).succeed()?;
        let before = *debian::acknowledged(&guest).last().ok_or("no commits")?;
        let (name, spool) = (format!("s3://{BUCKET}/site/web1"), here.join("spool"));
        let save = ["save", "--qmp", text(&guest.qmp_path), &name];
        let save = dir.snapback(&save).with(&["--spool", text(&spool)]);
        site.reaches(save).succeed()?.event("pushed")?;
        let from = guest.dir.clone();
        drop(guest);
        fs::remove_dir_all(&here)?;

        site.proxy.set_latency(Duration::from_millis(20));
        site.proxy.set_rate(Some(200_000_000));
        let there = dir.make("there")?;
        let mut reverted = Reverted::of(site.revert(dir, &from, &there, &[]), &there)?;
        // A new client is served before all has arrived.
        debian::sql(&mut reverted.oracle, "SELECT 1")?;
        wait_for(debian::PATIENCE, "the journal to go on", || {
            let last = debian::acknowledged(&reverted).last().copied();
            Ok(last.is_some_and(|last| last > before).then_some(()))
        })?;
        reverted.resident()?.event("disks_resident")?;
        debian::stop_load(&mut reverted.oracle)?;
        debian::check(&mut reverted.oracle)?;
        assert!(debian::committed(&mut reverted.oracle)? > before);
        Ok(())
    })
}
