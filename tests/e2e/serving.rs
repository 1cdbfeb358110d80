//! Memory that is served from the background, or to a QEMU of somebody else's.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Dir, send_signal, text, wait_gone};
use crate::interrupts::UNFILLED;
use crate::shared::{Shared, shared};
use crate::support::{
    Attached, Qemu, Qmp, Result, SOON, process_gone, qmp, query_status, spawn_bound, wait_for,
};
use crate::{tests, tests_on_both};

tests_on_both! {
    a_detached_server_serves_until_memory_is_whole
    a_qemu_that_waits_is_served
    a_qemu_that_may_not_be_traced_is_served_by_its_socket
}

tests! {
    a_detached_revert_that_fails_leaves_no_log
    a_served_guest_that_is_another_machine_is_refused
    nobody_to_serve_is_told
}

fn a_detached_server_serves_until_memory_is_whole(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    // Without --log on one QEMU, with it on the other.
    let log = dir.path("my.log");
    let args = ["--detach", "--log", text(&log)];
    let args = if qemu == Qemu::V7 { &args[..1] } else { &args[..] };
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED).with(args);
    let ended = revert.succeed()?;
    assert_eq!(ended.steps(), ["qemu_ready", "running", "detached"]);
    let pid = ended.event("running")?["pid"].as_u64().ok_or("no pid")? as u32;
    let mut guest = Attached::to(pid, &to)?;
    let detached = ended.event("detached")?;
    let server = detached["server_pid"].as_u64().ok_or("no server")? as u32;
    let named = PathBuf::from(detached["log"].as_str().ok_or("no log")?);
    assert_eq!(named == log, qemu == Qemu::V10);
    assert_eq!(fs::metadata(&named)?.mode() & 0o777, 0o600);
    // The guest is there already, though most of its memory is not.
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    assert!(!process_gone(server));
    // Asked to end, it gives the guest what it needs first.
    send_signal(server, libc::SIGTERM);
    wait_gone(server)?;
    let said = fs::read_to_string(&named)?;
    // Behind it at most its memory was collapsed into huge pages.
    let is_collapsed = |line: &&str| line.contains("\"event\":\"collapsed\"");
    let last = said.lines().rev().find(|line| !is_collapsed(line)).ok_or("an empty log")?;
    let last: Value = serde_json::from_str(last)?;
    assert_eq!((&last["event"], &last["pages"]), (&json!("resident"), &last["total"]));
    // While nothing happened, nothing was said.
    let progress: Vec<(Value, Value)> = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|event| event["event"] == "progress")
        .map(|event| (event["pages"].clone(), event["requests"].clone()))
        .collect();
    assert!(progress.windows(2).all(|pair| pair[0] != pair[1]), "{said}");
    let verdict = guest.oracle.check()?;
    assert!(verdict.ok(), "{verdict:?}");
    assert_eq!(qmp(&guest.qmp_path, "query-migrate", json!({}))?["status"], "completed");
    Ok(())
}

fn a_detached_revert_that_fails_leaves_no_log(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let refusal = dir.snapback(&["revert", "missing.snap", "--detach"]).fail()?;
    assert!(refusal.contains("missing.snap"), "{refusal}");
    let to = dir.make("reverted")?;
    let revert = || dir.revert(&shared.image, &shared.from, &to);
    let refusal = revert().with(&["--detach", "--", "-no-such-option"]).fail()?;
    assert!(refusal.contains("-no-such-option: invalid option"), "{refusal}");
    assert!(dir.recorded()?.is_empty());
    let log = dir.path("no such folder/my.log");
    let refusal = revert().with(&["--detach", "--log", text(&log)]).fail()?;
    assert!(refusal.contains(text(&log)), "{refusal}");
    assert_eq!(dir.names("reverted")?, Vec::<String>::new());
    Ok(())
}

/// A QEMU of the shared guest's machine, its files in a folder of the test's.
pub struct Waiting {
    pub qemu: std::process::Child,
    pub folder: PathBuf,
    /// Where it waits for its migration, once it has been told to.
    pub socket: PathBuf,
}

impl Waiting {
    /// One that listens for its migration.
    pub fn start(dir: &Dir, shared: &Shared, postcopy: bool, args: &[&str]) -> Result<Waiting> {
        let waiting = Waiting::deferred(dir, shared, args)?;
        let mut monitor = Qmp::connect(&waiting.qmp_path())?;
        let capabilities = json!([{"capability": "postcopy-ram", "state": postcopy}]);
        monitor.execute("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        let address = format!("unix:{}", text(&waiting.socket));
        monitor.execute("migrate-incoming", json!({"uri": address}))?;
        Ok(waiting)
    }

    /// One that has not been told yet where its migration comes from.
    pub fn deferred(dir: &Dir, shared: &Shared, args: &[&str]) -> Result<Waiting> {
        let folder = dir.make("reverted")?;
        let info = dir.snapback(&["info", text(&shared.image)]).succeed()?.events.remove(0);
        let line = info["command_line"].as_array().ok_or("no command line")?;
        let place = |arg: &Value| {
            arg.as_str().unwrap_or_default().replace(text(&shared.from), text(&folder))
        };
        let mut command = Command::new(info["binary"].as_str().unwrap_or_default());
        command.args(line[1..].iter().map(place)).args(["-incoming", "defer"]).args(args);
        command.envs(Qemu::ALL.into_iter().flat_map(Qemu::env));
        command.current_dir(&folder).stderr(Stdio::null());
        let qemu = spawn_bound(command)?;
        let waiting = Waiting { qemu, folder, socket: dir.path("migration.sock") };
        // It is there once its QMP answers.
        Qmp::connect(&waiting.qmp_path())?;
        Ok(waiting)
    }

    /// Its QMP socket.
    pub fn qmp_path(&self) -> PathBuf {
        self.folder.join("qmp.sock")
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Fails when it has ended; it is reaped here alone.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn a_qemu_that_waits_is_served(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let waiting = Waiting::start(dir, shared, true, &[])?;
    let to = format!("unix:{}", text(&waiting.socket));
    let mut server = dir.snapback(&["serve", text(&shared.image), "--to", &to]).start()?;
    server.wait("running")?;
    let mut guest = Attached::to(waiting.qemu.id(), &waiting.folder)?;
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    let ended = server.succeed()?;
    assert_eq!(ended.steps(), ["running", "resident"]);
    wait_for(SOON, "the migration to complete", || {
        let status = qmp(&guest.qmp_path, "query-migrate", json!({}))?;
        Ok((status["status"] == "completed").then_some(()))
    })?;
    assert_eq!(query_status(&guest.qmp_path)?, "running");
    let verdict = guest.oracle.check()?;
    assert!(verdict.ok(), "{verdict:?}");
    Ok(())
}

fn a_qemu_that_may_not_be_traced_is_served_by_its_socket(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let waiting = Waiting::start(dir, shared, true, &[])?;
    let to = format!("unix:{}", text(&waiting.socket));
    let serve = dir.snapback(&["serve", text(&shared.image), "--to", &to, "--place", "auto"]);
    let mut server = serve.without_ptrace().start()?;
    server.wait("running")?;
    let mut guest = Attached::to(waiting.qemu.id(), &waiting.folder)?;
    assert_eq!(guest.oracle.nonce()?, shared.nonce);
    let ended = server.succeed()?;
    let placing: Vec<&Value> = ended.events.iter().filter(|e| e["event"] == "placing").collect();
    let [placing] = placing[..] else { panic!("told more than once or never: {placing:?}") };
    assert_eq!(placing["way"], "socket");
    let reason = placing["reason"].as_str().unwrap_or_default();
    let pid = format!("of process {} can't be used", waiting.qemu.id());
    assert!(reason.contains(&pid) && reason.contains("ptrace(2)"), "{reason}");
    let verdict = guest.oracle.check()?;
    assert!(verdict.ok(), "{verdict:?}");
    drop(guest);
    drop(waiting);

    // Nothing else is taken where that was asked for.
    fs::remove_dir_all(dir.path("reverted"))?;
    let waiting = Waiting::start(dir, shared, true, &[])?;
    let serve = dir.snapback(&["serve", text(&shared.image), "--to", &to, "--place", "uffd"]);
    let refusal = serve.without_ptrace().fail()?;
    assert!(refusal.contains("can't be installed by userfaultfd"), "{refusal}");
    assert!(refusal.contains("ptrace(2)"), "{refusal}");
    drop(waiting);
    Ok(())
}

fn a_served_guest_that_is_another_machine_is_refused(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    for (postcopy, args) in [(true, &["-m", "96"][..]), (false, &[])] {
        let waiting = Waiting::start(dir, shared, postcopy, args)?;
        let to = format!("unix:{}", text(&waiting.socket));
        let refusal = dir.snapback(&["serve", text(&shared.image), "--to", &to]).fail()?;
        assert!(refusal.contains("the machine that was saved"), "{refusal}");
        assert!(refusal.contains("postcopy-ram"), "{refusal}");
        drop(waiting);
        fs::remove_dir_all(dir.path("reverted"))?;
    }
    Ok(())
}

fn nobody_to_serve_is_told(dir: &Dir) -> Result<()> {
    let image = text(&shared(Qemu::V7)?.image);
    let refusal = dir.snapback(&["serve", image, "--to", "unix:nobody.sock"]).fail()?;
    assert!(refusal.contains("nobody.sock") && refusal.contains("-incoming"), "{refusal}");
    Ok(())
}
