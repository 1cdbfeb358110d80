//! What a server costs that waits: its guest at rest, most memory missing, filling delayed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use snapback::revert::Placement;

use crate::support::{Pidfd, Result, SOON, spawn_bound};

/// Left to the guest to ask for what it needs to be at rest.
const SETTLING: Duration = Duration::from_secs(3);

/// The server, ended when this is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Fails when it has ended; it is reaped here alone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The share of a core that the server of a revert takes over so long a time, in percent.
pub fn server_cpu(
    image: &Path,
    recorded: &Path,
    placement: Placement,
    time: Duration,
) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    command.args(["revert", "--json", "--no-working-set", "--fill-delay", "100000", "--place"]);
    command.arg(format!("{placement:?}").to_lowercase()).arg("--path");
    command.arg(format!("{}={}", recorded.display(), folder.path().display()));
    command.arg(image).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut server = Server(spawn_bound(command)?);
    let output = server.0.stdout.take().ok_or("the program has no output")?;
    let (sender, events) = channel();
    // It ends with the program.
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(|line| line.ok()) {
            let _ = sender.send(serde_json::from_str(&line).unwrap_or(Value::Null));
        }
    });
    let running = wait(&events, "running")?;
    // Ended before its server, which would only wait for it.
    let qemu = Pidfd::open(running["pid"].as_u64().ok_or("no process")? as u32)?;
    std::thread::sleep(SETTLING);
    let (start, before) = (Instant::now(), cpu(server.0.id())?);
    std::thread::sleep(time);
    let (took, spent) = (start.elapsed(), cpu(server.0.id())?.saturating_sub(before));
    let progress = events.try_iter().filter(|event: &Value| event["event"] == "progress").last();
    qemu.kill()?;
    match progress {
        Some(progress) if progress["pages"].as_u64() < progress["total"].as_u64() => {
            Ok(spent.as_secs_f64() / took.as_secs_f64() * 100.0)
        }
        other => Err(format!("memory was to be incomplete: {other:?}").into()),
    }
}

fn wait(events: &Receiver<Value>, name: &str) -> Result<Value> {
    loop {
        let event = events.recv_timeout(SOON).map_err(|e| format!("no event `{name}`: {e}"))?;
        if event["event"] == name {
            return Ok(event);
        }
    }
}

/// A process's time on processors, all of its threads (proc_pid_stat(5)).
fn cpu(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, of which the second may hold anything but ends with the last `)`.
    let fields = stat.rsplit_once(") ").ok_or("no fields")?.1.split(' ').skip(11).take(2);
    let ticks = fields.map(str::parse::<u64>).sum::<std::result::Result<u64, _>>()?;
    // SAFETY: sysconf(3) takes a number only.
    let a_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(Duration::from_secs_f64(ticks as f64 / a_second.max(1) as f64))
}
