//! Memory that can't be read from the image while its guest runs: the guest waits rather than
//! get a wrong page, everything else goes on, and so does the guest once the image is whole.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::damage::{DATA, flip, region};
use crate::faulty_disk::{Disk, FaultyDisk};
use crate::harness::{Dir, Ended, Reverted, check, send_signal, text, wait_gone};
use crate::interrupts::UNFILLED;
use crate::shared::{Shared, borrow, copy, shared};
use crate::support::{Qemu, Result, SOON, cont, process_gone, stop, wait_until};
use crate::trouble::Tmpfs;
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests_on_both! {
    a_guest_waits_for_a_bad_page_until_it_is_repaired
    a_guest_waits_for_a_bad_page_until_the_image_is_replaced
}

tests_on_both_at_length! {
    a_bad_page_that_nobody_asks_for_stops_nobody
    a_truncated_image_is_put_back
    a_disk_that_stalls_is_waited_for
    a_disk_that_fails_to_read_recovers
    an_image_that_is_deleted_replaced_or_unmounted_is_read_on
}

tests! {
    a_server_is_killed_while_its_guest_waits_for_a_bad_page
    damage_ends_a_revert_that_is_told_so
    a_mapped_image_that_is_truncated_ends_its_guest
}

/// Flipped bytes of an image that damage main memory in several places: some of them are in what
/// the guest checks, others may be in the kernel's, which it may never ask for.
struct Damage {
    image: PathBuf,
    /// The bytes in the image.
    places: Vec<u64>,
    /// The first byte of main memory that each damages.
    offsets: Vec<u64>,
}

impl Damage {
    fn find(dir: &Dir, image: &Path) -> Result<Damage> {
        let data = region(image, DATA)?;
        let mut damage =
            Damage { image: image.to_owned(), places: Vec::new(), offsets: Vec::new() };
        for part in 10..20 {
            let place = data.start + (data.end - data.start) / 20 * part;
            flip(image, place)?;
            let verified = dir.snapback(&["verify", text(image)]).end()?;
            flip(image, place)?;
            let range = verified.event("damaged").ok().map(|damaged| damaged["ranges"][0].clone());
            if let Some(range) = range.filter(|range| range["block"] == "pc.ram") {
                damage.places.push(place);
                damage.offsets.push(range["offset"].as_u64().ok_or("no offset")?);
            }
        }
        assert!(!damage.places.is_empty(), "no place damages main memory");
        Ok(damage)
    }

    /// Damages the image, or repairs it.
    fn flip(&self) -> Result<()> {
        self.places.iter().try_for_each(|place| flip(&self.image, *place))
    }

    /// Checks what was told of it.
    fn is_named_by(&self, event: &Value) {
        let at = event["offset"].as_u64().unwrap();
        let is_here = |offset: &u64| (*offset..*offset + (64 << 10)).contains(&at);
        assert!(self.offsets.iter().any(is_here), "{:#x?}: {event}", self.offsets);
        // A small PC's main memory begins at address 0.
        assert_eq!((&event["block"], &event["guest_physical"]), (&"pc.ram".into(), &at.into()));
        let why = event["why"].as_str().unwrap();
        let offset = format!("{at:#x}");
        for part in [text(&self.image), "chunk", "block `pc.ram`", &offset, "physical address"] {
            assert!(why.contains(part), "{part}: {why}");
        }
    }
}

/// Reverts an image of the shared guest, and fills nothing.
fn unfilled(dir: &Dir, image: &Path, from: &Path, args: &[&str]) -> Result<Reverted> {
    let to = dir.make("reverted")?;
    Reverted::of(dir.revert(image, from, &to).with(&UNFILLED).with(args), &to)
}

/// Has the guest read all its memory, which it can't, and waits until that is told.
fn wait_stopped(guest: &mut Reverted) -> Result<Value> {
    // A question that comes before the guest listens is lost. It may be stopped before its first
    // beat, and the answer does not come before the image is whole.
    let _ = guest.log.wait_beat(0, Duration::from_secs(10));
    let _ = guest.oracle.ask_within("check", Duration::from_millis(10));
    guest.server.as_mut().ok_or("no server")?.wait("stopped")
}

/// Waits until the guest goes on, checks it, and has the server finish.
fn goes_on(mut guest: Reverted, shared: &Shared) -> Result<()> {
    guest.server.as_mut().ok_or("no server")?.wait("repaired")?;
    guest.check(&shared.nonce)?;
    guest.server.as_mut().ok_or("no server")?.signal(libc::SIGINT);
    guest.resident()?;
    guest.check(&shared.nonce)
}

fn wait_for_a_repair(
    dir: &Dir,
    qemu: Qemu,
    repair: impl FnOnce(&Damage, &Shared) -> Result<()>,
) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(qemu, &image)?;
    let damage = Damage::find(dir, &image)?;
    damage.flip()?;
    let mut guest = unfilled(dir, &image, &shared.from, &[])?;
    let stopped = wait_stopped(&mut guest)?;
    assert_eq!(stopped["reason"], "unreadable");
    damage.is_named_by(&stopped);
    repair(&damage, shared)?;
    goes_on(guest, shared)
}

fn a_guest_waits_for_a_bad_page_until_it_is_repaired(dir: &Dir, qemu: Qemu) -> Result<()> {
    wait_for_a_repair(dir, qemu, |damage, _| damage.flip())
}

fn a_guest_waits_for_a_bad_page_until_the_image_is_replaced(dir: &Dir, qemu: Qemu) -> Result<()> {
    wait_for_a_repair(dir, qemu, |damage, shared| {
        let whole = dir.path("whole");
        fs::copy(&shared.image, &whole)?;
        Ok(fs::rename(whole, &damage.image)?)
    })
}

/// An image of the shared guest, paused: it asks for nothing by itself.
fn paused(dir: &Dir, qemu: Qemu) -> Result<(PathBuf, PathBuf, String)> {
    let mut original = borrow(qemu)?;
    stop(&original.qmp_path)?;
    let saved = dir.save(&original, "vm.snap").succeed();
    cont(&original.qmp_path)?;
    check(&mut original)?;
    saved?;
    Ok((dir.path("vm.snap"), original.dir.clone(), original.oracle.nonce()?))
}

/// That a revert has ended for damage, and its QEMU with it.
fn has_ended(ended: &Ended, image: &Path, pid: u32) -> Result<()> {
    let told = ended.failure()?;
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert!(told.contains(text(image)) && told.contains("physical address"), "{told}");
    wait_gone(pid)
}

fn a_bad_page_that_nobody_asks_for_stops_nobody(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (image, from, nonce) = paused(dir, qemu)?;
    let damage = Damage::find(dir, &image)?;
    damage.flip()?;
    let revert = |name: &str| -> Result<Reverted> {
        let to = dir.make(name)?;
        let revert = dir.revert(&image, &from, &to).with(&["--no-working-set"]);
        let mut guest = Reverted::of(revert, &to)?;
        damage.is_named_by(&guest.server.as_mut().unwrap().wait("degraded")?);
        Ok(guest)
    };
    // Interrupted, it ends once it has brought the rest.
    let mut guest = revert("interrupted")?;
    let server = guest.server.take().ok_or("no server")?;
    server.signal(libc::SIGINT);
    let ended = server.end()?;
    assert!(ended.event("stopped").is_err(), "{ended:?}");
    has_ended(&ended, &image, guest.pid)?;
    drop(guest);

    // The guest runs on, and stops only when it asks for that page.
    let mut guest = revert("waiting")?;
    cont(&guest.qmp_path)?;
    wait_stopped(&mut guest)?;
    damage.flip()?;
    guest.server.as_mut().unwrap().wait("repaired")?;
    guest.check(&nonce)?;
    guest.resident()?;
    Ok(())
}

fn a_truncated_image_is_put_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(qemu, &image)?;
    let mut guest = unfilled(dir, &image, &shared.from, &[])?;
    OpenOptions::new().write(true).open(&image)?.set_len(4096)?;
    let stopped = wait_stopped(&mut guest)?;
    assert!(stopped["why"].as_str().is_some_and(|why| why.contains(text(&image))), "{stopped}");
    fs::copy(&shared.image, &image)?;
    goes_on(guest, shared)
}

/// The shared guest reverted from an image on a disk that may fail.
fn on_a_faulty_disk(dir: &Dir, qemu: Qemu) -> Result<(FaultyDisk, Reverted, &'static Shared)> {
    let disk = FaultyDisk::mount(dir.make("disk")?, dir.make("backing")?)?;
    let shared = copy(qemu, &dir.path("backing/vm.snap"))?;
    let guest = unfilled(dir, &disk.path("vm.snap"), &shared.from, &[])?;
    Ok((disk, guest, shared))
}

fn a_disk_that_fails_to_read_recovers(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (disk, mut guest, shared) = on_a_faulty_disk(dir, qemu)?;
    disk.set(Disk::FailsReads);
    let stopped = wait_stopped(&mut guest)?;
    let why = stopped["why"].as_str().ok_or("no reason")?;
    assert!(why.contains("os error 5") && why.contains("vm.snap"), "{why}");
    disk.set(Disk::Works);
    goes_on(guest, shared)
}

fn a_disk_that_stalls_is_waited_for(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (disk, mut guest, shared) = on_a_faulty_disk(dir, qemu)?;
    disk.set(Disk::Stalls);
    let _ = guest.oracle.ask_within("check", Duration::from_millis(10));
    disk.set(Disk::Works);
    guest.check(&shared.nonce)?;

    // The second interrupt ends the guest, whatever the disk does. A process that waits for FUSE
    // can't end before its server answers.
    disk.set(Disk::Stalls);
    let mut server = guest.server.take().ok_or("no server")?;
    server.signal(libc::SIGINT);
    server.wait("still_needed")?;
    server.signal(libc::SIGINT);
    server.wait("error")?;
    wait_gone(guest.pid)?;
    disk.set(Disk::Works);
    let ended = server.end()?;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    Ok(())
}

fn an_image_that_is_deleted_replaced_or_unmounted_is_read_on(dir: &Dir, qemu: Qemu) -> Result<()> {
    let tmpfs = Tmpfs::mount(dir.make("mounted")?, "512m")?;
    let unmounted = dir.path("mounted/vm.snap");
    let goes_on = |name: &str, image: &Path, lose: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let shared = copy(qemu, image)?;
        let to = dir.make(name)?;
        let revert = dir.revert(image, &shared.from, &to).with(&UNFILLED);
        let mut guest = Reverted::of(revert, &to)?;
        lose()?;
        guest.check(&shared.nonce)?;
        guest.server.as_mut().ok_or("no server")?.signal(libc::SIGINT);
        guest.resident()?;
        guest.check(&shared.nonce)
    };
    let image = dir.path("vm.snap");
    goes_on("deleted", &image, &mut || Ok(fs::remove_file(&image)?))?;
    goes_on("replaced", &image, &mut || {
        fs::write(dir.path("other"), [0x5a; 10_000])?;
        Ok(fs::rename(dir.path("other"), &image)?)
    })?;
    let mut tmpfs = Some(tmpfs);
    goes_on("unmounted", &unmounted, &mut || {
        drop(tmpfs.take());
        Ok(())
    })
}

fn a_server_is_killed_while_its_guest_waits_for_a_bad_page(dir: &Dir) -> Result<()> {
    for place in ["uffd", "socket"] {
        let image = dir.path(&format!("{place}.snap"));
        let shared = copy(Qemu::V7, &image)?;
        let damage = Damage::find(dir, &image)?;
        damage.flip()?;
        let to = dir.make(place)?;
        let args = [&UNFILLED[..], &["--place", place]].concat();
        let mut guest = Reverted::of(dir.revert(&image, &shared.from, &to).with(&args), &to)?;
        wait_stopped(&mut guest)?;
        let server = guest.server.as_mut().ok_or("no server")?;
        server.signal(libc::SIGKILL);
        server.wait("taken_over")?;
        server.wait("stopped")?;
        damage.flip()?;
        server.wait("repaired")?;
        guest.check(&shared.nonce)?;
        let words = "snapback resume --inherited";
        let successor = dir.processes().into_iter().find(|(_, line)| line.contains(words));
        send_signal(successor.ok_or("no successor")?.0, libc::SIGTERM);
        let ended = guest.server.take().ok_or("no server")?.end()?;
        ended.event("resident")?;
        guest.check(&shared.nonce)?;
    }
    Ok(())
}

fn damage_ends_a_revert_that_is_told_so(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let shared = copy(Qemu::V10, &image)?;
    Damage::find(dir, &image)?.flip()?;
    let to = dir.make("reverted")?;
    let told = dir.revert(&image, &shared.from, &to).with(&["--fail-on-damage"]).fail()?;
    assert!(told.contains("chunk") && told.contains(text(&image)), "{told}");
    assert!(dir.processes().is_empty());
    Ok(())
}

fn a_mapped_image_that_is_truncated_ends_its_guest(dir: &Dir) -> Result<()> {
    let (shared, image) = (shared(Qemu::V10)?, dir.path("flat.snap"));
    let flatten = dir.snapback(&["flatten", text(&shared.image), text(&image)]);
    flatten.with(&["--layout", "flat"]).succeed()?;
    let to = dir.make("reverted")?;
    let mut guest = Reverted::of(dir.revert(&image, &shared.from, &to), &to)?;
    guest.resident()?;
    OpenOptions::new().write(true).open(&image)?.set_len(4096)?;
    // A bus error: it can't be told by anybody, since nobody serves this guest.
    let _ = guest.oracle.ask_within("check", Duration::from_millis(10));
    let pid = guest.pid;
    wait_until(SOON, "QEMU to end", || process_gone(pid))
}
