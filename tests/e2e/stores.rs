//! A round in a store of each kind: `make stores` starts the store, and gives its address.

use std::path::Path;

use serde_json::Value;

use crate::far::{boot, is_right};
use crate::harness::{Dir, Ended, Reverted, Snapback, in_a_folder, text};
use crate::support::{Qemu, Result};

/// The address of a repository that is not there yet. What else reaches it is in the environment.
const STORE: &str = "SNAPBACK_TEST_STORE";
/// Whether the store minds conditions: `true` or `false`.
const CONDITIONAL: &str = "SNAPBACK_TEST_STORE_CONDITIONAL";

#[test]
#[ignore = "`make stores` starts the stores"]
fn a_round_in_a_store() -> Result<()> {
    let store = std::env::var(STORE)?;
    let conditional: bool = std::env::var(CONDITIONAL)?.parse()?;
    in_a_folder(|dir| Round { dir, store }.go(conditional))
}

struct Round<'a> {
    dir: &'a Dir,
    store: String,
}

impl Round<'_> {
    fn snapback(&self, args: &[&str]) -> Snapback {
        let command = self.dir.snapback(args).env("SNAPBACK_REPOSITORY", &self.store);
        command.env("XDG_CACHE_HOME", text(&self.dir.path("cache")))
    }

    fn run(&self, args: &[&str]) -> Result<Ended> {
        self.snapback(args).succeed()
    }

    /// The tags of the snapshots that there are.
    fn tags(&self) -> Result<Vec<Value>> {
        let listed = self.run(&["list", "web1"])?.events;
        let snapshots = listed.iter().filter(|event| event["event"] == "snapshot");
        Ok(snapshots.map(|snapshot| snapshot["tags"].clone()).collect())
    }

    fn check(&self) -> Result<()> {
        self.run(&["check", "--repo", &self.store, "--read-data", "100%"]).map(drop)
    }

    fn go(&self, conditional: bool) -> Result<()> {
        let dir = self.dir;
        assert!(self.snapback(&["list"]).fail()?.contains("no repository"));
        assert_eq!(self.run(&["init"])?.event("initialized")?["conditional"], conditional);
        assert!(self.snapback(&["init"]).fail()?.contains("already"));

        // A save that goes straight there, and, of a guest that has gone on, two pushes of one image at once.
        let (mut guest, _) = boot(dir, Qemu::V10)?;
        let save = ["save", "--qmp", text(&guest.qmp_path), "web1", "--tag", "one"];
        let spool = dir.path("spool");
        let save = self.snapback(&save).with(&["--repo", &self.store, "--spool", text(&spool)]);
        save.succeed()?.event("pushed")?;
        guest.oracle.ask("disk write /dev/vdb 2048 1")?;
        let sum = guest.oracle.sum()?;
        dir.save(&guest, "vm.snap").with(&["--disks", "copy"]).succeed()?;
        let from = guest.dir.clone();
        drop(guest);
        let image = dir.path("vm.snap");
        let push = || self.snapback(&["push", text(&image), "--name", "web1", "--tag", "two"]);
        let (first, second) = (push().start()?, push().start()?);
        first.succeed()?.event("pushed")?;
        second.succeed()?.event("pushed")?;
        assert_eq!(self.tags()?, [serde_json::json!(["one"]), serde_json::json!(["two"])]);
        self.run(&["tag", "web1@latest", "golden"])?;
        self.check()?;

        // Of what is forgotten, the other snapshot needs the most.
        self.run(&["forget", "web1@one"])?;
        for _ in 0..2 {
            self.run(&["prune", "--grace", "0s", "--max-unused", "0%"])?;
        }
        assert_eq!(self.tags()?.len(), 1);
        self.check()?;

        let back = dir.path("back.snap");
        self.run(&["pull", "web1@golden", text(&back), "--no-disks"])?;
        assert!(std::fs::read(&back)? == std::fs::read(&image)?);
        self.revert(&from, &sum)?;

        self.run(&["forget", "web1"])?;
        for _ in 0..2 {
            self.run(&["prune", "--grace", "0s"])?;
        }
        let left = self.run(&["prune", "--dry-run"])?;
        let left = left.event("pruned")?;
        assert_eq!((&left["kept_packs"], &left["waiting_packs"]), (&0.into(), &0.into()));
        assert!(self.tags()?.is_empty());
        Ok(())
    }

    /// A guest goes on from there, before it has arrived and when it has.
    fn revert(&self, from: &Path, sum: &str) -> Result<()> {
        let to = self.dir.make("reverted")?;
        let name = format!("{}/web1@latest", self.store);
        let path = format!("{}={}", text(from), text(&to));
        let slow = ["--fill-delay", "100000", "--no-working-set", "--overlay-dir", text(&to)];
        let revert = self.snapback(&["revert", &name, "--path", &path]).with(&slow);
        let mut reverted = Reverted::of(revert, &to)?;
        is_right(&mut reverted, sum)?;
        reverted.server.as_mut().ok_or("no server")?.signal(libc::SIGINT);
        reverted.resident()?.event("disks_resident")?;
        is_right(&mut reverted, sum)
    }
}
