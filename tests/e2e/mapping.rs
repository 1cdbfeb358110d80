//! Flat images, and guests whose memory is a mapping of one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::harness::{Dir, text};
use crate::shared::{MIB, Shared, options, shared};
use crate::support::{Disk, Guest, GuestOptions, Qemu, Result};
use crate::tests;

tests! {
    clones_of_a_flat_image_share_their_memory
    a_mapped_guest_runs_on_disks_of_its_own_or_not_at_all
    a_flat_image_is_served_where_it_can_not_be_mapped
    damage_to_a_flat_image_is_found_when_asked_for
}

/// A flat image of the shared guest.
fn flat(dir: &Dir, qemu: Qemu) -> Result<(&'static Shared, PathBuf)> {
    let (shared, image) = (shared(qemu)?, dir.path("flat.snap"));
    let flatten = dir.snapback(&["flatten", text(&shared.image), text(&image)]);
    flatten.with(&["--layout", "flat"]).succeed()?;
    Ok((shared, image))
}

/// A sum over all of a process's memory in KiB (proc_pid_smaps(5)).
fn kib(pid: u32, name: &str) -> Result<u64> {
    let sums = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = sums.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    let value = line.and_then(|line| line.trim().strip_suffix("kB"));
    Ok(value.ok_or("no such sum")?.trim().parse()?)
}

fn clones_of_a_flat_image_share_their_memory(dir: &Dir) -> Result<()> {
    let (shared, image) = flat(dir, Qemu::V10)?;
    dir.snapback(&["verify", text(&image)]).succeed()?;
    let info = |image: &Path| dir.snapback(&["info", text(image)]);
    assert_eq!(info(&image).succeed()?.events[0]["layout"], "flat");
    assert_eq!(info(&shared.image).succeed()?.events[0]["layout"], "packed");
    let said = info(&image).plain().succeed()?.said;
    assert!(said.iter().any(|line| line.contains("flat, to be mapped")), "{said:?}");
    let before = fs::read(&image)?;
    let mut clones = Vec::new();
    for name in ["a", "b", "c"] {
        let mut clone = dir.reverted(&image, &shared.from, name)?;
        let ended = clone.resident()?;
        assert_eq!(ended.event("placing")?["way"], "map");
        clone.check(&shared.nonce)?;
        clones.push(clone);
    }
    // Every guest has read all its memory: what none of them wrote is there once.
    let sum = |name| -> Result<u64> { clones.iter().map(|clone| kib(clone.pid, name)).sum() };
    let (pss, written) = (sum("Pss")?, sum("Private_Dirty")?);
    let bound = (MIB << 10) + written + clones.len() as u64 * (60 << 10);
    assert!(pss <= bound, "{pss} KiB, of which {written} were written");
    assert!(pss < clones.len() as u64 * (MIB << 10), "nothing is shared: {pss} KiB");
    for clone in &mut clones {
        clone.check(&shared.nonce)?;
    }
    drop(clones);
    assert!(fs::read(&image)? == before, "a guest wrote to the image");
    Ok(())
}

/// A guest with disks was held when its state was written down, and runs all the same; one
/// that may not have its disk is told of, rather than waited for.
fn a_mapped_guest_runs_on_disks_of_its_own_or_not_at_all(dir: &Dir) -> Result<()> {
    let disk = Disk::new("disk", &dir.path("disk"));
    disk.make(8)?;
    let mut guest = Guest::boot(&GuestOptions { disks: vec![disk], ..options(Qemu::V10) })?;
    let nonce = guest.oracle.nonce()?;
    let flat = |guest: &Guest, name: &str, disks: &str| -> Result<PathBuf> {
        let (saved, flat) = (format!("{name}.snap"), dir.path(&format!("{name}.flat")));
        dir.save(guest, &saved).with(&["--disks", disks]).succeed()?;
        let saved = dir.path(&saved);
        let flatten = dir.snapback(&["flatten", text(&saved), text(&flat)]);
        flatten.with(&["--layout", "flat"]).succeed()?;
        Ok(flat)
    };
    let without = flat(&guest, "without", "none")?;
    let to = dir.make("locked")?;
    let refusal = dir.revert(&without, &guest.dir, &to).with(&["--place", "map"]).fail()?;
    assert!(refusal.contains("lock"), "{refusal}");

    guest.oracle.ask("disk write /dev/vda 64 1")?;
    let with = flat(&guest, "with", "overlay")?;
    guest.oracle.ask("disk write /dev/vda 64 2")?;
    let mut reverted = dir.reverted(&with, &guest.dir, "reverted")?;
    assert_eq!(reverted.resident()?.event("placing")?["way"], "map");
    assert_eq!(reverted.oracle.ask("disk check /dev/vda 64 1")?, "ok");
    reverted.check(&nonce)
}

fn a_flat_image_is_served_where_it_can_not_be_mapped(dir: &Dir) -> Result<()> {
    let (shared, image) = flat(dir, Qemu::V7)?;
    let to = dir.make("refused")?;
    let refusal = dir.revert(&image, &shared.from, &to).with(&["--place", "map"]).fail()?;
    assert!(refusal.contains("8.1"), "{refusal}");
    let packed = dir.revert(&shared.image, &shared.from, &to).with(&["--place", "map"]).fail()?;
    assert!(packed.contains("--layout flat"), "{packed}");
    let mut reverted = dir.reverted(&image, &shared.from, "reverted")?;
    let ended = reverted.resident()?;
    assert_eq!(ended.event("placing")?["way"], "uffd");
    assert!(ended.event("note")?["why"].to_string().contains("8.1"));
    reverted.check(&shared.nonce)
}

fn damage_to_a_flat_image_is_found_when_asked_for(dir: &Dir) -> Result<()> {
    let (shared, image) = flat(dir, Qemu::V10)?;
    let check = |image: &Path, folder: &str| {
        let to = dir.make(folder)?;
        dir.revert(image, &shared.from, &to).with(&["--check"]).fail()
    };
    // Where the first page lies, and where zeros do: both are mapped.
    let bytes = fs::read(&image)?;
    let (start, page) = (2 << 20, |number: usize| (2 << 20) + number * 4096);
    let is_zero = |at: usize| bytes[at..at + 4096].iter().all(|byte| *byte == 0);
    let pages = 0..(MIB as usize) << 8;
    let data = page(pages.clone().find(|n| !is_zero(page(*n))).ok_or("no data")?);
    let hole = page(pages.clone().find(|n| is_zero(page(*n))).ok_or("no zeros")?);
    assert!(data >= start && hole >= start);
    for (at, folder) in [(data, "data"), (hole, "hole")] {
        let file = File::options().write(true).open(&image)?;
        file.write_all_at(&[bytes[at] ^ 1], at as u64)?;
        let refusal = check(&image, folder)?;
        assert!(refusal.contains("damaged"), "{refusal}");
        let said = dir.snapback(&["verify", text(&image)]).end()?;
        assert_eq!(said.code, Some(4), "{said:?}");
        file.write_all_at(&[bytes[at]], at as u64)?;
    }
    // One is told beside the other.
    let file = File::options().write(true).open(&image)?;
    for at in [data, hole] {
        file.write_all_at(&[bytes[at] ^ 1], at as u64)?;
    }
    let said = dir.snapback(&["verify", text(&image)]).end()?;
    let damages = said.events.iter().filter(|event| event["event"] == "damaged");
    let damages = damages.map(|event| event["what"].to_string()).collect::<Vec<_>>();
    assert_eq!(damages.len(), 2, "{said:?}");
    assert!(damages[0].contains("chunk") && damages[1].contains("zeros are due"), "{damages:?}");
    assert!(said.failure()?.contains("in 2 place(s)"), "{said:?}");
    for at in [data, hole] {
        file.write_all_at(&[bytes[at]], at as u64)?;
    }
    dir.snapback(&["verify", text(&image)]).succeed()?;
    Ok(())
}
