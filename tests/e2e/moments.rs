//! Disk and memory come from one moment, whenever that was.

use std::collections::HashSet;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Dir, Reverted, text};
use crate::shared::options;
use crate::support::{
    Disk, Format, Guest, GuestOptions, Qemu, Result, SOON, cont, convert, pmemsave, run, wait_for,
};
use crate::tests_on_both_at_length;

tests_on_both_at_length! {
    disk_and_memory_agree_at_every_moment
}

/// Snapshots that are taken of one guest. The way that memory takes has no part in this:
/// where all tests are run again for its sake, a few will do. `make torture` asks for more.
fn saves() -> usize {
    let asked = std::env::var("SNAPBACK_MOMENTS").ok().and_then(|saves| saves.parse().ok());
    asked.unwrap_or(if std::env::var_os("SNAPBACK_TEST_PLACE").is_some() { 3 } else { 8 })
}

/// Most records that the guest writes between two snapshots, over those it writes anyway.
const RECORDS_BETWEEN: u64 = 100;

/// Bytes of a record (`tests/guest/README.md`).
const RECORD: usize = 512;

/// A guest appends records to a file on ext4, each followed by fsync, and keeps in memory
/// how far it has come. Many snapshots of it are taken while it does. In each of them the
/// disk holds every record that memory says is acknowledged, at most the one more that
/// memory says is begun, and nothing beyond. Its file system is clean.
fn disk_and_memory_agree_at_every_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = Disk::new("disk", &dir.path("disk.raw"));
    disk.make_ext4(48)?;
    let mut guest = Guest::boot(&GuestOptions {
        disks: vec![disk],
        fill: crate::support::Fill::Mib(24),
        rate: 500,
        ..options(qemu)
    })?;
    let nonce = guest.oracle.nonce()?;
    let started = guest.oracle.ask("records start /dev/vda 0")?;
    let ledger = started.strip_prefix("ok ledger=").ok_or("no ledger")?.parse()?;

    for number in 0..saves() {
        let target = records(&mut guest)? + RandomState::new().hash_one(number) % RECORDS_BETWEEN;
        wait_for(SOON, "records", || Ok((records(&mut guest)? >= target).then_some(())))?;
        dir.save(&guest, &format!("{number}.snap")).succeed()?;
    }
    let from = guest.dir.clone();
    let _folder = guest.kill();

    let mut moments = HashSet::new();
    for number in 0..saves() {
        let image = dir.path(&format!("{number}.snap"));
        let to = dir.make(&format!("reverted-{number}"))?;
        let mut revert = dir.revert(&image, &from, &to).with(&["--", "-S"]).start()?;
        let disk = revert.wait("disk")?;
        let pid = revert.wait("running")?["pid"].as_u64().ok_or("no process")?;
        let mut reverted = Reverted::take(revert, pid as u32, &to)?;
        reverted.resident()?;

        // The moment itself: the guest has not run since.
        let page = dir.path("ledger");
        pmemsave(&reverted.qmp_path, ledger, 4096, &page)?;
        let ledger = Ledger::read(&page, &nonce)?;
        let frozen = path(&disk["frozen"])?;
        let format = if number == 0 { Format::Raw } else { Format::Qcow2 };
        let on_disk = records_on(dir, &frozen, format, &nonce)?;
        assert!(
            ledger.acknowledged <= on_disk && on_disk <= ledger.started,
            "snapshot {number}: {on_disk} records on disk, {ledger:?} in memory"
        );
        assert!(ledger.started - ledger.acknowledged <= 1, "{ledger:?}");
        moments.insert(ledger.acknowledged);

        // From there on, it goes on: what it has in memory and on disk is one whole.
        cont(&reverted.qmp_path)?;
        wait_for(SOON, "more records", || {
            Ok((records(&mut reverted)? > ledger.started + 1).then_some(()))
        })?;
        let checked = reverted.oracle.ask_within("records check", Duration::from_secs(300))?;
        assert!(checked.starts_with("ok "), "snapshot {number}: {checked}");
        if number % 5 == 0 {
            reverted.check(&nonce)?;
        }
        let written = records(&mut reverted)?;
        drop(reverted);
        let kept = records_on(dir, &path(&disk["overlay"])?, Format::Qcow2, &nonce)?;
        assert!(kept >= written, "{kept} of {written} records are left");
    }
    assert!(moments.len() > saves() / 2, "{moments:?}");
    Ok(())
}

pub fn records(guest: &mut crate::support::Contact) -> Result<u64> {
    Ok(guest.oracle.ask("records")?.parse()?)
}

fn path(value: &Value) -> Result<PathBuf> {
    Ok(value.as_str().ok_or_else(|| format!("{value} is no path"))?.into())
}

/// How far the guest had come, by its memory.
#[derive(Debug)]
struct Ledger {
    started: u64,
    acknowledged: u64,
}

impl Ledger {
    fn read(page: &Path, nonce: &str) -> Result<Ledger> {
        let page = fs::read(page)?;
        let word = |at: usize| u64::from_le_bytes(page[at * 8..][..8].try_into().unwrap());
        assert_eq!(word(0), u64::from_be_bytes(*b"snapledg"), "it is not at its place");
        assert_eq!(format!("{:016x}{:016x}", word(1), word(2)), nonce);
        Ok(Ledger { started: word(3), acknowledged: word(4) })
    }
}

/// Checks the file system on a disk, and counts the records on it, each of which has to be
/// the right one. As after a power failure, its journal is replayed first, on a copy; after
/// that, nothing may be left to repair.
pub fn records_on(dir: &Dir, disk: &Path, format: Format, nonce: &str) -> Result<u64> {
    let (copy, file) = (dir.path("copy"), dir.path("records"));
    convert(disk, format, &copy, Format::Raw)?;
    let replayed =
        Command::new("/sbin/e2fsck").args(["-y", "-E", "journal_only"]).arg(&copy).output()?;
    // 1: it had something to do (e2fsck(8)).
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{replayed:?}");
    run(Command::new("/sbin/e2fsck").arg("-fn").arg(&copy))?;
    let dump = format!("dump /records {}", text(&file));
    run(Command::new("/sbin/debugfs").args(["-R", &dump]).arg(&copy))?;
    let content = fs::read(&file)?;
    assert_eq!(content.len() % RECORD, 0);
    for (at, record) in content.chunks(RECORD).enumerate() {
        let word = |at: usize| u64::from_le_bytes(record[at * 8..][..8].try_into().unwrap());
        assert_eq!(word(0), at as u64 + 1);
        assert_eq!(format!("{:016x}{:016x}", word(1), word(2)), nonce);
        assert!(record[24..].iter().any(|byte| *byte != 0), "record {at} is empty");
    }
    Ok((content.len() / RECORD) as u64)
}
