//! Servers that are copies of this program, whose events are passed on: the one in the background
//! of `revert --detach`, until the guest runs, and that of each clone of `revert --count`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::failure::{ErrorEvent, Failure};
use super::output::Output;
use crate::cancel::Cancellation;
use crate::kind::ErrorKind;
use crate::revert::RevertEvent;
use crate::runs;

/// Starts a server in the background, of a clone by its number where there are several guests, and
/// returns once the guest runs.
pub(super) async fn revert(
    log: Option<PathBuf>,
    clone: Option<u32>,
    cancel: Cancellation,
    output: Output,
) -> Result<(), Failure> {
    let id = runs::new_id();
    let log = log.map_or_else(|| default_log(&id), Ok)?;
    let file = create_log(&log)?;
    let server =
        start_server(file, &id, clone).map_err(|e| Failure::io("starting the server failed", &e));
    let outcome = match server {
        Ok(server) => pass_on(server, Until::Running, &cancel, &output).await,
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(server) => {
            output.detached(server, id, &log);
            Ok(())
        }
        Err(failure) => {
            // All its events have been passed on.
            let _ = std::fs::remove_file(&log);
            Err(failure)
        }
    }
}

/// Starts the server of a clone, and returns once it, or the one that has taken its place, has
/// ended.
pub(super) async fn serve_clone(
    number: u32,
    cancel: Cancellation,
    output: Output,
) -> Result<(), Failure> {
    let mut command = again(&[&format!("--only={number}"), "--json"])?;
    // An interrupt from the terminal reaches it through us alone.
    command.process_group(0).stderr(Stdio::inherit());
    let server = command.spawn().map_err(|e| Failure::io("starting a server failed", &e))?;
    pass_on(server, Until::End, &cancel, &output).await.map(drop)
}

/// How long a server's events are passed on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The guest runs.
    Running,
    /// Nobody writes to its output any more.
    End,
}

/// Passes the server's events on; returns its process id.
async fn pass_on(
    mut server: tokio::process::Child,
    until: Until,
    cancel: &Cancellation,
    output: &Output,
) -> Result<u32, Failure> {
    let pid = server.id().unwrap_or_default();
    let Some(stdout) = server.stdout.take() else {
        return Err(Failure::said(ErrorKind::Internal, "the server has no output".into()));
    };
    let mut interrupts = 0;
    let mut has_all = false;
    let mut lines = BufReader::new(stdout).lines();
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line?,
            () = cancel.requested_times(interrupts + 1) => {
                // The server's own events tell how it ends.
                interrupts += 1;
                terminate(pid);
                continue;
            }
        };
        let Some(line) = line else { break };
        let value: Value = serde_json::from_str(&line)?;
        if value["event"] == "error" {
            let event: ErrorEvent = serde_json::from_value(value)?;
            let _ = server.wait().await;
            return Err(event.into());
        }
        let event: RevertEvent = serde_json::from_value(value)?;
        output.revert(&event);
        if until == Until::Running && matches!(event, RevertEvent::Running { .. }) {
            return Ok(pid);
        }
        has_all |= matches!(event, RevertEvent::Resident { .. });
    }
    let status = server.wait().await?;
    if until == Until::End && has_all {
        return Ok(pid);
    }
    let waited = match until {
        Until::Running => "ran",
        Until::End => "had all its memory",
    };
    let message = format!("the server ended before the guest {waited} ({status})");
    Err(Failure::said(ErrorKind::Internal, message))
}

/// Cancels the server. It is our child and has not been waited for, so that its process id
/// can't have been given to another process.
fn terminate(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
}

/// Starts a server in a session of its own, so that the terminal's signals don't reach it.
fn start_server(log: File, id: &str, clone: Option<u32>) -> io::Result<tokio::process::Child> {
    let only = clone.map(|number| format!("--only={number}"));
    let added = ["--serving-detached", "--run-id", id].into_iter().chain(only.as_deref());
    let mut command = again(&added.collect::<Vec<_>>())?;
    command.stderr(log);
    // SAFETY: setsid(2) is async-signal-safe and touches no memory; it is all that
    // runs between fork and exec.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn()
}

/// This program again, with the same arguments except `--detach` and `--json`, and some more.
fn again(added: &[&str]) -> io::Result<tokio::process::Command> {
    let mut before_extra = true;
    let arguments = std::env::args_os().skip(1).filter(|argument| {
        before_extra &= argument != "--";
        !(before_extra && (argument == "--detach" || argument == "--json"))
    });
    let mut arguments: Vec<_> = arguments.collect();
    let extra = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    arguments.splice(extra..extra, added.iter().map(Into::into));
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(command)
}

fn create_log(path: &Path) -> Result<File, Failure> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| Failure::io(&format!("the log `{}` can't be written", path.display()), &e))
}

/// A new file in the directory of this user's reverts.
fn default_log(id: &str) -> Result<PathBuf, Failure> {
    runs::log_of(id).map_err(|(directory, error)| {
        let doing = format!("the log directory `{}` can't be used", directory.display());
        Failure::io(&doing, &error)
    })
}
