//! How fast it is: numbers to look at. `cargo test --release --features internals,libvirt --test repository
//! -- --ignored --nocapture figures`

use std::fs;
use std::time::{Duration, Instant};

use snapback::repository::{
    Access, Address, ForgetOptions, PackId, PruneOptions, PullOptions, PushOptions, Recipients,
    Repository, Retention, forget, list, prune, pull, push, put_synthetic,
};

use crate::harness::Memory;
use crate::support::{Result, resident_kib};

/// Packs of a snapshot of 4 GiB.
const PACKS: usize = 136;
const SNAPSHOTS: u64 = 1000;

fn repository(folder: &tempfile::TempDir) -> Result<Repository> {
    let address: Address = folder.path().join("repository").display().to_string().parse()?;
    Ok(Repository::init(&address, &Access::new(), &Recipients::nobody())?)
}

#[test]
#[ignore = "prints measurements"]
fn a_thousand_snapshots_are_listed_forgotten_and_pruned() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let repository = repository(&folder)?;
    let path = |key: &str| folder.path().join("repository").join(key);
    let mut next = 0u128;
    for number in 0..SNAPSHOTS {
        let packs: Vec<PackId> = (0..PACKS)
            .map(|_| {
                next += 1;
                // Spread as random ones are.
                PackId(next.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835).to_be_bytes())
            })
            .collect();
        for pack in &packs {
            let id = pack.to_string();
            fs::create_dir_all(path(&format!("packs/{}", &id[..2])))?;
            fs::File::create(path(&format!("packs/{}/{id}", &id[..2])))?;
        }
        let index = put_synthetic(&repository, (number + 1) * 3_600_000_000, &packs)?;
        // As long as the index of 4 GiB in extents of 64 KiB.
        fs::File::options().write(true).open(path(&index))?.set_len(2_900_000)?;
    }
    let told = |what: &str, start: Instant| {
        let resident = resident_kib(std::process::id()).unwrap_or(0) >> 10;
        println!("{what}: {:.2} s, {resident} MiB resident", start.elapsed().as_secs_f64());
    };
    let start = Instant::now();
    assert_eq!(list(&repository, None)?.len() as u64, SNAPSHOTS);
    told("list", start);
    let mut options = ForgetOptions::default();
    let mut retention = Retention::default();
    retention.daily = 20;
    options.retention = retention;
    let start = Instant::now();
    forget(&repository, &options)?;
    told("forget", start);
    let start = Instant::now();
    let marked = prune(&repository, &PruneOptions::default())?;
    told("prune, which marks", start);
    let mut options = PruneOptions::default();
    options.grace = Duration::ZERO;
    let start = Instant::now();
    let removed = prune(&repository, &options)?;
    told("prune, which removes", start);
    assert_eq!(marked.marked_packs, removed.removed_packs);
    println!("{removed:?}");
    Ok(())
}

#[test]
#[ignore = "prints measurements"]
fn a_gibibyte_is_pushed_and_pulled() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let repository = repository(&folder)?;
    let image = folder.path().join("vm.snap");
    Memory::new("web1", 1, 1024).save(&image, None)?;
    let bytes = fs::metadata(&image)?.len() as f64 / 1e6;
    let start = Instant::now();
    push(&repository, &PushOptions::new(&image), |_| {})?;
    println!("push: {:.0} MB/s", bytes / start.elapsed().as_secs_f64());
    let start = Instant::now();
    let manifest = repository.resolve(&"web1".parse()?)?;
    pull(&repository, manifest, &PullOptions::new(folder.path().join("back.snap")), |_| {})?;
    println!("pull: {:.0} MB/s", bytes / start.elapsed().as_secs_f64());
    Ok(())
}
