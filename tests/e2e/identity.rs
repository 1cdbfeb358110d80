//! What a guest is given of its own once it runs.

use std::fs;
use std::path::Path;

use crate::clones::{by_clone, running};
use crate::harness::{Dir, Reverted, text, wait_gone};
use crate::shared::shared;
use crate::support::{Qemu, Result};
use crate::{tests, tests_on_both};

tests_on_both! {
    a_hook_is_told_whose_guest_runs
}

tests! {
    a_hook_that_fails_leaves_its_guest_running
    a_hook_that_hangs_is_ended_by_an_interrupt
}

/// What a hook has found in its environment.
fn variable(found: &Path, name: &str) -> Result<String> {
    let found = fs::read_to_string(found)?;
    let value = found.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    Ok(value.ok_or_else(|| format!("no {name}: {found}"))?.to_owned())
}

fn a_hook_is_told_whose_guest_runs(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let hook = "kill -0 $SNAPBACK_PID && test -S \"$SNAPBACK_QMP\" && \
                env >\"$SNAPBACK_DIR/found\"";
    let args = ["--count", "2", "--name", "w{n}", "--hook-running", hook];
    let ended = dir.snapback(&["revert", text(&shared.image)]).with(&args).succeed()?;
    let hooks = by_clone(&ended, "hook");
    assert_eq!(hooks.keys().collect::<Vec<_>>(), [&"w1", &"w2"], "{ended:?}");
    assert!(hooks.values().all(|event| event["failed"].is_null()), "{ended:?}");
    let told = by_clone(&ended, "running");
    for (name, mut clone) in running(dir, &ended)? {
        let own = dir.path(&name).canonicalize()?;
        let found = |variable_name: &str| variable(&own.join("found"), variable_name);
        assert_eq!(found("SNAPBACK_CLONE")?, name);
        assert_eq!(Path::new(&found("SNAPBACK_DIR")?).canonicalize()?, own);
        assert_eq!(found("SNAPBACK_PID")?, clone.pid.to_string());
        let socket = found("SNAPBACK_QMP")?;
        assert_eq!(Path::new(&socket).canonicalize()?, own.join("qmp.sock"));
        assert_eq!(told[name.as_str()]["qmp"], socket);
        assert_eq!(found("SNAPBACK_PORTS")?, "{}");
        clone.check(&shared.nonce)?;
    }
    Ok(())
}

fn a_hook_that_fails_leaves_its_guest_running(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    for (name, more) in [("here", &[][..]), ("detached", &["--detach"])] {
        let to = dir.make(name)?;
        let revert = dir.revert(&shared.image, &shared.from, &to);
        let ended = revert.with(&["--hook-running", "sleep 1; exit 7"]).with(more).end()?;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let told = ended.failure()?;
        assert!(told.contains("--hook-running `sleep 1; exit 7`: exit status: 7"), "{told}");
        assert_eq!(ended.event("error")?["code"], "hook_failed");
        assert!(ended.event("hook")?["failed"].is_string(), "{ended:?}");
        let pid = ended.event("running")?["pid"].as_u64().ok_or("no process")?;
        Reverted::alone(pid as u32, &to)?.check(&shared.nonce)?;
    }
    Ok(())
}

fn a_hook_that_hangs_is_ended_by_an_interrupt(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let to = dir.make("new")?;
    let hook = format!("echo $$ >{}; exec sleep 1000", text(&dir.path("hook")));
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--hook-running", &hook]);
    let mut revert = revert.start()?;
    let pid = revert.wait("running")?["pid"].as_u64().ok_or("no process")?;
    let mut guest = Reverted::alone(pid as u32, &to)?;
    // By then the process that waits for the hook is in its sandbox.
    revert.wait("resident")?;
    let hook: u32 = fs::read_to_string(dir.path("hook"))?.trim().parse()?;
    revert.signal(libc::SIGINT);
    let ended = revert.end()?;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.failure()?.contains("SIGTERM"), "{ended:?}");
    wait_gone(hook)?;
    guest.check(&shared.nonce)
}
