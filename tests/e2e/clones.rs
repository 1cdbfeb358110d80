//! Several guests of one image by one command, beside the living original.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;

use serde_json::Value;

use crate::harness::{Dir, Ended, Reverted, check, text};
use crate::ports::{free_port, with_ports};
use crate::shared::{borrow, shared};
use crate::support::{Qemu, Result};
use crate::{tests, tests_on_both_at_length};

tests_on_both_at_length! {
    clones_run_side_by_side
}

tests! {
    clones_have_ports_of_their_own
    clones_in_the_background_are_listed_each
    a_clone_that_fails_leaves_the_others_alone
}

/// The events of one name, by their clones.
pub fn by_clone<'a>(ended: &'a Ended, name: &str) -> BTreeMap<&'a str, &'a Value> {
    let named = ended.events.iter().filter(|event| event["event"] == name);
    named.filter_map(|event| Some((event["clone"].as_str()?, event))).collect()
}

/// The clones that a command has told to run.
pub fn running(dir: &Dir, ended: &Ended) -> Result<BTreeMap<String, Reverted>> {
    let take = |(name, event): (&str, &Value)| {
        let pid = event["pid"].as_u64().ok_or("no process")? as u32;
        Ok((name.to_owned(), Reverted::alone(pid, &dir.path(name))?))
    };
    by_clone(ended, "running").into_iter().map(take).collect()
}

fn clones_run_side_by_side(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut original = borrow(qemu)?;
    let shared = shared(qemu)?;
    let own = dir.path("{name}");
    let args = ["--count", "3", "--name", "w{n}", "--dir", text(&own)];
    let ended = dir.snapback(&["revert", text(&shared.image)]).with(&args).succeed()?;
    let resident: Vec<_> = by_clone(&ended, "resident").into_keys().collect();
    assert_eq!(resident, ["w1", "w2", "w3"], "{ended:?}");
    let mut clones = running(dir, &ended)?;
    assert_eq!(clones.len(), 3);
    for (name, clone) in &mut clones {
        clone.check(&shared.nonce)?;
        assert!(dir.sockets(name)?.contains(&"qmp.sock".to_owned()), "{:?}", dir.names(name));
    }
    check(&mut original)
}

fn clones_have_ports_of_their_own(dir: &Dir) -> Result<()> {
    let (forward, serial) = (free_port()?, free_port()?);
    let mut guest = with_ports(Qemu::V10, forward, serial)?;
    let nonce = guest.oracle.nonce()?;
    dir.save(&guest, "vm.snap").succeed()?;
    let ended = dir.snapback(&["revert", text(&dir.path("vm.snap"))]).with(&["--count", "4"]);
    let ended = ended.succeed()?;
    let mut ports = BTreeSet::new();
    for event in by_clone(&ended, "running").values() {
        let told = event["ports"].as_object().ok_or("no ports are told")?;
        for old in [forward, serial] {
            let new = told[&old.to_string()].as_u64().ok_or("no port")? as u16;
            assert!(new != old && ports.insert(new), "{told:?}");
            TcpStream::connect(("127.0.0.1", new)).map_err(|e| format!("port {new}: {e}"))?;
        }
    }
    let mut clones = running(dir, &ended)?;
    let names: Vec<_> = clones.keys().cloned().collect();
    assert_eq!(names, ["vm-1", "vm-2", "vm-3", "vm-4"]);
    clones.values_mut().try_for_each(|clone| clone.check(&nonce))?;
    check(&mut guest)
}

fn clones_in_the_background_are_listed_each(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let args = ["--count", "2", "--detach", "--fill-delay", "1000000", "--no-working-set"];
    let ended = dir.snapback(&["revert", text(&shared.image)]).with(&args).succeed()?;
    let detached = by_clone(&ended, "detached");
    assert_eq!(detached.keys().collect::<Vec<_>>(), [&"vm-1", &"vm-2"], "{ended:?}");
    let mut clones = running(dir, &ended)?;
    let listed = dir.snapback(&["ps"]).succeed()?;
    for (name, clone) in &mut clones {
        let run = listed.events.iter().find(|run| run["id"] == detached[name.as_str()]["id"]);
        assert_eq!(run.ok_or("not listed")?["qemu_pid"], clone.pid);
        clone.check(&shared.nonce)?;
    }
    for event in detached.values() {
        dir.snapback(&["stop", event["id"].as_str().ok_or("no id")?]).succeed()?;
    }
    Ok(())
}

fn a_clone_that_fails_leaves_the_others_alone(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    // What is no directory can't be the second one's.
    std::fs::write(dir.path("w2"), "")?;
    let args = ["--count", "3", "--name", "w{n}"];
    let ended = dir.snapback(&["revert", text(&shared.image)]).with(&args).end()?;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let errors = by_clone(&ended, "error");
    assert_eq!(errors.keys().collect::<Vec<_>>(), [&"w2"], "{ended:?}");
    let told = errors["w2"]["message"].as_str().unwrap_or_default();
    assert!(told.contains("w2") && told.contains("--dir"), "{told}");
    let last = ended.events.last().ok_or("no event")?;
    assert_eq!((&last["event"], &last["clone"]), (&"error".into(), &Value::Null), "{ended:?}");
    let mut clones = running(dir, &ended)?;
    assert_eq!(clones.keys().collect::<Vec<_>>(), ["w1", "w3"]);
    clones.values_mut().try_for_each(|clone| clone.check(&shared.nonce))
}
