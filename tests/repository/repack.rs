//! Packs that are partly unused are repacked, whatever goes on beside that, and wherever it ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapback::page::{BlockId, Location, PAGE_SIZE, Page, PageSource};
use snapback::repository::{
    Access, Address, CheckOptions, ForgetOptions, KeySource, PruneOptions, Pruned, PullOptions,
    PushOptions, Recipients, Repository, check, forget, list, prune, pull, push,
};
use snapback::{CacheOptions, FarOptions, FarSnapshot};
use tempfile::TempDir;

use crate::harness::{Memory, event, events, noise, same, snapback, start, wait_for_stop};
use crate::support::{Result, files, wait_until};

const DAY: u64 = 86_400_000_000;
/// Bytes of a machine's memory, all of it noise.
const MEMORY: usize = 4 << 20;

/// A repository of three machines: of the first snapshot's pack of each, which is forgotten, the second
/// one needs another part.
struct Machines {
    folder: TempDir,
    address: Address,
    access: Access,
    repository: Repository,
}

/// What the second snapshot needs of the first one's memory, in eighths.
const NEEDS: [(&str, usize); 3] = [("a", 1), ("b", 4), ("c", 7)];

impl Machines {
    fn new() -> Result<Machines> {
        Machines::of(&NEEDS, &Recipients::nobody())
    }

    fn of(needs: &[(&str, usize)], recipients: &Recipients) -> Result<Machines> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("identity");
        fs::write(&path, crate::transfer::IDENTITY)?;
        let keys = match recipients.to.is_empty() {
            true => Vec::new(),
            false => vec![KeySource::Identities(path)],
        };
        let access = Access::new().with_keys(keys);
        let address: Address = folder.path().join("repository").display().to_string().parse()?;
        let repository = Repository::init(&address, &access, recipients)?;
        let machines = Machines { folder, address, access, repository };
        for (seed, &(name, eighths)) in (1..).zip(needs) {
            machines.push(name, seed, 8, 0)?;
            machines.push(name, seed, eighths, 1)?;
            machines.forget(&format!("{name}@2026-11-25"))?;
        }
        Ok(machines)
    }

    /// Pushes a machine's memory of which the first eighths are those of this seed.
    fn push(&self, name: &str, seed: u64, eighths: usize, day: u64) -> Result<()> {
        push(&self.repository, &self.save(name, seed, eighths, day)?, |_| {})?;
        Ok(())
    }

    fn save(&self, name: &str, seed: u64, eighths: usize, day: u64) -> Result<PushOptions> {
        let mut memory = Memory::new(name, seed, MEMORY >> 20);
        memory.bytes = noise(seed, MEMORY);
        let at = eighths * (MEMORY / 8);
        memory.bytes[at..].copy_from_slice(&noise(seed + 100 * (day + 1), MEMORY - at));
        memory.moment_unix_us += day * DAY;
        let image = self.image(name, day);
        memory.save(&image, None)?;
        let mut options = PushOptions::new(image);
        options.tags = [format!("day{day}")].into();
        Ok(options)
    }

    fn image(&self, name: &str, day: u64) -> PathBuf {
        self.path(&format!("{name}{day}.snap"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The objects of a kind.
    fn objects(&self, kind: &str) -> Result<Vec<PathBuf>> {
        let folder = self.path("repository").join(kind);
        if folder.exists() { files(&folder) } else { Ok(Vec::new()) }
    }

    fn forget(&self, name: &str) -> Result<()> {
        let mut options = ForgetOptions::default();
        options.names = vec![name.parse()?];
        forget(&self.repository, &options)?;
        Ok(())
    }

    fn prune(&self, max_unused: f64, grace: Duration) -> Result<Pruned> {
        let mut options = PruneOptions::default();
        (options.max_unused, options.grace) = (max_unused, grace);
        Ok(prune(&self.repository, &options)?)
    }

    /// The program on this repository.
    fn start(&self, args: &[&str], stop_at: &str) -> Result<Child> {
        let mut command = snapback(&self.path("repository").display().to_string(), args);
        command.env("SNAPBACK_TEST_STOP_AT", stop_at);
        let child = start(command)?;
        wait_for_stop(&child)?;
        Ok(child)
    }

    /// Whether these snapshots are all there are, and each is what was pushed.
    fn are_whole(&self, snapshots: &[(&str, u64)]) -> Result<()> {
        let names = list(&self.repository, None)?.into_iter().map(|(found, tags)| {
            let day = tags.iter().find_map(|tag| tag.strip_prefix("day")?.parse().ok());
            (found.machine, day.unwrap_or(99))
        });
        let mut names: Vec<(String, u64)> = names.collect();
        names.sort();
        assert!(
            names.iter().map(|(name, day)| (name.as_str(), *day)).eq(snapshots.iter().copied())
        );
        for (name, day) in snapshots {
            let manifest = self.repository.resolve(&format!("{name}@day{day}").parse()?)?;
            let id = manifest.id.to_string();
            let options = PullOptions::new(self.path(&format!("back/{id}.snap")));
            fs::create_dir_all(self.path("back"))?;
            let _ = fs::remove_file(&options.image);
            // By its id alone it is no other.
            let manifest = self.repository.resolve(&id[..12].parse()?)?;
            pull(&self.repository, manifest, &options, |_| {})?;
            assert!(same(&options.image, &self.image(name, *day))?, "{name}{day}");
            let again = push(&self.repository, &PushOptions::new(self.image(name, *day)), |_| {})?;
            assert!(again.was_there);
        }
        let mut all = CheckOptions::default();
        all.read_data = 1.0;
        let (checked, damages) = check(&self.repository, &all, |damage| panic!("{damage:?}"))?;
        assert_eq!((checked.snapshots, damages), (snapshots.len() as u64, 0));
        Ok(())
    }

    /// Whether nothing is there but what snapshots need.
    fn is_clean(&self, snapshots: usize) -> Result<()> {
        let (checked, _) = check(&self.repository, &CheckOptions::default(), |_| {})?;
        assert_eq!(checked.unreferred_packs, 0);
        let count = |kind| self.objects(kind).map(|found| found.len());
        assert_eq!((count("snapshots")?, count("maps")?), (snapshots, snapshots));
        assert_eq!((count("marks")?, count("leases")?), (0, 0));
        Ok(())
    }

    /// All leases are as old as if who held them were long gone.
    fn end_leases(&self) -> Result<()> {
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        for lease in self.objects("leases")? {
            fs::File::options().write(true).open(lease)?.set_modified(long_ago)?;
        }
        Ok(())
    }
}

const LATER: Duration = Duration::from_secs(3600);

fn go_on(child: &Child) -> Result<()> {
    Ok(kill(Pid::from_raw(child.id() as i32), Signal::SIGCONT)?)
}

#[test]
fn what_is_mostly_unused_is_repacked_the_cheapest_first() -> Result<()> {
    let machines = Machines::new()?;
    let snapshots = [("a", 1), ("b", 1), ("c", 1)];
    // Of 18 MiB, 12 of the first snapshots and 6 of the second ones, 6 are unused.
    let none = machines.prune(1.0, LATER)?;
    assert_eq!((none.repacked_packs, none.repacked_bytes, none.freed_bytes), (0, 0, 0));
    let mut options = PruneOptions::default();
    (options.max_unused, options.dry_run) = (0.25, true);
    let before = machines.objects("")?;
    let would = prune(&machines.repository, &options)?;
    assert_eq!((would.repacked_packs, machines.objects("")?), (1, before));
    // 3.5 MiB of 4 are unused, then 2, then half a MiB.
    let eighth = MEMORY as u64 / 8;
    for (most, freed, left) in [(0.25, 7, 5), (0.1, 4, 1), (0.0, 1, 0)] {
        let pruned = machines.prune(most, LATER)?;
        assert_eq!(pruned.repacked_packs, 1, "{most}: {pruned:?}");
        // Where the parts meet, an extent belongs to neither.
        let about = |bytes: u64, eighths: u64| bytes.abs_diff(eighths * eighth) < 3 * eighth / 2;
        assert!(about(pruned.freed_bytes, freed), "{most}: {pruned:?}");
        assert!(about(pruned.repacked_bytes, 8 - freed), "{most}: {pruned:?}");
        assert!(about(pruned.unused_bytes, left), "{most}: {pruned:?}");
    }
    machines.are_whole(&snapshots)?;
    let again = machines.prune(0.0, LATER)?;
    assert_eq!((again.repacked_packs, again.unused_bytes), (0, 0), "{again:?}");
    assert_eq!(machines.objects("packs")?.len(), 9);
    let removed = machines.prune(0.0, Duration::ZERO)?;
    assert_eq!((removed.removed_packs, removed.repacked_packs), (3, 0), "{removed:?}");
    machines.is_clean(3)?;
    // What is repacked is forgotten and removed as all else.
    machines.forget("a")?;
    machines.prune(0.0, Duration::ZERO)?;
    machines.is_clean(2)?;
    machines.are_whole(&snapshots[1..])
}

#[test]
fn an_encrypted_repository_is_repacked_as_well() -> Result<()> {
    let mut recipients = Recipients::nobody();
    recipients.to = vec![crate::transfer::RECIPIENT.into()];
    let machines = Machines::of(&NEEDS[..1], &recipients)?;
    assert_eq!(machines.prune(0.0, LATER)?.repacked_packs, 1);
    assert_eq!(machines.prune(0.0, Duration::ZERO)?.removed_packs, 1);
    machines.is_clean(1)?;
    machines.are_whole(&[("a", 1)])
}

#[test]
fn a_push_and_a_revert_beside_it_find_all_that_they_refer_to() -> Result<()> {
    let machines = Machines::new()?;
    // It refers to what only the forgotten snapshot needed, and nobody knows yet.
    let third = machines.save("a", 1, 8, 2)?;
    let image = third.image.display().to_string();
    let mut push = machines.start(&["push", &image, "--tag", "day2"], "push-before-manifest")?;
    let mut options =
        FarOptions::new(machines.address.clone(), "b@latest".parse()?, machines.access.clone());
    options.cache = CacheOptions::default();
    options.cache.directory = machines.path("cache");
    let far = FarSnapshot::open(&options)?;
    let leases = || machines.objects("leases").is_ok_and(|leases| leases.len() == 2);
    wait_until(Duration::from_secs(10), "the lease of a revert", leases)?;

    assert_eq!(machines.prune(0.0, LATER)?.repacked_packs, 3);
    for _ in 0..2 {
        let held = machines.prune(0.0, Duration::ZERO)?;
        assert!(held.removed_packs == 0 && held.held_by.len() == 1, "{held:?}");
    }
    go_on(&push)?;
    assert!(push.wait()?.success());
    // Of the three old packs the push needs that of a, and the revert that of b.
    let pruned = machines.prune(1.0, Duration::ZERO)?;
    assert_eq!(pruned.removed_packs, 1, "{pruned:?}");
    assert!(all_of(&far)? == memory_of(2, 4));
    drop(far);
    let no_leases = || machines.objects("leases").is_ok_and(|leases| leases.is_empty());
    wait_until(Duration::from_secs(10), "the end of the revert's lease", no_leases)?;
    assert_eq!(machines.prune(1.0, Duration::ZERO)?.removed_packs, 1);
    machines.are_whole(&[("a", 1), ("a", 2), ("b", 1), ("c", 1)])?;
    machines.is_clean(4)
}

/// The memory of a second snapshot.
fn memory_of(seed: u64, eighths: usize) -> Vec<u8> {
    let mut bytes = noise(seed, MEMORY);
    let at = eighths * (MEMORY / 8);
    bytes[at..].copy_from_slice(&noise(seed + 200, MEMORY - at));
    bytes
}

/// All memory of a snapshot that is read from afar.
fn all_of(far: &FarSnapshot) -> Result<Vec<u8>> {
    let image = far.image();
    let mut reader = image.reader()?;
    let mut bytes = Vec::new();
    for number in 0..image.blocks()[0].len / PAGE_SIZE as u64 {
        match image.locate(Page { block: BlockId(0), number })? {
            Location::Zero => bytes.extend([0; PAGE_SIZE]),
            Location::Stored { chunk, slot } => {
                bytes.extend(&reader.read(chunk)?[slot * PAGE_SIZE..][..PAGE_SIZE]);
            }
        }
    }
    Ok(bytes)
}

#[test]
fn killed_in_the_middle_it_loses_nothing_and_the_next_one_cleans_up() -> Result<()> {
    for place in [
        "prune-before-manifests",
        "prune-behind-draft",
        "prune-behind-manifest",
        "prune-behind-look",
    ] {
        let machines = Machines::new()?;
        let mut killed = machines.start(&["prune", "--max-unused", "0%"], place)?;
        killed.kill()?;
        killed.wait()?;
        let snapshots = [("a", 1), ("b", 1), ("c", 1)];
        machines.are_whole(&snapshots)?;
        machines.end_leases()?;
        // What was half made goes at once; what is repacked now, by the prune behind that.
        let pruned = machines.prune(0.0, Duration::ZERO)?;
        assert!(pruned.removed_packs > 0 && pruned.repacked_packs >= 2, "{place}: {pruned:?}");
        machines.prune(0.0, Duration::ZERO)?;
        machines.is_clean(3)?;
        let pruned = machines.prune(0.0, Duration::ZERO)?;
        assert_eq!((pruned.repacked_packs, pruned.unused_bytes), (0, 0), "{place}: {pruned:?}");
        machines.are_whole(&snapshots)?;
    }
    Ok(())
}

#[test]
fn what_is_forgotten_beside_it_stays_forgotten() -> Result<()> {
    let machines = Machines::new()?;
    let places = "prune-before-manifests,prune-behind-manifest";
    let mut prune = machines.start(&["prune", "--max-unused", "0%"], places)?;
    machines.forget("b")?;
    go_on(&prune)?;
    // Behind the new manifest of a.
    wait_for_stop(&prune)?;
    // Two old ones, and one new, with what makes it a draft.
    assert_eq!(machines.objects("snapshots")?.len(), 4);
    machines.forget("a")?;
    // Behind that of b, which is not there any more, and that of c.
    for _ in 0..2 {
        go_on(&prune)?;
        wait_for_stop(&prune)?;
    }
    go_on(&prune)?;
    assert!(prune.wait()?.success());
    machines.are_whole(&[("c", 1)])?;
    for _ in 0..2 {
        machines.prune(0.0, Duration::ZERO)?;
    }
    machines.is_clean(1)
}

#[test]
fn what_is_forgotten_stays_so_when_a_prune_is_killed_before_it_has_looked() -> Result<()> {
    let machines = Machines::of(&NEEDS[..2], &Recipients::nobody())?;
    let places = "prune-before-manifests,prune-behind-manifest";
    let mut prune = machines.start(&["prune", "--max-unused", "0%"], places)?;
    machines.forget("a")?;
    go_on(&prune)?;
    // The new manifest of a is there, and nobody will look for the old one any more.
    wait_for_stop(&prune)?;
    prune.kill()?;
    prune.wait()?;
    assert_eq!(machines.objects("snapshots")?.len(), 3);
    machines.are_whole(&[("b", 1)])?;
    assert!(machines.repository.resolve(&"a".parse()?).is_err());
    // As long as it may be at work, it is left alone.
    machines.prune(1.0, Duration::ZERO)?;
    assert_eq!(machines.objects("snapshots")?.len(), 3);
    // Pushed again, it is a snapshot like any other.
    let mut again = PushOptions::new(machines.image("a", 1));
    again.tags = ["day1".to_owned()].into();
    assert!(!push(&machines.repository, &again, |_| {})?.was_there);
    machines.are_whole(&[("a", 1), ("b", 1)])?;
    machines.end_leases()?;
    for _ in 0..2 {
        machines.prune(1.0, Duration::ZERO)?;
    }
    machines.is_clean(2)?;
    machines.are_whole(&[("a", 1), ("b", 1)])
}

#[test]
fn what_is_damaged_is_told_and_stays() -> Result<()> {
    let machines = Machines::new()?;
    for pack in machines.objects("packs")? {
        damage(&pack)?;
    }
    let repository = machines.path("repository").display().to_string();
    let before = machines.objects("packs")?;
    let damaged = snapback(&repository, &["prune", "--max-unused", "0%"]);
    assert_eq!(crate::harness::failure(damaged)?, ("repository_damaged".into(), 4));
    let after = machines.objects("packs")?;
    assert!(before.iter().all(|pack| after.contains(pack)));
    assert_eq!(list(&machines.repository, None)?.len(), 3);
    // Left alone, they are no matter.
    let pruned = events(snapback(&repository, &["prune", "--max-unused", "100%"]))?;
    assert_eq!(event(&pruned, "pruned")?["repacked_packs"], 0);
    Ok(())
}

/// Alters a byte of each extent that there may be in a pack.
fn damage(pack: &Path) -> Result<()> {
    let mut bytes = fs::read(pack)?;
    bytes.iter_mut().step_by(4096).for_each(|byte| *byte ^= 1);
    Ok(fs::write(pack, bytes)?)
}
