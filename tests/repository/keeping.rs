//! Many snapshots, kept and forgotten.

use std::fs;
use std::time::{Duration, SystemTime};

use snapback::repository::{
    Access, Address, CheckOptions, ForgetOptions, PruneOptions, PushOptions, Recipients,
    Repository, Retention, check, forget, list, prune, push, tag,
};

use crate::harness::{Memory, noise};
use crate::support::{Result, files};

const DAY: u64 = 86_400_000_000;

#[test]
fn sixty_snapshots_are_pushed_forgotten_pruned_and_checked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let address: Address = folder.path().join("repository").display().to_string().parse()?;
    let repository = Repository::init(&address, &Access::new(), &Recipients::nobody())?;
    let mut memory = Memory::new("web1", 3, 2);
    let start = memory.moment_unix_us;
    for day in 0..60 {
        // Each day half a MiB is another.
        let at = (day % 3) << 19;
        memory.bytes[at..at + (1 << 19)].copy_from_slice(&noise(100 + day as u64, 1 << 19));
        memory.moment_unix_us = start + day as u64 * DAY;
        let path = folder.path().join("vm.snap");
        let _ = fs::remove_file(&path);
        memory.save(&path, None)?;
        let pushed = push(&repository, &PushOptions::new(&path), |_| {})?;
        assert!(pushed.manifest.own < 2 << 20, "day {day}: {}", pushed.manifest.own);
    }
    let tagged = repository.resolve(&"web1@2026-11-27".parse()?)?;
    tag(&repository, &tagged, &["golden".to_owned()].into(), &Default::default())?;

    let mut options = ForgetOptions::default();
    assert!(forget(&repository, &options).is_err(), "nothing says what is kept");
    let mut retention = Retention::default();
    (retention.last, retention.daily, retention.weekly) = (2, 7, 4);
    (options.retention, options.dry_run) = (retention, true);
    let looked = forget(&repository, &options)?;
    let kept = looked.iter().filter(|one| !one.kept_by.is_empty()).count();
    assert_eq!(list(&repository, None)?.len(), 60);
    options.dry_run = false;
    forget(&repository, &options)?;
    let left = list(&repository, None)?;
    assert_eq!((left.len(), kept), (10, 10), "7 days, 2 weeks before, and a tag");
    assert!(left.iter().any(|(_, tags)| tags.contains("golden")));

    // First marked, then removed; what is left is whole.
    let mut options = PruneOptions::default();
    options.max_unused = 1.0;
    let marked = prune(&repository, &options)?;
    assert!(marked.marked_packs > 20 && marked.removed_packs == 0, "{marked:?}");
    let again = prune(&repository, &options)?;
    assert_eq!((again.marked_packs, again.waiting_packs), (0, marked.marked_packs));
    options.grace = Duration::ZERO;
    let removed = prune(&repository, &options)?;
    assert_eq!(
        (removed.removed_packs, removed.removed_bytes),
        (marked.marked_packs, marked.marked_bytes)
    );
    let mut all = CheckOptions::default();
    all.read_data = 1.0;
    let (checked, damages) = check(&repository, &all, |damage| panic!("{damage:?}"))?;
    assert_eq!((checked.snapshots, damages), (10, 0));
    assert_eq!((checked.packs, checked.unreferred_packs), (removed.kept_packs, 0));

    // What a killed push has left stays as long as its lease may hold, and goes then.
    let path = folder.path().join("repository/packs/00");
    fs::create_dir_all(&path)?;
    fs::write(path.join("00".repeat(16)), b"left over")?;
    let lease = snapback::repository::left_lease(&repository)?;
    let held = prune(&repository, &options)?;
    assert_eq!((held.removed_packs, held.marked_packs), (0, 0), "{held:?}");
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    fs::File::options()
        .write(true)
        .open(folder.path().join("repository").join(&lease))?
        .set_modified(long_ago)?;
    assert_eq!(prune(&repository, &options)?.removed_packs, 1);
    assert!(files(&folder.path().join("repository/leases"))?.is_empty());
    Ok(())
}
