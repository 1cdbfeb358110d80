//! Commands of the user's that are run by the shell when something has happened: at the moment of a
//! save, or once a reverted guest runs.

use std::ffi::OsString;
use std::fmt::Display;
use std::io;
use std::process::Stdio;
use std::time::Instant;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use super::failure::Failure;
use crate::cancel::Cancellation;
use crate::host::pidfd::Pidfd;
use crate::kind::ErrorKind;

/// A command to be run, once.
pub(super) struct Hook {
    flag: &'static str,
    command: String,
    /// What is not affected when it fails, in words.
    whatever: &'static str,
}

impl Hook {
    /// The command that was given with this flag. Messages of its failure end with `whatever`.
    pub fn new(flag: &'static str, command: String, whatever: &'static str) -> Hook {
        Hook { flag, command, whatever }
    }

    /// Starts it.
    pub fn start<'a>(self, env: impl IntoIterator<Item = (&'a str, OsString)>) -> RunningHook {
        let mut command = Command::new("sh");
        command.arg("-c").arg(&self.command).stdin(Stdio::null());
        // Standard output is for our events only.
        command.stdout(io::stderr());
        // A process group of its own, so that whatever the shell starts can be told to end.
        command.process_group(0);
        command.envs(env);
        let child = command.spawn();
        // It has not been waited for, so the number is its own.
        let shell = child.as_ref().ok().and_then(|child| Pidfd::open(child.id()? as i32).ok());
        RunningHook { hook: self, began: Instant::now(), child, shell }
    }
}

/// A command that has been started, or could not be.
pub(super) struct RunningHook {
    hook: Hook,
    began: Instant,
    child: io::Result<Child>,
    /// A process in a sandbox can signal only what it has a descriptor of.
    shell: Option<Pidfd>,
}

impl RunningHook {
    /// Waits for the command's end. An interrupt ends it (SIGTERM): with all that it has started,
    /// or, where this process is in a sandbox by then, the shell alone.
    pub async fn end(self, cancel: Cancellation) -> Result<(), Failure> {
        let RunningHook { hook, child, shell, .. } = self;
        let mut child = child.map_err(|error| hook.failed(ErrorKind::HookFailed, &error))?;
        tokio::select! {
            ended = child.wait() => match ended {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(hook.failed(ErrorKind::HookFailed, &status)),
                Err(error) => Err(hook.failed(ErrorKind::HookFailed, &error)),
            },
            () = cancel.requested() => {
                // Not reaped yet, so the group's number is still the command's.
                let group = child.id().map(|pid| killpg(Pid::from_raw(pid as i32), Signal::SIGTERM));
                if let (Some(Err(_)), Some(shell)) = (group, shell) {
                    // It may have ended just now.
                    let _ = shell.terminate();
                }
                let why = "interrupted, it was told to end (SIGTERM)";
                Err(hook.failed(ErrorKind::Interrupted, &why))
            }
        }
    }

    /// Waits for the command's end, as [`end`](RunningHook::end) does, and tells it as an event.
    pub async fn end_told(
        self,
        cancel: Cancellation,
        tell: impl FnOnce(HookEvent),
    ) -> Result<(), Failure> {
        let began = self.began;
        let ended = self.end(cancel).await;
        let failed = ended.as_ref().err().map(Failure::message);
        tell(HookEvent { failed, took_ms: began.elapsed().as_secs_f64() * 1e3 });
        ended
    }
}

impl Hook {
    fn failed(&self, kind: ErrorKind, why: &dyn Display) -> Failure {
        let Hook { flag, command, whatever } = self;
        Failure::said(kind, format!("{flag} `{command}`: {why}; {whatever}"))
    }
}

/// The command that was to be run once the guest ran has ended.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename = "hook")]
pub(super) struct HookEvent {
    /// What failed; none where it ended well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// How long it ran, in milliseconds.
    pub took_ms: f64,
}

impl HookEvent {
    /// The failure that it tells.
    pub fn into_failure(self) -> Option<Failure> {
        self.failed.map(|message| Failure::said(ErrorKind::HookFailed, message))
    }
}
