//! Users and hosts without the right to userfaultfd: what still works, and what is said.

use std::fs;
use std::os::unix::fs::lchown;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::bare::Bare;
use crate::damage::{DATA, flip, region};
use crate::harness::{Dir, Reverted, Snapback, text};
use crate::serving::Waiting;
use crate::shared::{Shared, shared};
use crate::support::{Attached, Qemu, Result};
use crate::{tests, tests_on_both};

tests_on_both! {
    memory_comes_first_where_postcopy_is_forbidden
    a_save_is_refused_with_the_setting_that_allows_it
    a_qemu_without_postcopy_is_served_eagerly
}

tests! {
    a_flat_image_is_mapped_without_any_right
    postcopy_that_was_asked_for_is_refused_in_words
    a_filter_is_told_from_a_setting
    an_eager_revert_can_be_interrupted
    damaged_memory_ends_an_eager_revert
    the_doctor_answers_for_its_user
}

/// The user `nobody` of every distribution, and its group.
pub const NOBODY: u32 = 65534;

/// Whether ordinary users have no right to userfaultfd here, and we can become one.
fn can_be_unprivileged() -> Result<bool> {
    let switch = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")?;
    Ok(geteuid().is_root() && switch.trim() == "0")
}

/// Gives a test's folder and everything in it to `nobody`.
fn give_away(path: &Path) -> Result<()> {
    lchown(path, Some(NOBODY), Some(NOBODY))?;
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            give_away(&entry?.path())?;
        }
    }
    Ok(())
}

/// `revert` by `nobody` of a copy of the shared image that is theirs.
fn revert_by_nobody(dir: &Dir, image: &Path, shared: &Shared) -> Result<(Snapback, PathBuf)> {
    let to = dir.make("reverted")?;
    give_away(&dir.path("."))?;
    Ok((dir.revert(image, &shared.from, &to).with(&["--place", "auto"]).by_user(NOBODY), to))
}

/// A copy of the shared image in the test's folder.
fn copied(dir: &Dir, qemu: Qemu) -> Result<(&'static Shared, PathBuf)> {
    let image = dir.path("vm.snap");
    Ok((crate::shared::copy(qemu, &image)?, image))
}

fn memory_comes_first_where_postcopy_is_forbidden(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !can_be_unprivileged()? {
        return Ok(());
    }
    let (shared, image) = copied(dir, qemu)?;
    let (revert, to) = revert_by_nobody(dir, &image, shared)?;
    let mut reverted = Reverted::of(revert, &to)?;
    let ended = reverted.resident()?;
    assert_eq!(ended.steps(), ["qemu_ready", "running", "resident"]);
    let placing = ended.event("placing")?;
    assert_eq!(placing["way"], "eager");
    let reason = placing["reason"].as_str().ok_or("no reason")?;
    assert!(reason.contains("Postcopy is not supported"), "{reason}");
    assert!(reason.contains("`sysctl vm.unprivileged_userfaultfd=1`"), "{reason}");
    // Only the later QEMU uses the device.
    let by_acl = reason.contains("`setfacl -m u:nobody:rw /dev/userfaultfd`");
    let device = Path::new("/dev/userfaultfd").exists();
    assert_eq!(by_acl, qemu == Qemu::V10 && device, "{reason}");
    // Before the guest runs, it is told how its memory comes in.
    let before = ended.events.iter().take_while(|event| event["event"] != "running");
    assert!(before.filter(|event| event["event"] == "progress").count() > 0, "{:?}", ended.said);
    reverted.check(&shared.nonce)?;
    // Nothing was served, so that there is nothing to learn from.
    assert!(!dir.names(".")?.iter().any(|name| name.ends_with(".ws")), "{:?}", dir.names("."));
    Ok(())
}

fn a_flat_image_is_mapped_without_any_right(dir: &Dir) -> Result<()> {
    if !can_be_unprivileged()? {
        return Ok(());
    }
    let (shared, image) = (shared(Qemu::V10)?, dir.path("flat.snap"));
    let flatten = dir.snapback(&["flatten", text(&shared.image), text(&image)]);
    flatten.with(&["--layout", "flat"]).succeed()?;
    let (revert, to) = revert_by_nobody(dir, &image, shared)?;
    let mut reverted = Reverted::of(revert, &to)?;
    assert_eq!(reverted.resident()?.event("placing")?["way"], "map");
    reverted.check(&shared.nonce)
}

fn postcopy_that_was_asked_for_is_refused_in_words(dir: &Dir) -> Result<()> {
    if !can_be_unprivileged()? {
        return Ok(());
    }
    let (shared, image) = copied(dir, Qemu::V7)?;
    let (_, to) = revert_by_nobody(dir, &image, shared)?;
    for place in ["uffd", "socket"] {
        let revert = dir.revert(&image, &shared.from, &to).by_user(NOBODY);
        let refusal = revert.with(&["--place", place]).fail()?;
        for words in ["vm.unprivileged_userfaultfd=1", "--place eager", "Postcopy"] {
            assert!(refusal.contains(words), "{refusal}");
        }
    }
    let harvest = dir.snapback(&["working-set", text(&image), "--harvest"]).by_user(NOBODY);
    let refusal = harvest.fail()?;
    assert!(refusal.contains("vm.unprivileged_userfaultfd=1"), "{refusal}");
    Ok(())
}

/// A container's filter may forbid the call to root as well; only QEMU before 8.0 depends on it
/// where `/dev/userfaultfd` is open.
fn a_filter_is_told_from_a_setting(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--place", "auto"]);
    let mut reverted = Reverted::of(revert.without_userfaultfd(), &to)?;
    let ended = reverted.resident()?;
    let placing = ended.event("placing")?;
    assert_eq!(placing["way"], "eager");
    let reason = placing["reason"].as_str().ok_or("no reason")?;
    assert!(reason.contains("seccomp"), "{reason}");
    reverted.check(&shared.nonce)
}

fn an_eager_revert_can_be_interrupted(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--place", "eager"]);
    let mut revert = revert.start()?;
    revert.wait("placing")?;
    revert.signal(libc::SIGINT);
    let ended = revert.end()?;
    // On a machine that is fast enough the guest runs already, and is given the rest.
    if ended.code != Some(0) {
        assert!(ended.failure()?.contains("interrupted"), "{ended:?}");
    }
    Ok(())
}

fn damaged_memory_ends_an_eager_revert(dir: &Dir) -> Result<()> {
    let (shared, image) = copied(dir, Qemu::V7)?;
    flip(&image, region(&image, DATA)?.start + 100)?;
    let to = dir.make("reverted")?;
    let revert = dir.revert(&image, &shared.from, &to).with(&["--place", "eager"]);
    let refusal = revert.fail()?;
    let says = refusal.contains("of block `") && refusal.contains("at offset 0x");
    assert!(says && refusal.contains(text(&image)), "{refusal}");
    Ok(())
}

/// A QEMU whose capability `postcopy-ram` is off takes nothing else.
fn a_qemu_without_postcopy_is_served_eagerly(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let waiting = Waiting::start(dir, shared, false, &[])?;
    let to = format!("unix:{}", text(&waiting.socket));
    let serve = dir.snapback(&["serve", text(&shared.image), "--to", &to, "--place", "eager"]);
    let ended = serve.succeed()?;
    assert_eq!(ended.steps(), ["running", "resident"]);
    assert_eq!(ended.event("placing")?["way"], "eager");
    let mut guest = Attached::to(waiting.qemu.id(), &waiting.folder)?;
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    crate::harness::check(&mut guest)
}

fn a_save_is_refused_with_the_setting_that_allows_it(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !can_be_unprivileged()? {
        return Ok(());
    }
    give_away(&dir.path("."))?;
    let original = Bare::start_by(dir, qemu, NOBODY)?;
    let args = ["save", "--qmp", text(&original.socket), "vm.snap"];
    let refusal = dir.snapback(&args).by_user(NOBODY).fail()?;
    assert!(refusal.contains("`sysctl vm.unprivileged_userfaultfd=1`"), "{refusal}");
    let by_acl = refusal.contains("`setfacl -m u:nobody:rw /dev/userfaultfd`");
    let device = Path::new("/dev/userfaultfd").exists();
    assert_eq!(by_acl, qemu == Qemu::V10 && device, "{refusal}");
    assert!(!dir.names(".")?.contains(&"vm.snap".to_owned()));
    Ok(())
}

fn the_doctor_answers_for_its_user(dir: &Dir) -> Result<()> {
    let examined = dir.snapback(&["doctor"]).end()?;
    let qemu = examined.events.iter().find(|event| event["qemu"]["version"] == "7.2.22");
    if Qemu::V7.binary().starts_with("/usr/bin") && geteuid().is_root() {
        let qemu = &qemu.ok_or_else(|| format!("{:?}", examined.said))?["qemu"];
        assert_eq!((&qemu["postcopy"], &qemu["background_snapshot"]), (&true.into(), &true.into()));
        let verdict = examined.event("diagnosis")?;
        assert_eq!((examined.code, &verdict["revert"]), (Some(0), &"instant".into()));
    }
    // At most 80 columns, for people.
    let plain = dir.snapback(&["doctor"]).plain().end()?;
    let wide = plain.said.iter().find(|line| line.chars().count() > 80 && !line.contains('`'));
    assert!(plain.said.len() > 8 && wide.is_none(), "{wide:?}");
    if !can_be_unprivileged()? {
        return Ok(());
    }
    give_away(&dir.path("."))?;
    let examined = dir.snapback(&["doctor"]).by_user(NOBODY).end()?;
    let item = |name: &str| examined.events.iter().find(|event| event["item"] == name);
    let call = item("userfaultfd").ok_or("no such item")?;
    assert_eq!(call["state"], "missing");
    assert_eq!(call["remedy"], "sysctl vm.unprivileged_userfaultfd=1");
    let verdict = examined.event("diagnosis")?;
    assert_eq!((&verdict["save"], &verdict["revert"]), (&false.into(), &"eager".into()));
    let message = examined.failure()?;
    assert!(message.contains("no guest can be saved"), "{message}");
    Ok(())
}
