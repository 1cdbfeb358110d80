//! Reverts that are under way, seen from outside: listed, ended, and cleaned up behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Dir, Reverted, check, send_signal, text, wait_gone};
use crate::interrupts::UNFILLED;
use crate::shared::{options, shared};
use crate::support::{
    Bus, Disk, Format, Given, Guest, GuestOptions, Qemu, Result, SOON, files, wait_for,
};
use crate::{tests, tests_on_both};

tests_on_both! {
    reverts_are_listed_and_ended
    what_killed_processes_left_is_removed
}

tests! {
    overlays_that_were_saved_are_no_left_overs
    foreign_records_harm_nobody
}

/// The reverts that `ps` lists.
fn ps(dir: &Dir) -> Result<Vec<Value>> {
    let ended = dir.snapback(&["ps"]).succeed()?;
    Ok(ended.events.into_iter().filter(|event| event["event"] == "run").collect())
}

/// The revert whose QEMU is this process.
fn run_of(dir: &Dir, pid: u32) -> Result<Value> {
    let found = ps(dir)?.into_iter().find(|run| run["qemu_pid"] == pid);
    found.ok_or_else(|| format!("no revert of {pid}").into())
}

/// Waits until a revert's record says so.
fn wait_run(dir: &Dir, pid: u32, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    wait_for(SOON, what, || Ok(run_of(dir, pid).ok().filter(&holds)))
        .map_err(|e| format!("{e}: {:?}", ps(dir)).into())
}

fn reverts_are_listed_and_ended(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    assert!(ps(dir)?.is_empty());
    let revert = |name: &str, way: &str| {
        let command = dir.revert(&shared.image, &shared.from, &dir.make(name)?);
        let command = command.with(&UNFILLED).with(&["--place", way]);
        Reverted::of(command, &dir.path(name))
    };
    let (mut one, mut other) = (revert("one", "uffd")?, revert("other", "socket")?);
    let listed = wait_run(dir, one.pid, "a direct revert", |run| {
        run["way"] == "uffd" && run["keeper_pid"].is_u64() && run["faults"].as_u64() > Some(0)
    })?;
    let server = one.server.as_ref().ok_or("no server")?.pid();
    assert_eq!(listed["server_pid"], server);
    assert_eq!((&listed["image"], &listed["restarts"]), (&text(&shared.image).into(), &0.into()));
    assert!(listed["present"].as_f64().is_some_and(|share| share > 0.0 && share < 1.0), "{listed}");
    assert!(listed["age_s"].as_f64().is_some_and(|age| age > 0.0 && age < 600.0), "{listed}");
    let keeper = listed["keeper_pid"].as_u64().ok_or("no keeper")? as u32;
    assert!(fs::read_to_string(format!("/proc/{keeper}/cmdline"))?.contains("\0keeper\0"));
    let second = wait_run(dir, other.pid, "the other", |run| run["way"] == "socket")?;
    assert_ne!(listed["id"], second["id"]);
    let plain = dir.snapback(&["ps"]).plain().succeed()?.said;
    assert_eq!(plain.len(), 3, "{plain:?}");
    assert!(plain[0].starts_with("ID") && plain[1].contains(text(&shared.image)), "{plain:?}");

    // Its guest works on, and is somebody else's to serve.
    send_signal(server, libc::SIGKILL);
    let after = wait_run(dir, one.pid, "a successor", |run| {
        run["restarts"] == 1 && run["server_pid"].is_u64() && run["server_pid"] != server
    })?;
    assert_eq!((&after["keeper_pid"], &after["id"]), (&listed["keeper_pid"], &listed["id"]));

    let id = listed["id"].as_str().ok_or("no id")?;
    let error = dir.snapback(&["stop", "no-id"]).fail()?;
    assert!(error.contains("no-id"), "{error}");
    let error = dir.snapback(&["logs", id]).plain().end()?;
    assert!(error.code == Some(3) && error.stderr.contains("foreground"), "{error:?}");
    let ended = dir.snapback(&["stop", &id[..7]]).succeed()?;
    let ended = ended.event("ended")?;
    assert_eq!((&ended["id"], &ended["qemu_pid"]), (&listed["id"], &one.pid.into()));
    assert!(ended["removed"].to_string().contains(id), "{ended}");
    assert_eq!(ended["kept"], json!([]));
    wait_gone(one.pid)?;
    wait_gone(keeper)?;
    assert!(one.server.take().ok_or("no server")?.end()?.event("resident").is_err());
    assert_eq!(dir.sockets("one")?, [""; 0]);

    let left: Vec<_> = ps(dir)?.into_iter().map(|run| run["id"].clone()).collect();
    assert_eq!(left, [second["id"].clone()]);
    assert!(left_overs(dir, &["--yes"])?.is_empty());
    other.server.as_ref().ok_or("no server")?.signal(libc::SIGTERM);
    other.resident()?;
    assert!(!dir.runs().exists(), "a revert that ended well has left its record");
    other.check(&shared.nonce)
}

/// What `gc` finds: each path, and whether it was removed.
fn left_overs(dir: &Dir, args: &[&str]) -> Result<Vec<(PathBuf, bool)>> {
    let ended = dir.snapback(&["gc"]).with(args).succeed()?;
    let left = ended.events.iter().filter(|event| event["event"] == "left_over");
    let of = |event: &Value| Some((event["path"].as_str()?.into(), event["removed"].as_bool()?));
    Ok(left.filter_map(of).collect())
}

fn what_killed_processes_left_is_removed(dir: &Dir, qemu: Qemu) -> Result<()> {
    let guest = GuestOptions { disks: vec![disk(dir)?], ..options(qemu) };
    let mut guest = Guest::boot(&guest)?;
    let nonce = guest.oracle.nonce()?;
    let image = dir.path("vm.snap");
    dir.save(&guest, "vm.snap").succeed()?;
    check(&mut guest)?;

    let to = dir.make("reverted")?;
    let before = files(&dir.path("."))?;
    let command = dir.revert(&image, &guest.dir, &to).with(&UNFILLED).with(&["--detach"]);
    let mut reverted = Reverted::of(command, &to)?;
    let ended = reverted.server.take().ok_or("no server")?.succeed()?;
    let (detached, overlay) = (ended.event("detached")?, ended.event("disk")?);
    let (log, overlay) = (detached["log"].as_str(), overlay["overlay"].as_str());
    let (log, overlay) = (log.ok_or("no log")?, PathBuf::from(overlay.ok_or("no overlay")?));
    let run = wait_run(dir, reverted.pid, "its processes", |run| run["keeper_pid"].is_u64())?;
    assert_eq!((&run["id"], &run["server_pid"]), (&detached["id"], &detached["server_pid"]));
    let id = run["id"].as_str().ok_or("no id")?;
    let said = dir.snapback(&["logs", id]).plain().succeed()?.said;
    assert!(said.iter().any(|line| line.contains("\"running\"")), "{said:?}");

    // Neither can replace the other.
    let [server, keeper] = ["server_pid", "keeper_pid"].map(|of| run[of].as_u64().unwrap() as u32);
    for signal in [libc::SIGSTOP, libc::SIGKILL] {
        [server, keeper].iter().for_each(|pid| send_signal(*pid, signal));
    }
    wait_gone(server)?;
    wait_gone(keeper)?;
    let run = run_of(dir, reverted.pid)?;
    assert!(run["server_pid"].is_null() && run["keeper_pid"].is_null(), "{run}");
    let said = dir.snapback(&["ps"]).plain().succeed()?.said;
    assert!(said.iter().any(|line| line.contains("nobody brings")), "{said:?}");
    // Its guest lives.
    assert_eq!(left_overs(dir, &["--yes"])?, []);
    assert!(overlay.exists() && Path::new(log).exists());

    send_signal(reverted.pid, libc::SIGKILL);
    wait_gone(reverted.pid)?;
    assert!(!dir.sockets("reverted")?.is_empty());
    // A process that has been killed may have files open for a moment more.
    let found = wait_for(SOON, "the overlay to be nobody's", || {
        let found = left_overs(dir, &[])?;
        Ok(found.iter().any(|(path, _)| *path == overlay).then_some(found))
    })?;
    assert!(found.iter().all(|(path, removed)| path.exists() && !removed), "{found:?}");
    let said = dir.snapback(&["gc"]).plain().succeed()?.said;
    assert!(said.last().is_some_and(|line| line.contains("--yes")) && overlay.exists());
    let removed = left_overs(dir, &["--yes"])?;
    assert!(removed.iter().all(|(path, removed)| !path.exists() && *removed), "{removed:?}");
    assert_eq!(removed.len(), found.len());
    assert!(ps(dir)?.is_empty() && left_overs(dir, &["--yes"])?.is_empty());
    assert!(!dir.runs().exists());
    assert_eq!(dir.sockets("reverted")?, [""; 0]);
    let mut after = files(&dir.path("."))?;
    after.retain(|path| !path.starts_with(&to));
    assert_eq!(after, before);

    // Nothing that the image needs is gone.
    dir.snapback(&["verify", text(&image)]).succeed()?;
    let mut again = dir.reverted(&image, &guest.dir, "again")?;
    again.resident()?;
    again.check(&nonce)
}

fn disk(dir: &Dir) -> Result<Disk> {
    let disk = Disk {
        id: "disk".into(),
        bus: Bus::VirtioBlk,
        given: Given::Blockdev,
        file: dir.path("disk.raw"),
        format: Format::Raw,
    };
    disk.make(8)?;
    Ok(disk)
}

/// Such a record is there if the server was killed in the moment in which it was done.
fn overlays_that_were_saved_are_no_left_overs(dir: &Dir) -> Result<()> {
    let guest = Guest::boot(&GuestOptions { disks: vec![disk(dir)?], ..options(Qemu::V10) })?;
    dir.save(&guest, "vm.snap").succeed()?;
    let mut reverted = dir.reverted(&dir.path("vm.snap"), &guest.dir, "reverted")?;
    let ended = reverted.resident()?;
    let overlay = PathBuf::from(ended.event("disk")?["overlay"].as_str().ok_or("no overlay")?);
    let stat = fs::read_to_string(format!("/proc/{}/stat", reverted.pid))?;
    let started = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19));
    let mut record = forged(&[&overlay], &[]);
    record["qemu"]["pid"] = json!(reverted.pid);
    record["qemu"]["started"] = json!(started.ok_or("no start")?.parse::<u64>()?);
    for path in [dir.runs(), dir.runs().join("0000000a")] {
        fs::create_dir(&path)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o700))?;
    }
    fs::write(dir.runs().join("0000000a/state.json"), record.to_string())?;
    assert!(run_of(dir, reverted.pid)?["present"].is_null());

    dir.save(&reverted, "after.snap").succeed()?;
    assert_eq!(run_of(dir, reverted.pid)?["present"], 1.0);
    drop(reverted);
    let removed = left_overs(dir, &["--yes"])?;
    assert_eq!(removed, [(dir.runs().join("0000000a"), true)]);
    assert!(overlay.exists());
    let mut after = dir.reverted(&dir.path("after.snap"), &dir.path("reverted"), "after")?;
    after.resident()?;
    check(&mut after)
}

/// The record of a revert without any process, as somebody might forge it.
fn forged(overlays: &[&Path], sockets: &[&Path]) -> Value {
    let dead = json!({ "pid": i32::MAX, "started": 1 });
    json!({
        "image": "/vm.snap", "begun_unix_ms": 1, "pages": 1, "resident": false, "way": null,
        "server": dead, "keeper": dead, "log": null, "overlays": overlays, "sockets": sockets,
        // A number that is another's by now.
        "qemu": { "pid": std::process::id(), "started": 1 },
    })
}

fn foreign_records_harm_nobody(dir: &Dir) -> Result<()> {
    let image = dir.path("vm.snap");
    fs::copy(&shared(Qemu::V7)?.image, &image)?;
    let [file, frozen, open] =
        ["file", "disk.qcow2", "open-0123abcd.qcow2"].map(|name| dir.path(name));
    fs::write(&file, "precious")?;
    fs::write(&frozen, b"QFI\xfb precious")?;
    fs::write(&open, b"QFI\xfb in use")?;
    let _holder = fs::File::open(&open)?;
    let link = dir.path("link-0123abcd.qcow2");
    symlink(&frozen, &link)?;
    let socket = dir.path("live.sock");
    let _listener = UnixListener::bind(&socket)?;

    let runs = dir.runs();
    let make = |id: &str| -> Result<PathBuf> {
        let path = runs.join(id);
        fs::create_dir(&path)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(0o700))?;
        Ok(path)
    };
    fs::create_dir(&runs)?;
    fs::set_permissions(&runs, PermissionsExt::from_mode(0o700))?;
    let record =
        forged(&[&image, &file, &frozen, &open, &link, Path::new("file")], &[&file, &socket]);
    fs::write(make("00000001")?.join("state.json"), record.to_string())?;
    fs::write(make("00000002")?.join("state.json"), "garbage")?;
    symlink("/etc/passwd", make("00000003")?.join("state.json"))?;
    nix::unistd::mkfifo(
        &make("00000004")?.join("state.json"),
        nix::sys::stat::Mode::from_bits_truncate(0o600),
    )?;
    symlink(dir.path("."), runs.join("00000005"))?;
    symlink("/etc/passwd", runs.join("00000005.log"))?;
    fs::write(make("00000006")?.join("state.json"), record.to_string())?;
    fs::set_permissions(runs.join("00000006"), PermissionsExt::from_mode(0o777))?;
    let mut foreign = vec!["00000006"];
    if nix::unistd::geteuid().is_root() {
        fs::write(make("00000007")?.join("state.json"), record.to_string())?;
        std::os::unix::fs::chown(runs.join("00000007"), Some(65534), Some(65534))?;
        foreign.push("00000007");
    }
    fs::write(make("not-an-id")?.join("state.json"), record.to_string())?;

    let precious = [&image, &file, &frozen, &open, &link, &socket];
    let listed = dir.snapback(&["ps"]).end()?;
    assert_eq!(listed.code, Some(0), "{listed:?}");
    let ids: Vec<_> = listed.events.iter().map(|run| run["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["00000001"]);
    assert!(listed.events[0]["qemu_pid"].is_null(), "{listed:?}");
    let ended = dir.snapback(&["gc", "--yes"]).end()?;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let left: Vec<_> = ended.events.iter().map(|left| left["path"].clone()).collect();
    assert_eq!(left, [json!(runs.join("00000001"))]);
    fs::write(make("00000001")?.join("state.json"), record.to_string())?;
    let ended = dir.snapback(&["stop", "00000001"]).end()?;
    assert_eq!((ended.code, &ended.event("ended")?["qemu_pid"]), (Some(0), &Value::Null));
    assert!(precious.iter().all(|path| path.exists()), "{precious:?}");
    assert_eq!(fs::read_to_string(&file)?, "precious");
    assert!(foreign.iter().all(|id| runs.join(id).join("state.json").exists()));
    assert!(runs.join("not-an-id/state.json").exists() && Path::new("/etc/passwd").exists());

    // A directory that others can write to is not used: a revert records itself nowhere else.
    fs::set_permissions(&runs, PermissionsExt::from_mode(0o777))?;
    let error = dir.snapback(&["ps"]).fail()?;
    assert!(error.contains("0700"), "{error}");
    let to = dir.make("reverted")?;
    let shared = shared(Qemu::V7)?;
    let mut guest = Reverted::of(dir.revert(&image, &shared.from, &to), &to)?;
    let ended = guest.server.take().ok_or("no server")?.end()?;
    assert!(ended.event("resident").is_ok() && ended.stderr.contains("0700"), "{ended:?}");
    guest.check(&shared.nonce)
}
