//! Guests that are brought back from a repository in an object store, before their snapshot has
//! arrived: a real server of S3 behind a network of the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{Dir, Reverted, Snapback, text};
use crate::support::proxy::Proxy;
use crate::support::s3::{BUCKET, S3Server, environment};
use crate::support::{Disk, Fill, Guest, GuestOptions, Qemu, Result, SOON, wait_for};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    a_guest_runs_before_its_snapshot_has_arrived
}

tests! {
    a_store_that_dies_and_comes_back_costs_time_alone
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

/// A guest with two disks that has been saved, pushed and ended: nothing is left of it but the
/// repository. Returns where its sockets were, and the sum of its memory.
fn push(dir: &Dir, site: &Site, qemu: Qemu) -> Result<(PathBuf, String)> {
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
    dir.save(&guest, "vm.snap").with(&["--disks", "copy"]).succeed()?;
    let from = guest.dir.clone();
    drop(guest);
    site.reaches(dir.snapback(&["init"])).succeed()?;
    let image = dir.path("vm.snap");
    site.reaches(dir.snapback(&["push", text(&image), "--name", "web1"])).succeed()?;
    for name in dir.names(".")? {
        let path = dir.path(&name);
        if path.is_file() {
            fs::remove_file(path)?;
        }
    }
    Ok((from, sum))
}

/// Memory and disks are those of the moment.
fn is_right(reverted: &mut Reverted, sum: &str) -> Result<()> {
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

    // The drill does the same, and leaves nothing.
    let to = dir.make("drill")?;
    let path = format!("{}={}", text(&from), text(&to));
    let drill = dir.snapback(&["drill", "web1@latest", "--path", &path]);
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
