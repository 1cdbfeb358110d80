//! Guests that are brought back from an image while it is written.

use std::path::Path;

use crate::harness::{Dir, Reverted, STOP_AT, check, text};
use crate::killed::{ask_disks, boot};
use crate::support::{Fill, Guest, GuestOptions, Qemu, Result};
use crate::{tests, tests_on_both};

tests_on_both! {
    a_guest_is_whole_before_its_image_is
}

tests! {
    several_follow_with_their_disks_and_the_image_is_as_good
    one_that_loses_the_save_is_ended
    what_is_not_saved_so_is_told
}

/// A guest that rewrites its memory all the time, of which the most is never zero.
fn busy(qemu: Qemu) -> GuestOptions {
    GuestOptions { qemu, fill: Fill::Mib(96), rate: 2000, writers: 2, ..GuestOptions::default() }
}

/// Follows the save of an image until the guest runs, its files in a new folder `name`.
fn follow(dir: &Dir, image: &Path, from: &Path, name: &str) -> Result<Reverted> {
    let follow = dir.revert(image, from, &dir.make(name)?).with(&["--follow"]);
    Reverted::of(follow, &dir.path(name))
}

fn a_guest_is_whole_before_its_image_is(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut guest = Guest::boot(&busy(qemu))?;
    let nonce = guest.oracle.nonce()?;
    let image = dir.path("vm.snap");
    // It takes minutes, for which nobody waits.
    let slowly = ["--followable", "--bandwidth", "256K", "--compress", "none"];
    let mut save = dir.save(&guest, "vm.snap").with(&slowly).start()?;
    save.wait("moment")?;
    let mut followed = follow(dir, &image, &guest.dir, "followed")?;
    followed.check(&nonce)?;
    followed.resident()?;
    assert!(!image.exists());
    // Who follows needs nobody now.
    save.signal(libc::SIGINT);
    assert_eq!(save.end()?.code, Some(130));
    followed.check(&nonce)?;
    check(&mut guest)
}

fn several_follow_with_their_disks_and_the_image_is_as_good(dir: &Dir) -> Result<()> {
    let mut guest = boot(dir, Qemu::V10)?;
    ask_disks(&mut guest, "write")?;
    let nonce = guest.oracle.nonce()?;
    let image = dir.path("vm.snap");
    let slowly = ["--followable", "--bandwidth", "4M"];
    let mut save = dir.save(&guest, "vm.snap").with(&slowly).start()?;
    save.wait("moment")?;
    let mut all =
        vec![follow(dir, &image, &guest.dir, "one")?, follow(dir, &image, &guest.dir, "two")?];
    save.succeed()?;
    // The save is over, and what it has captured is there still.
    all.push(dir.reverted(&image, &guest.dir, "whole")?);
    for followed in &mut all {
        ask_disks(followed, "check")?;
        ask_disks(followed, "write")?;
        followed.check(&nonce)?;
        followed.resident()?;
    }
    ask_disks(&mut guest, "check")?;
    check(&mut guest)
}

fn one_that_loses_the_save_is_ended(dir: &Dir) -> Result<()> {
    // Large enough that it is mostly not captured when somebody follows.
    let options = GuestOptions { mib: 1024, fill: Fill::Mib(600), ..busy(Qemu::V10) };
    let mut guest = Guest::boot(&options)?;
    let nonce = guest.oracle.nonce()?;
    let save = dir.save(&guest, "vm.snap").with(&["--followable"]).env(STOP_AT, "followed");
    let mut save = save.start()?;
    save.wait("moment")?;
    let to = dir.make("followed")?;
    let follow = dir.revert(&dir.path("vm.snap"), &guest.dir, &to).with(&["--follow"]).start()?;
    save.wait_stopped()?;
    save.signal(libc::SIGKILL);
    let ended = follow.end()?;
    match ended.event("running") {
        // All was captured already.
        Ok(running) if ended.code == Some(0) => {
            let pid = running["pid"].as_u64().ok_or("no process")? as u32;
            Reverted::alone(pid, &to)?.check(&nonce)?;
        }
        _ => assert!(ended.code == Some(1) && ended.stderr.contains("is lost"), "{ended:?}"),
    }
    // The save's keeper has cleaned up behind it.
    save.end()?;
    check(&mut guest)
}

fn what_is_not_saved_so_is_told(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    let follow = dir.snapback(&["revert", text(&image), "--follow"]);
    let ended = follow.end()?;
    assert_eq!(
        (ended.code, ended.event("error")?["code"].as_str()),
        (Some(3), Some("not_followed"))
    );
    let guest = boot(dir, Qemu::V10)?;
    let copied = dir.save(&guest, "vm.snap").with(&["--followable", "--disks", "copy"]);
    let ended = copied.end()?;
    let code = ended.event("error")?["code"].as_str();
    assert_eq!((ended.code, code), (Some(3), Some("options_invalid")));
    Ok(())
}
