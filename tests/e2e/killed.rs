//! A save that is killed, at each of its steps: recovering leaves the guest as it was
//! before, or with the image.

use std::fs;

use serde_json::{Value, json};

use crate::bare::query;
use crate::harness::{Dir, Running, STEPS, STOP_AT, Snapback, check, steps_of};
use crate::support::{Contact, Disk, Fill, Guest, GuestOptions, Qemu, Result, query_status};
use crate::{tests_on_both, tests_on_both_at_length};

tests_on_both! {
    an_image_that_cant_be_read_is_not_given_up
}

tests_on_both_at_length! {
    a_killed_save_is_cleaned_up_by_its_keeper
    a_save_is_killed_at_every_step
}

/// The same without disks, where that differs.
const STEPS_WITHOUT_DISKS: [&str; 5] = ["settings", "migrating", "moment", "restored", "named"];

/// What undoing does, of which each may be killed again.
const STEPS_OF_UNDOING: [&str; 2] = ["committing", "committed"];

/// Waits until a command stands still at the step that it was told, and kills it there.
pub fn kill_at_its_step(command: Running) -> Result<()> {
    command.wait_stopped()?;
    command.signal(libc::SIGKILL);
    drop(command);
    Ok(())
}

/// A small guest with two disks, memory that changes, and a control socket.
pub fn boot(dir: &Dir, qemu: Qemu) -> Result<Guest> {
    let disks = Disk::two(&dir.path(""), 8)?;
    let options = GuestOptions {
        qemu,
        mib: 128,
        fill: Fill::Mib(16),
        rate: 500,
        disks,
        ..Default::default()
    };
    Guest::boot(&options)
}

/// What a save changes, and what undoing it has to put back.
#[derive(Debug, PartialEq)]
pub struct State {
    status: String,
    capabilities: Value,
    parameters: Value,
    /// Every node of the block graph by its name, with its file.
    nodes: Vec<(String, String)>,
    /// What each device has open.
    disks: Vec<(Value, Value)>,
    jobs: Value,
    files: Vec<String>,
}

impl State {
    pub fn of(guest: &Guest, dir: &Dir) -> Result<State> {
        let ask = |command: &str| query(&guest.qmp_path, command);
        let list = |command: &str| {
            let list = ask(command)?.as_array().cloned();
            list.ok_or_else(|| crate::support::Error::from(format!("{command} gives no list")))
        };
        let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut nodes: Vec<_> = list("query-named-block-nodes")?
            .iter()
            .map(|node| (name(&node["node-name"]), name(&node["file"])))
            .collect();
        nodes.sort();
        let disk = |device: &Value| {
            let inserted = &device["inserted"];
            (inserted["node-name"].clone(), inserted["file"].clone())
        };
        Ok(State {
            status: query_status(&guest.qmp_path)?,
            capabilities: ask("query-migrate-capabilities")?,
            parameters: ask("query-migrate-parameters")?,
            nodes,
            disks: list("query-block")?.iter().map(disk).collect(),
            jobs: ask("query-jobs")?,
            files: dir.names(".")?,
        })
    }
}

/// A save behind which nobody cleans up.
fn save(dir: &Dir, guest: &Guest) -> Snapback {
    dir.save(guest, "vm.snap").with(&["--no-keeper"])
}

/// Recovers; the outcome.
pub fn recover(dir: &Dir, guest: &Guest) -> Result<String> {
    let ended = dir.save(guest, "vm.snap").with(&["--recover"]).succeed()?;
    Ok(ended.event("recovered")?["outcome"].as_str().unwrap_or_default().to_owned())
}

/// Devices on which the guest reads back what was written before.
const DEVICES: [&str; 2] = ["vda", "vdb"];

pub fn ask_disks(guest: &mut Contact, question: &str) -> Result<()> {
    for device in DEVICES {
        let answer = guest.oracle.ask(&format!("disk {question} /dev/{device} 64 7"))?;
        assert_eq!(answer, "ok", "{question} {device}");
    }
    Ok(())
}

/// The guest is as before, and so are its disks.
pub fn is_as_before(dir: &Dir, guest: &mut Guest, before: &State, step: &str) -> Result<()> {
    assert_eq!(&State::of(guest, dir)?, before, "killed at `{step}`");
    check(guest).map_err(|e| format!("killed at `{step}`: {e}"))?;
    ask_disks(guest, "check")
}

fn a_save_is_killed_at_every_step(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let guest = &mut boot(dir, qemu)?;
    ask_disks(guest, "write")?;
    // Something to be put back.
    let size = json!({ "max-bandwidth": 123 << 20 });
    crate::support::qmp(&guest.qmp_path, "migrate-set-parameters", size)?;
    assert_eq!(recover(dir, guest)?, "nothing");

    let with_disks = STEPS.map(|step| (step, "overlay"));
    let without = STEPS_WITHOUT_DISKS.map(|step| (step, "none"));
    for (step, disks) in steps_of(qemu, with_disks.into_iter().chain(without)) {
        let before = State::of(guest, dir)?;
        let save = |guest: &Guest| save(dir, guest).with(&["--disks", disks]);
        kill_at_its_step(save(guest).env(STOP_AT, step).start()?)
            .map_err(|e| format!("at `{step}`: {e}"))?;
        let outcome = recover(dir, guest).map_err(|e| format!("killed at `{step}`: {e}"))?;
        if step == "named" {
            assert_eq!(outcome, "saved");
            check(guest)?;
        } else {
            assert_eq!(outcome, "undone");
            is_as_before(dir, guest, &before, step)?;
            save(guest).succeed().map_err(|e| format!("behind `{step}`: {e}"))?;
        }
        fs::remove_file(dir.path("vm.snap"))?;
    }

    // A save that undoes itself is killed, and then recovering as well.
    for step in STEPS_OF_UNDOING {
        let before = State::of(guest, dir)?;
        let save = |guest: &Guest| save(dir, guest);
        let undoing = save(guest).env(STOP_AT, &format!("moment,{step}")).start()?;
        undoing.wait_stopped()?;
        undoing.signal(libc::SIGINT);
        undoing.signal(libc::SIGCONT);
        kill_at_its_step(undoing)?;
        assert_eq!(recover(dir, guest)?, "undone");
        is_as_before(dir, guest, &before, step)?;

        kill_at_its_step(save(guest).env(STOP_AT, "moment").start()?)?;
        let recovering = dir.save(guest, "vm.snap").with(&["--recover"]);
        kill_at_its_step(recovering.env(STOP_AT, step).start()?)?;
        assert_eq!(recover(dir, guest)?, "undone");
        is_as_before(dir, guest, &before, step)?;
    }

    // An image that was to be replaced is not taken for the new one.
    let save = || save(dir, guest).with(&["--disks", "none", "--force"]);
    save().succeed()?;
    let (before, image) = (State::of(guest, dir)?, fs::read(dir.path("vm.snap"))?);
    kill_at_its_step(save().env(STOP_AT, "restored").start()?)?;
    assert_eq!(recover(dir, guest)?, "undone");
    is_as_before(dir, guest, &before, "restored")?;
    assert!(fs::read(dir.path("vm.snap"))? == image);
    Ok(())
}

/// The steps between which QEMU's stream flows, and some before and behind.
const STEPS_OF_KEEPING: [&str; 10] = [
    "settings",
    "ready",
    "stopped",
    "switched",
    "migrating",
    "first page",
    "released",
    "moment",
    "received",
    "named",
];

fn a_killed_save_is_cleaned_up_by_its_keeper(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let guest = &mut boot(dir, qemu)?;
    ask_disks(guest, "write")?;
    let with_disks = STEPS_OF_KEEPING.map(|step| (step, "overlay"));
    let without = ["migrating", "moment"].map(|step| (step, "none"));
    for (step, disks) in steps_of(qemu, with_disks.into_iter().chain(without)) {
        let before = State::of(guest, dir)?;
        let save = |guest: &Guest| dir.save(guest, "vm.snap").with(&["--disks", disks]);
        let saving = save(guest).env(STOP_AT, step).start()?;
        saving.wait_stopped()?;
        saving.signal(libc::SIGKILL);
        // Its keeper speaks for it.
        let ended = saving.end()?;
        let outcome = ended.event("recovered").map_err(|e| format!("killed at `{step}`: {e}"))?;
        match step {
            "named" => assert_eq!(outcome["outcome"], "saved"),
            _ => {
                assert_eq!(outcome["outcome"], "undone");
                is_as_before(dir, guest, &before, step)?;
                save(guest).succeed().map_err(|e| format!("behind `{step}`: {e}"))?;
            }
        }
        fs::remove_file(dir.path("vm.snap"))?;
        check(guest)?;
    }
    Ok(())
}

fn an_image_that_cant_be_read_is_not_given_up(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let guest = &mut boot(dir, qemu)?;
    kill_at_its_step(save(dir, guest).env(STOP_AT, "named").start()?)?;
    let saved = State::of(guest, dir)?;
    let image = dir.path("vm.snap");
    let whole = fs::read(&image)?;
    fs::write(&image, &whole[..whole.len() / 2])?;
    let refusal = dir.save(guest, "vm.snap").with(&["--recover"]).fail()?;
    assert!(refusal.contains("nothing was touched") && refusal.contains("truncated"), "{refusal}");
    assert_eq!(State::of(guest, dir)?, saved);
    fs::write(&image, whole)?;

    // Nor is one given up for its journal, which can't be removed.
    let journal = dir.path(".vm.snap.journal");
    assert_eq!(recover(dir, guest)?, "saved");
    assert!(!journal.exists());
    let save = dir.save(guest, "vm.snap").with(&["--force"]).env(STOP_AT, "named").start()?;
    save.wait_stopped()?;
    let kept = dir.path("kept");
    fs::rename(&journal, &kept)?;
    fs::create_dir(&journal)?;
    save.signal(libc::SIGCONT);
    let note = save.succeed()?.event("note")?.clone();
    assert!(note["why"].as_str().is_some_and(|why| why.contains(".vm.snap.journal")), "{note}");
    fs::remove_dir(&journal)?;
    fs::rename(&kept, &journal)?;
    let refusal = dir.save(guest, "vm.snap").with(&["--force"]).fail()?;
    assert!(refusal.contains("--recover"), "{refusal}");
    assert_eq!(recover(dir, guest)?, "saved");
    dir.save(guest, "vm.snap").with(&["--force"]).succeed()?;
    assert!(!journal.exists());
    Ok(())
}
