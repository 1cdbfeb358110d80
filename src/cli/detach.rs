//! `revert --detach`: the work is done by a copy of this program in the background,
//! whose events are passed on until the guest runs.

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

/// Starts the server, of a clone by its number where there are several guests, and returns once
/// the guest runs.
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
        Ok(server) => pass_on(server, &cancel, &output).await,
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

/// Passes the server's events on until the guest runs; returns its process id.
async fn pass_on(
    mut server: tokio::process::Child,
    cancel: &Cancellation,
    output: &Output,
) -> Result<u32, Failure> {
    let pid = server.id().unwrap_or_default();
    let Some(stdout) = server.stdout.take() else {
        return Err(Failure::said(ErrorKind::Internal, "the server has no output".into()));
    };
    let mut interrupted = false;
    let mut lines = BufReader::new(stdout).lines();
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line?,
            () = cancel.requested(), if !interrupted => {
                // The server's own events tell how it ends.
                interrupted = true;
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
        if matches!(event, RevertEvent::Running { .. }) {
            return Ok(pid);
        }
    }
    let status = server.wait().await?;
    let message = format!("the server ended before the guest ran ({status})");
    Err(Failure::said(ErrorKind::Internal, message))
}

/// Cancels the server. It is our child and has not been waited for, so that its process id
/// can't have been given to another process.
fn terminate(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
}

/// Starts this program again, with the same arguments except `--detach`, in a session of its
/// own so that the terminal's signals don't reach it.
fn start_server(log: File, id: &str, clone: Option<u32>) -> io::Result<tokio::process::Child> {
    let mut before_extra = true;
    let arguments = std::env::args_os().skip(1).filter(|argument| {
        before_extra &= argument != "--";
        !(before_extra && argument == "--detach")
    });
    let mut arguments: Vec<_> = arguments.collect();
    let extra = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let only = clone.map(|number| format!("--only={number}"));
    let added = ["--serving-detached", "--run-id", id].into_iter().chain(only.as_deref());
    arguments.splice(extra..extra, added.map(Into::into));
    let mut command = tokio::process::Command::new(std::env::current_exe()?);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    // SAFETY: setsid(2) is async-signal-safe and touches no memory; it is all that
    // runs between fork and exec.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
    }
    command.spawn()
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
