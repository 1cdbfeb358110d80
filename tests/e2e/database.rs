//! A database at work in a real userland: its memory and its disk are of one moment, or
//! it would say so.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::harness::{Dir, Ended, Reverted};
use crate::support::{Contact, Guest, Qemu, Result, debian, wait_for, wait_until};
use crate::tests_on_both_at_length;

tests_on_both_at_length! {
    a_database_under_load_is_whole_after_every_revert
}

/// Commits that precede the snapshot.
const COMMITS: usize = 20;

fn a_database_under_load_is_whole_after_every_revert(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = debian::make_disk(&dir.path("disk.qcow2"))?;
    let mut guest = Guest::boot(&debian::options(qemu, disk))?;
    let begun = "begun timestamptz DEFAULT clock_timestamp()";
    debian::sql(&mut guest.oracle, &format!("ALTER TABLE journal ADD COLUMN {begun}"))?;
    debian::start_pgbench(&mut guest.oracle, 2)?;
    debian::start_journal(&mut guest.oracle)?;
    wait_until(debian::PATIENCE, "commits", || debian::acknowledged(&guest).len() > COMMITS)?;
    let transactions = debian::transactions(&mut guest.oracle)?;

    // Nothing that was acknowledged before the guest was stopped may be missing.
    let (saved, told) = watched(&guest, || dir.save(&guest, "vm.snap").succeed())?;
    let moment = saved.event("moment")?;
    let unix_us = moment["unix_us"].as_u64().ok_or("a moment without its time")?;
    let pause_ms = moment["pause_ms"].as_f64().ok_or("a moment without its pause")?;
    let stopped = UNIX_EPOCH + Duration::from_micros(unix_us - (pause_ms * 1e3) as u64);
    let before = told.iter().rev().find(|(at, _)| *at < stopped).map(|(_, number)| *number);
    let before = before.ok_or("nothing was told before the moment")?;
    assert!(before > COMMITS as u64);

    // The load goes on, in the original and in both reverts.
    let start = Instant::now();
    debian::sql(&mut guest.oracle, "SELECT 1")?;
    eprintln!("a new client of the original has its answer after {:.2?}", start.elapsed());
    let mut first = revert(dir, &guest, "first", before)?;
    let mut second = revert(dir, &guest, "second", before)?;
    for reverted in [&mut first, &mut second] {
        assert!(debian::transactions(&mut reverted.oracle)? >= transactions);
    }
    let after = *debian::acknowledged(&guest).last().ok_or("no journal")?;
    wait_until(debian::PATIENCE, "the original to go on", || {
        debian::acknowledged(&guest).last().is_some_and(|last| *last > after)
    })?;
    drop(guest);
    for reverted in [&mut first, &mut second] {
        reverted.resident()?;
        debian::stop_load(&mut reverted.oracle)?;
        debian::check(&mut reverted.oracle)?;
        assert!(debian::committed(&mut reverted.oracle)? > before);
    }
    Ok(())
}

/// Does something while the journal's numbers are noted, each with the time by which it
/// had come.
fn watched(
    guest: &Contact,
    act: impl FnOnce() -> Result<Ended>,
) -> Result<(Ended, Vec<(SystemTime, u64)>)> {
    let (done, dir) = (AtomicBool::new(false), guest.dir.as_path());
    let mut told = Vec::new();
    // Here and now: the thread may be slow to start.
    note(dir, &mut told);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                note(dir, &mut told);
                thread::sleep(Duration::from_millis(1));
            }
            told
        });
        let ended = act();
        done.store(true, Ordering::Relaxed);
        let told = watch.join().map_err(|_| "the watching thread panicked")?;
        Ok((ended?, told))
    })
}

fn note(dir: &Path, told: &mut Vec<(SystemTime, u64)>) {
    let last = debian::told_in(dir).last().copied();
    // The time is taken after the number: it had come by then.
    if let Some(number) = last.filter(|number| told.last().is_none_or(|(_, last)| last < number)) {
        told.push((SystemTime::now(), number));
    }
}

/// Reverts, and has the database answer: whoever was connected goes on within a second, and
/// who comes anew is served. The times by the host's clock are told; under TCG, starting
/// psql takes most of a second.
///
/// The second is one of the guest's own clock, and one in which the host has processors for
/// the guest and for who feeds it: time that their threads spend waiting for one is not held
/// against them.
fn revert(dir: &Dir, guest: &Contact, name: &str, before: u64) -> Result<Reverted> {
    let to = dir.make(name)?;
    let revert = dir.revert(&dir.path("vm.snap"), &guest.dir, &to).with(&["--ephemeral"]);
    let mut reverted = Reverted::of(revert, &to)?;
    let running = Instant::now();
    let processes = [Some(reverted.pid), reverted.server.as_ref().map(|server| server.pid())];
    let waiting = || processes.into_iter().flatten().map(waited_for_processors).sum::<Duration>();
    let (at_first, mut waited) = (waiting(), Duration::ZERO);
    let mut told = |at: usize| {
        wait_for(debian::PATIENCE, "the journal to go on", || {
            // What a thread has waited for goes with it.
            waited = waited.max(waiting().saturating_sub(at_first));
            Ok(debian::acknowledged(&reverted).get(at).copied())
        })
    };
    // The moment may have cut the first in two.
    let next = told(1)?;
    let goes_on = running.elapsed();
    assert!(next > before, "{before} was told before the moment, {next} is told after it");
    told(2)?;
    debian::sql(&mut reverted.oracle, "SELECT 1")?;
    let answered = running.elapsed();
    let (across, usual) = around_the_moment(&mut reverted, next)?;
    eprintln!(
        "{name}: the second commit came {goes_on:.2?} after the guest ran, a new client's answer \
         {answered:.2?} after it; by the guest's clock, three commits around the moment took \
         {across:.3} s, others {usual:.3} s at most; all threads together waited {waited:.2?} for \
         processors"
    );
    assert!(
        across < 1.0 + usual + waited.as_secs_f64(),
        "three commits around the moment took {across} s, where {usual} s are usual"
    );
    Ok(reverted)
}

/// How long a process's threads have waited for a processor, all together (the second field
/// of `/proc/PID/task/TID/schedstat`, in nanoseconds).
fn waited_for_processors(pid: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let waited = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        Some(Duration::from_nanos(stat.split_whitespace().nth(1)?.parse().ok()?))
    };
    tasks.filter_map(waited).sum()
}

/// How long it took the journal's client, in seconds of the guest's own clock, from the
/// beginning of the last transaction that it was told of before the moment until it was
/// told of the one called `next`, which began after the moment; and how long as many
/// transactions took before, at most, which is what a host under load makes of them.
fn around_the_moment(guest: &mut Contact, next: u64) -> Result<(f64, f64)> {
    // A transaction begins when its predecessor has been acknowledged.
    let answer = debian::sql(
        &mut guest.oracle,
        &format!(
            "SELECT max(took) FILTER (WHERE number = {next} - 2), \
             max(took) FILTER (WHERE number + 3 <= {next} - 2) FROM (SELECT number, \
             extract(epoch FROM lead(begun, 3) OVER (ORDER BY number) - begun) AS took \
             FROM journal) AS transactions"
        ),
    )?;
    let (across, usual) = answer.split_once('|').ok_or("two numbers were asked for")?;
    Ok((across.parse()?, usual.parse()?))
}
