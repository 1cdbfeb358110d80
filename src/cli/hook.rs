//! Commands of the user's that are run by the shell when something has happened: at the moment of a
//! save, or once a reverted guest runs.

use std::ffi::OsString;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::cancel::Cancellation;
use crate::host::shell::{ShellCommand, ShellError};
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
        let started = ShellCommand::start(&self.command, env);
        RunningHook { hook: self, started }
    }
}

/// A command that has been started, or could not be.
pub(super) struct RunningHook {
    hook: Hook,
    started: ShellCommand,
}

impl RunningHook {
    /// Waits for the command's end. An interrupt ends it.
    pub async fn end(self, cancel: Cancellation) -> Result<(), Failure> {
        let RunningHook { hook: Hook { flag, command, whatever }, started } = self;
        started.end(&cancel).await.map_err(|error| {
            let kind = match error {
                ShellError::Interrupted => ErrorKind::Interrupted,
                _ => ErrorKind::HookFailed,
            };
            Failure::said(kind, format!("{flag} `{command}`: {error}; {whatever}"))
        })
    }

    /// Waits for the command's end, as [`end`](RunningHook::end) does, and tells it as an event.
    pub async fn end_told(
        self,
        cancel: Cancellation,
        tell: impl FnOnce(HookEvent),
    ) -> Result<(), Failure> {
        let began = self.started.began;
        let ended = self.end(cancel).await;
        let failed = ended.as_ref().err().map(Failure::message);
        tell(HookEvent { failed, took_ms: began.elapsed().as_secs_f64() * 1e3 });
        ended
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
