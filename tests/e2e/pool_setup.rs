//! What is done for a pool's guest as soon as it runs: by its agent, and by a command of the host's.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::clocks::now;
use crate::harness::{Dir, Reverted, text};
use crate::identity::{OLD, SEES, address_of_card, with_card};
use crate::pools::Daemon;
use crate::shared::shared;
use crate::support::{Qemu, Result, SOON, debian, qmp, wait_for};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    guests_are_set_up_when_they_are_taken_and_reset
}

tests! {
    a_set_up_that_fails_is_told
}

/// Waits until a guest is set up, or has failed to be. Returns it as it is then.
fn set_up(daemon: &Daemon, id: &str) -> Result<Value> {
    wait_for(SOON, "the guest to be set up", || {
        let guest = daemon.get(&format!("/v1/guests/{id}"))?;
        Ok((guest["setup"]["state"] != "pending").then_some(guest))
    })
}

fn guests_are_set_up_when_they_are_taken_and_reset(dir: &Dir, qemu: Qemu) -> Result<()> {
    let guest = with_card(dir, qemu)?;
    dir.save(&guest, "vm.snap").succeed()?;
    // QEMU is started where it was.
    let _folder = guest.kill();
    let image = dir.path("vm.snap");
    let daemon = Daemon::start(dir)?;
    let hooked = dir.path("hooked");
    let hook = format!("echo $SNAPBACK_CLONE $SNAPBACK_PID $SNAPBACK_QMP >>{}", text(&hooked));
    let create = ["pool", "create", "booted", text(&image)];
    let tasks = ["--mac", "new", "--agent-set-time", "--agent-exec", "hostname {name}-{n}"];
    daemon.ask(dir, &create).with(&tasks).with(&["--hook-running", &hook]).succeed()?;
    daemon.wait_ready(1)?;

    let mut events = UnixStream::connect(&daemon.socket)?;
    write!(events, "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")?;
    events.set_read_timeout(Some(SOON))?;
    let taken = daemon.ask(dir, &["take", "booted", "--name", "mine"]).succeed()?;
    let taken = taken.event("running")?;
    assert_eq!(taken["setup"]["state"], "pending", "{taken}");
    let id = taken["id"].as_str().ok_or("no id")?;
    let folder = Path::new(taken["dir"].as_str().ok_or("no directory")?);
    let pid_of = |guest: &Value| guest["qemu_pid"].as_u64().map(|pid| pid as u32);
    let mut contact = Reverted::alone(pid_of(taken).ok_or("no process")?, folder)?;
    let mut seen = BTreeSet::from([OLD.to_owned()]);
    // Taken, taken back inside its QEMU, and by a new process: it is set up each time.
    for how in ["taken", "in_place", "new_process"] {
        if how == "new_process" {
            let device = json!({ "driver": "virtio-rng-pci", "id": "new" });
            qmp(&contact.qmp_path, "device_add", device)?;
        }
        if how != "taken" {
            let (status, body) = daemon.request("POST", &format!("/v1/guests/{id}/reset"), "")?;
            let reset: Value = serde_json::from_str(&body)?;
            assert_eq!((status, &reset["how"]), (200, &json!(how)), "{body}");
        }
        let guest = set_up(&daemon, id)?;
        assert_eq!(guest["setup"], json!({"state": "done"}), "{how}");
        let pid = pid_of(&guest).ok_or("no process")?;
        if pid != contact.pid {
            contact = Reverted::alone(pid, folder)?;
        }
        let address = address_of_card(&contact)?;
        assert_eq!(debian::run(&mut contact.oracle, SEES)?, format!("{address}\n1"), "{how}");
        assert!(seen.insert(address), "{how}: {seen:?}");
        assert_eq!(debian::run(&mut contact.oracle, "hostname")?, "mine-1");
        let time: f64 = debian::run(&mut contact.oracle, "date +%s")?.parse()?;
        assert!(time > now() - 600.0, "{how}: {time}");
        let told = fs::read_to_string(&hooked)?;
        let line = format!("mine {pid} {}", text(&folder.join("qmp.sock")));
        assert_eq!(told.lines().last(), Some(line.as_str()), "{how}");
        wait_for(SOON, "its writes to be tracked", || {
            Ok((daemon.get(&format!("/v1/guests/{id}"))?["resettable"] == true).then_some(()))
        })?;
    }
    let told = told_of(events)?;
    let did: Vec<_> = told.iter().filter_map(|event| event["did"].as_str()).collect();
    assert!(did[0].starts_with("address of net0: "), "{did:?}");
    assert_eq!(did[1..3], ["guest-set-time", "hostname mine-1"]);
    assert!(told.iter().any(|event| event["event"] == "hook" && event["failed"].is_null()));
    daemon.ask(dir, &["release", id]).succeed()?;
    daemon.end()
}

/// The events of a guest's set-up, up to the last that its agent was told.
fn told_of(stream: UnixStream) -> Result<Vec<Value>> {
    let (mut told, mut agent, mut hook) = (Vec::new(), false, false);
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        let event: Value = serde_json::from_str(data)?;
        match event["event"].as_str() {
            Some("agent") => agent |= event["left"] == 0,
            Some("hook") => hook = true,
            _ => continue,
        }
        told.push(event);
        if agent && hook {
            return Ok(told);
        }
    }
    Err(format!("the stream ended: {told:?}").into())
}

/// Whoever takes a guest is told what has failed, and says nothing of what is done.
fn a_set_up_that_fails_is_told(dir: &Dir) -> Result<()> {
    let daemon = Daemon::start(dir)?;
    daemon.pool(dir, Qemu::V10, 1, &["--hook-running", "sleep 0.1; exit 7"])?;
    for given in [r#"{"hook_running":"id"}"#, r#"{"agent_exec":["id"]}"#] {
        let (status, body) = daemon.request("POST", "/v1/pools/booted/take", given)?;
        assert!(status == 400 && body.contains("request_invalid"), "{body}");
    }
    let mut taken = daemon.take(dir)?;
    let guest = set_up(&daemon, &taken.id)?;
    assert_eq!(guest["setup"]["state"], "failed");
    let problem = guest["setup"]["problem"].as_str().ok_or("no problem")?;
    assert!(problem.contains("hook_running: exit status: 7"), "{problem}");
    taken.check(Qemu::V10)?;
    daemon.ask(dir, &["release", &taken.id]).succeed()?;

    // A command that does not end is told to when its guest ends.
    let pids = dir.path("pid");
    let hook = format!("echo $$ >{}; exec sleep 1000", text(&pids));
    let image = text(&shared(Qemu::V10)?.image);
    daemon.ask(dir, &["pool", "create", "long", image, "--hook-running", &hook]).succeed()?;
    let taken = daemon.ask(dir, &["take", "long"]).succeed()?;
    let pid = wait_for(SOON, "the command to run", || {
        Ok(fs::read_to_string(&pids).ok().and_then(|pid| pid.trim().parse().ok()))
    })?;
    let id = taken.event("running")?["id"].as_str().ok_or("no id")?;
    daemon.ask(dir, &["release", id]).succeed()?;
    crate::harness::wait_gone(pid)?;

    // What its agent is told takes an agent.
    let refused = ["pool", "create", "without", image, "--agent-set-time"];
    daemon.ask(dir, &refused).succeed()?;
    let pool = wait_for(SOON, "the pool to be degraded", || {
        let pool = daemon.get("/v1/pools/without")?;
        Ok((pool["state"] == "degraded").then_some(pool))
    })?;
    let message = pool["problem"]["message"].as_str().ok_or("no message")?;
    assert!(message.contains("`agent`") && message.contains("org.qemu.guest_agent.0"), "{message}");
    daemon.ask(dir, &["pool", "remove", "without"]).succeed()?;
    daemon.end()
}
