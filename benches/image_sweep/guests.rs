//! Guests at work, whose memory is measured.

// Each benchmark uses a part of this.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Attached, Guest, GuestOptions, Qemu, Qmp, Result, debian, wait_for};

/// Allowed for a guest to have worked: far more than it takes.
const PATIENCE: Duration = Duration::from_secs(600);

/// Whose memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The oracle guest: half of its pages random, some zero, the rest repetitive.
    Oracle,
    /// Debian with PostgreSQL at work.
    Debian,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Oracle => "oracle guest",
            Kind::Debian => "Debian with PostgreSQL at work",
        }
    }

    /// Boots the guest, has it work, and gives it while it does.
    ///
    /// # Errors
    /// When it does not boot or doesn't get to work.
    pub fn at_work(self, qemu: Qemu, mib: u64, folder: &Path) -> Result<Guest> {
        match self {
            Kind::Oracle => Guest::boot(&GuestOptions { qemu, mib, ..GuestOptions::default() }),
            Kind::Debian => database(qemu, mib, folder),
        }
    }
}

/// A database that has been read once as a whole, by a userland whose programs are in
/// the page cache, under pgbench.
fn database(qemu: Qemu, mib: u64, folder: &Path) -> Result<Guest> {
    let disk = debian::make_disk(&folder.join("disk.qcow2"))?;
    let mut guest = Guest::boot(&GuestOptions { mib, ..debian::options(qemu, disk) })?;
    debian::run(&mut guest.oracle, "cat /usr/bin/* /usr/sbin/* >/dev/null")?;
    debian::sql(&mut guest.oracle, "SELECT sum(abalance) FROM pgbench_accounts")?;
    let before = debian::transactions(&mut guest.oracle)?;
    debian::start_pgbench(&mut guest.oracle, 4)?;
    wait_for(PATIENCE, "pgbench to commit 200 transactions", || {
        Ok((debian::transactions(&mut guest.oracle)? > before + 200).then_some(()))
    })?;
    Ok(guest)
}

/// Runs the program to its end.
///
/// # Errors
/// When it fails.
pub fn snapback(args: &[&OsStr]) -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
    match command.status()?.success() {
        true => Ok(()),
        false => Err(format!("{command:?} failed").into()),
    }
}

/// Runs the program to its end, and returns the events that it told by `--json`.
///
/// # Errors
/// When it fails.
pub fn events(args: &[&OsStr]) -> Result<Vec<Value>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    let ended = command.args(args).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    if !ended.status.success() {
        return Err(format!("{command:?} failed").into());
    }
    let lines = std::str::from_utf8(&ended.stdout)?.lines();
    Ok(lines.map(serde_json::from_str).collect::<serde_json::Result<_>>()?)
}

/// The first event of that name.
///
/// # Errors
/// When there is none.
pub fn event<'a>(events: &'a [Value], name: &str) -> Result<&'a Value> {
    let found = events.iter().find(|event| event["event"] == name);
    found.ok_or_else(|| format!("no `{name}` in {events:?}").into())
}

/// Saves a guest's memory, not its disks, while it runs.
///
/// # Errors
/// When that fails.
pub fn save(guest: &Guest, image: &Path, options: &[&str]) -> Result<()> {
    let mut words: Vec<&OsStr> = ["save", "--memory-only"].map(OsStr::new).into();
    words.extend(options.iter().map(OsStr::new));
    words.extend(["--qmp".as_ref(), guest.qmp_path.as_os_str(), image.as_os_str()]);
    snapback(&words)
}

/// Has QEMU save all of the machine into its disk, and load it again so many times. Returns how long
/// each load took, in milliseconds.
///
/// # Errors
/// When the machine has no disk for it, or QEMU fails.
pub fn load_times(socket: &Path, times: usize) -> Result<Vec<f64>> {
    let mut qmp = Qmp::connect(socket)?;
    let blocks = qmp.execute("query-block", json!({}))?;
    let node = blocks
        .as_array()
        .and_then(|blocks| blocks.iter().find_map(|block| block["inserted"]["node-name"].as_str()));
    let node = node.ok_or("no disk")?.to_owned();
    let mut job = |command: &str, number: usize| -> Result<()> {
        let id = format!("job{number}");
        let arguments = json!({ "job-id": id, "tag": "peer", "vmstate": node, "devices": [node] });
        qmp.execute(command, arguments)?;
        wait_for(PATIENCE, "QEMU's job", || {
            let jobs = qmp.execute("query-jobs", json!({}))?;
            let jobs = jobs.as_array().cloned().unwrap_or_default();
            let ours = jobs.iter().find(|job| job["id"] == *id);
            let ended = ours.filter(|job| job["status"] == "concluded");
            match ended.map(|job| job["error"].as_str()) {
                Some(Some(error)) => Err(format!("{command}: {error}").into()),
                ended => Ok(ended.map(|_| ())),
            }
        })?;
        qmp.execute("job-dismiss", json!({ "id": id })).map(drop)
    };
    job("snapshot-save", 0)?;
    let load = |number| {
        let start = Instant::now();
        job("snapshot-load", number)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    (1..=times).map(load).collect()
}

/// A guest that the program has brought back. Dropping it ends it.
pub struct Reverted {
    pub guest: Attached,
    pub server: Child,
    pub socket: PathBuf,
    /// When the awaited event was told, in milliseconds.
    pub told: f64,
}

impl Reverted {
    /// Reverts, and waits for an event.
    pub fn start(
        image: &Path,
        recorded: &Path,
        place: &Path,
        more: &[&str],
        awaited: &str,
    ) -> Result<Reverted> {
        std::fs::create_dir(place)?;
        let rule = format!("{}={}", recorded.display(), place.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command.arg("revert").arg(image).args(["--json", "--path", &rule]).args(more);
        command.arg("--overlay-dir").arg(place);
        let mut server = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(server.stdout.take().ok_or("no output")?).lines();
        let mut pid = None;
        for line in lines {
            let event: Value = serde_json::from_str(&line?)?;
            if event["event"] == "running" {
                pid = event["pid"].as_u64();
            }
            if event["event"] == awaited {
                let pid = pid.ok_or("it does not run")? as u32;
                let told = event["ms"].as_f64().ok_or("no time")?;
                let socket = place.join("qmp.sock");
                return Ok(Reverted { guest: Attached::to(pid, place)?, server, socket, told });
            }
        }
        Err(format!("the revert ended before it told `{awaited}`").into())
    }
}

impl Drop for Reverted {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
