//! A guest with a real userland: Debian with PostgreSQL at work (`tests/debian`).
//!
//! Its commands travel as the oracle's questions do, so a [`Contact`] of it, be it
//! booted or reverted, serves them by its `oracle`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{
    Contact, Disk, Format, Given, GuestOptions, Oracle, Qemu, Result, SerialLog, artifact, deps,
};

/// Allowed for one command: far more than any takes.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The guest's file, in its folder, with the numbers that its journal committed.
const JOURNAL: &str = "serial2.log";

/// Makes a disk for one guest to write to: an overlay on what `make debian` built.
///
/// # Errors
/// When that has not been built, or qemu-img fails.
pub fn make_disk(file: &Path) -> Result<Disk> {
    let built = artifact(deps().join("debian.raw"))?.canonicalize()?;
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).args([&built, file]);
    super::run(&mut command)?;
    Ok(Disk { given: Given::BlockdevJson, format: Format::Qcow2, ..Disk::new("root", file) })
}

/// A guest with that disk, 512 MiB of RAM and two vCPUs; it boots in about 9 s.
pub fn options(qemu: Qemu, disk: Disk) -> GuestOptions {
    let disks = vec![disk];
    GuestOptions { qemu, mib: 512, vcpus: 2, disks, debian: true, ..GuestOptions::default() }
}

/// Runs a shell command in the guest, to its end, and returns what it printed. One
/// that leaves something in the background has to take that thing's output elsewhere.
///
/// # Errors
/// When it fails, with what it printed; when there is no answer in five minutes.
pub fn run(guest: &mut Oracle, command: &str) -> Result<String> {
    assert!(!command.contains('\n'), "a command is one line: {command}");
    let answer = guest.ask_within(command, PATIENCE)?;
    let said = answer.strip_prefix("ok").ok_or_else(|| format!("an answer is `{answer}`"))?;
    Ok(said.trim_start().replace('\u{1e}', "\n"))
}

/// Executes one SQL statement and returns its rows: a line each, values separated
/// by `|`.
///
/// # Errors
/// When PostgreSQL answers with an error, or not at all.
pub fn sql(guest: &mut Oracle, statement: &str) -> Result<String> {
    assert!(!statement.contains('\''), "a statement is quoted: {statement}");
    run(guest, &format!("psql -Atq -v ON_ERROR_STOP=1 postgres -c '{statement}'"))
}

/// Has pgbench run its transactions over that many connections until the guest ends, or
/// [`stop_load`].
///
/// # Errors
/// When there is no answer.
pub fn start_pgbench(guest: &mut Oracle, clients: u32) -> Result<()> {
    start(guest, "pgbench", &format!("pgbench -n -c {clients} -T 1000000 -P 1 postgres"))
}

fn start(guest: &mut Oracle, name: &str, command: &str) -> Result<()> {
    let output = format!("/run/{name}.log 2>&1 & echo $! >/run/{name}.pid");
    run(guest, &format!("setsid {command} >{output}")).map(drop)
}

/// Ends pgbench and the journal, as far as they run.
///
/// # Errors
/// When there is no answer.
pub fn stop_load(guest: &mut Oracle) -> Result<()> {
    run(guest, "for pid in /run/pgbench.pid /run/journal.pid; do kill -TERM -$(cat $pid); done")
        .map(drop)
}

/// How many transactions pgbench's script has committed since the disk was built.
///
/// # Errors
/// As [`sql`].
pub fn transactions(guest: &mut Oracle) -> Result<u64> {
    Ok(sql(guest, "SELECT count(*) FROM pgbench_history")?.parse()?)
}

/// Has a client commit the numbers from 1 on, one transaction each, until the guest
/// ends. It tells each number that PostgreSQL has acknowledged: see [`acknowledged`].
///
/// # Errors
/// When there is no answer.
pub fn start_journal(guest: &mut Oracle) -> Result<()> {
    start(guest, "journal", "journal")
}

/// The numbers that the journal's client has told at `guest` so far, in order. A
/// reverted guest tells those that come after the moment of its snapshot, in a file
/// of its own; that moment may have cut the first in two.
pub fn acknowledged(guest: &Contact) -> Vec<u64> {
    told_in(&guest.dir)
}

/// The same, of the guest with this folder.
pub fn told_in(dir: &Path) -> Vec<u64> {
    let text = SerialLog::whole(&dir.join(JOURNAL)).text();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The numbers that are in the journal's table: it says whether they are 1, 2, 3 … N
/// without a gap, and returns N.
///
/// # Errors
/// When one is missing, or as [`sql`].
pub fn committed(guest: &mut Oracle) -> Result<u64> {
    let answer = sql(guest, "SELECT count(*), coalesce(max(number), 0) FROM journal")?;
    match answer.split_once('|') {
        Some((count, max)) if count == max => Ok(max.parse()?),
        _ => Err(format!("the journal has gaps: count|max is {answer}").into()),
    }
}

/// Checks the database: every table and index by `pg_amcheck`, and that the sums
/// which each of pgbench's transactions keeps equal are.
///
/// # Errors
/// What is found wrong.
pub fn check(guest: &mut Oracle) -> Result<()> {
    let said = run(guest, "pg_amcheck postgres")?;
    if !said.is_empty() {
        return Err(format!("pg_amcheck says: {said}").into());
    }
    let sums = sql(
        guest,
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), \
         (SELECT sum(tbalance) FROM pgbench_tellers), \
         (SELECT sum(bbalance) FROM pgbench_branches), \
         (SELECT coalesce(sum(delta), 0) FROM pgbench_history)",
    )?;
    let mut each = sums.split('|');
    let first = each.next();
    match each.all(|sum| Some(sum) == first) {
        true => Ok(()),
        false => Err(format!("pgbench's balances differ: {sums}").into()),
    }
}
