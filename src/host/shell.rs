//! A command of the user's, run by the shell.

use std::ffi::OsString;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use super::pidfd::Pidfd;
use crate::cancel::Cancellation;

/// A command that has been started, or could not be.
pub(crate) struct ShellCommand {
    pub began: Instant,
    child: io::Result<Child>,
    /// A process in a sandbox can signal only what it has a descriptor of.
    shell: Option<Pidfd>,
}

/// Why a command has not done what it was to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShellError {
    /// It could not be started, or not be waited for.
    #[error(transparent)]
    Run(#[from] io::Error),
    /// It has failed.
    #[error("{0}")]
    Failed(ExitStatus),
    /// It was not waited for any longer.
    #[error("interrupted, it was told to end (SIGTERM)")]
    Interrupted,
}

impl ShellCommand {
    /// Starts a command by `sh -c`, with these variables in its environment beside our own.
    pub fn start<'a>(
        command: &str,
        environment: impl IntoIterator<Item = (&'a str, OsString)>,
    ) -> ShellCommand {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(command).stdin(Stdio::null());
        // Standard output is for our events only.
        shell.stdout(io::stderr());
        // A process group of its own, so that whatever the shell starts can be told to end.
        shell.process_group(0);
        shell.envs(environment);
        let child = shell.spawn();
        // It has not been waited for, so the number is its own.
        let shell = child.as_ref().ok().and_then(|child| Pidfd::open(child.id()? as i32).ok());
        ShellCommand { began: Instant::now(), child, shell }
    }

    /// Waits for the command's end. A request of `cancel` ends it (SIGTERM): with all that it has
    /// started, or, where this process is in a sandbox by then, the shell alone.
    ///
    /// # Errors
    /// When it could not be started, fails, or is interrupted.
    pub async fn end(self, cancel: &Cancellation) -> Result<(), ShellError> {
        let ShellCommand { child, shell, .. } = self;
        let mut child = child?;
        tokio::select! {
            ended = child.wait() => match ended? {
                status if status.success() => Ok(()),
                status => Err(ShellError::Failed(status)),
            },
            () = cancel.requested() => {
                // Not reaped yet, so the group's number is still the command's.
                let group = child.id().map(|pid| killpg(Pid::from_raw(pid as i32), Signal::SIGTERM));
                if let (Some(Err(_)), Some(shell)) = (group, shell) {
                    // It may have ended just now.
                    let _ = shell.terminate();
                }
                Err(ShellError::Interrupted)
            }
        }
    }
}
