//! Servers that are copies of this program, whose events are passed on: the one in the background
//! of `revert --detach`, until the guest runs, that of each clone of `revert --count`, and the one of
//! `save --detach`, until the guest can be reset.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::ChildStdout;

use super::failure::{ErrorEvent, Failure};
use super::hook::HookEvent;
use super::identity::Awaited;
use super::output::Output;
use crate::cancel::Cancellation;
use crate::host::program::in_own_session;
use crate::kind::ErrorKind;
use crate::revert::RevertEvent;
use crate::runs::{self, Again};
use crate::save::SaveEvent;

/// The arguments that make this program a server in the background.
const SERVING: &str = "--serving-detached";
const RUN_ID: &str = "--run-id";

/// Starts a server in the background, of a clone by its number where there are several guests, and
/// returns once the guest runs and what is `awaited` beyond that has come.
pub(super) async fn revert(
    log: Option<PathBuf>,
    clone: Option<u32>,
    awaited: Awaited,
    cancel: Cancellation,
    output: Output,
) -> Result<(), Failure> {
    let only = clone.map(|number| format!("--only={number}"));
    let arguments = with(own_arguments(), only.as_deref());
    in_background(arguments, None, log, awaited, cancel, &output).await
}

/// Reverts in the background as another revert was begun, and returns once the guest runs.
pub(super) async fn repeat(
    other: &Again,
    cancel: Cancellation,
    output: &Output,
) -> Result<(), Failure> {
    let arguments = other.arguments.iter().map(OsString::from).collect();
    let awaited = Awaited::default();
    in_background(arguments, Some(&other.directory), None, awaited, cancel, output).await
}

/// How the revert of this process is begun again.
pub(super) fn this() -> io::Result<Again> {
    let mut arguments = own_arguments();
    let extra = arguments.split_off(extra_at(&arguments));
    // What makes it a server in the background.
    arguments.retain(|argument| argument != SERVING);
    if let Some(at) = arguments.iter().position(|argument| argument == RUN_ID) {
        arguments.drain(at..(at + 2).min(arguments.len()));
    }
    let text = |argument: OsString| argument.to_string_lossy().into_owned();
    let arguments = arguments.into_iter().chain(extra).map(text).collect();
    Ok(Again { arguments, directory: std::env::current_dir()? })
}

/// Saves in the background, and returns once the image is whole and the guest can be reset.
pub(super) async fn save(
    log: Option<PathBuf>,
    cancel: Cancellation,
    output: &Output,
) -> Result<(), Failure> {
    let (id, log, server) = start_in_background(own_arguments(), None, log)?;
    let outcome = match server {
        Ok(server) => pass_on_save(server, &cancel, output).await,
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(Some(pid)) => output.detached(pid, id, &log, "tracks what it writes"),
        Ok(None) => {}
        Err(failure) => {
            // All its events have been passed on.
            let _ = std::fs::remove_file(&log);
            return Err(failure);
        }
    }
    Ok(())
}

/// Passes the events of a save on until its guest can be reset. Returns its process id; none where
/// the save has ended since the guest can't be reset after all, which its events have told.
async fn pass_on_save(
    mut server: tokio::process::Child,
    cancel: &Cancellation,
    output: &Output,
) -> Result<Option<u32>, Failure> {
    let mut said = Said::of(&mut server)?;
    while let Some(value) = said.next(cancel).await? {
        if value["event"] == "error" {
            let event: ErrorEvent = serde_json::from_value(value)?;
            let _ = server.wait().await;
            return Err(event.into());
        }
        let event: SaveEvent = serde_json::from_value(value)?;
        output.save(&event);
        if matches!(event, SaveEvent::Resettable { .. }) {
            return Ok(Some(said.pid));
        }
    }
    let status = server.wait().await?;
    match status.success() {
        true => Ok(None),
        false => {
            let message = format!("the save ended before its end was known ({status})");
            Err(Failure::said(ErrorKind::Internal, message))
        }
    }
}

/// Starts a server in the background with the arguments of one in the foreground. Returns its id,
/// its log, and the server.
fn start_in_background(
    arguments: Vec<OsString>,
    directory: Option<&Path>,
    log: Option<PathBuf>,
) -> Result<(String, PathBuf, Result<tokio::process::Child, Failure>), Failure> {
    let id = runs::new_id();
    let log = log.map_or_else(|| default_log(&id), Ok)?;
    let mut command = program(with(arguments, [SERVING, RUN_ID, &id]))?;
    command.stderr(create_log(&log)?);
    directory.map(|directory| command.current_dir(directory));
    // In a session of its own, so that the terminal's signals don't reach it.
    in_own_session(command.as_std_mut());
    let server = command.spawn().map_err(|e| Failure::io("starting the server failed", &e));
    Ok((id, log, server))
}

/// Starts a server in the background with the arguments of one in the foreground, and returns once
/// the guest runs.
async fn in_background(
    arguments: Vec<OsString>,
    directory: Option<&Path>,
    log: Option<PathBuf>,
    awaited: Awaited,
    cancel: Cancellation,
    output: &Output,
) -> Result<(), Failure> {
    let (id, log, server) = start_in_background(arguments, directory, log)?;
    let outcome = match server {
        Ok(server) => pass_on(server, Until::Running(awaited), &cancel, output).await,
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(Server { pid, failed }) => {
            output.detached(pid, id, &log, "fills its memory");
            failed.map_or(Ok(()), Err)
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
    let only = format!("--only={number}");
    let mut command = program(with(own_arguments(), [only.as_str(), "--json"]))?;
    // An interrupt from the terminal reaches it through us alone.
    command.process_group(0).stderr(Stdio::inherit());
    let server = command.spawn().map_err(|e| Failure::io("starting a server failed", &e))?;
    pass_on(server, Until::End, &cancel, &output).await.map(drop)
}

/// How long a server's events are passed on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The guest runs, and this has come beyond that.
    Running(Awaited),
    /// Nobody writes to its output any more.
    End,
}

/// A server that serves its guest.
struct Server {
    /// Its process id.
    pid: u32,
    /// What was to be done for a guest that runs, and failed.
    failed: Option<Failure>,
}

/// Passes the server's events on.
async fn pass_on(
    mut server: tokio::process::Child,
    until: Until,
    cancel: &Cancellation,
    output: &Output,
) -> Result<Server, Failure> {
    let mut said = Said::of(&mut server)?;
    let pid = said.pid;
    let (mut runs, mut has_all, mut failed) = (false, false, None);
    let mut awaited = match until {
        Until::Running(awaited) => awaited,
        Until::End => Awaited::default(),
    };
    while let Some(value) = said.next(cancel).await? {
        if value["event"] == "error" {
            let event: ErrorEvent = serde_json::from_value(value)?;
            let _ = server.wait().await;
            return Err(event.into());
        }
        if value["event"] == "hook" {
            let event: HookEvent = serde_json::from_value(value)?;
            output.hooked(&event);
            awaited.hook = false;
            failed = event.into_failure().or(failed);
        } else {
            let event: RevertEvent = serde_json::from_value(value)?;
            output.revert(&event);
            failed = awaited.hear(&event).or(failed);
            runs |= matches!(event, RevertEvent::Running { .. });
            has_all |= matches!(event, RevertEvent::Resident { .. });
        }
        if until != Until::End && runs && awaited.is_over() {
            return Ok(Server { pid, failed });
        }
    }
    let status = server.wait().await?;
    if has_all {
        return Ok(Server { pid, failed: None });
    }
    let waited = match until {
        Until::Running(_) => "ran",
        Until::End => "had all its memory",
    };
    let message = format!("the server ended before the guest {waited} ({status})");
    Err(Failure::said(ErrorKind::Internal, message))
}

/// The events of a server.
struct Said {
    pid: u32,
    lines: Lines<BufReader<ChildStdout>>,
    /// How often it was told to end.
    interrupts: u32,
}

impl Said {
    fn of(server: &mut tokio::process::Child) -> Result<Said, Failure> {
        let pid = server.id().unwrap_or_default();
        match server.stdout.take() {
            Some(stdout) => Ok(Said { pid, lines: BufReader::new(stdout).lines(), interrupts: 0 }),
            None => Err(Failure::said(ErrorKind::Internal, "the server has no output".into())),
        }
    }

    /// The next one; none where nobody writes to its output any more. It is told to end as often as
    /// we are.
    async fn next(&mut self, cancel: &Cancellation) -> Result<Option<Value>, Failure> {
        loop {
            tokio::select! {
                line = self.lines.next_line() => {
                    let value = line?.as_deref().map(serde_json::from_str).transpose();
                    return Ok(value?);
                }
                () = cancel.requested_times(self.interrupts + 1) => {
                    // Its own events tell how it ends.
                    self.interrupts += 1;
                    terminate(self.pid);
                }
            }
        }
    }
}

/// Cancels the server. It is our child and has not been waited for, so that its process id
/// can't have been given to another process.
fn terminate(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
}

/// The arguments of this process, except `--detach` and `--json`.
fn own_arguments() -> Vec<OsString> {
    let mut before_extra = true;
    let arguments = std::env::args_os().skip(1).filter(|argument| {
        before_extra &= argument != "--";
        !(before_extra && (argument == "--detach" || argument == "--json"))
    });
    arguments.collect()
}

/// Where the arguments for QEMU begin.
fn extra_at(arguments: &[OsString]) -> usize {
    arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len())
}

/// Some more arguments, ahead of those for QEMU.
fn with<'a>(
    mut arguments: Vec<OsString>,
    added: impl IntoIterator<Item = &'a str>,
) -> Vec<OsString> {
    let extra = extra_at(&arguments);
    arguments.splice(extra..extra, added.into_iter().map(OsString::from));
    arguments
}

/// This program with these arguments. What it prints is passed on.
fn program(arguments: Vec<OsString>) -> io::Result<tokio::process::Command> {
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
