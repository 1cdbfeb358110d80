//! A guest is taken back to its image by its server.

use std::io;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::run::of_qemu;
use super::{ProcessId, Run, RunsError};
use crate::reset::{Request, ResetOutcome, SOCKET, Tracked, ask};

/// How long a server may take to answer a save, for which the guest may stand still.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long one may take to end that is being killed: the kernel walks over what it has protected.
const LAST_BREATH: Duration = Duration::from_millis(200);

/// Whether the writes of the guest in this QEMU are tracked: nobody else can write-protect its
/// memory meanwhile.
pub(crate) fn is_tracked(qemu: i32) -> bool {
    tracked(qemu).is_some()
}

/// Has the writes of the guest in this QEMU be tracked no more, if they are: somebody else is about
/// to write-protect its memory. It can't be reset inside its QEMU from then on.
///
/// # Errors
/// When whoever tracks them does not answer.
pub(crate) async fn stop_tracking(qemu: i32) -> Result<(), RunsError> {
    let Some(run) = tracked(qemu) else { return Ok(()) };
    match run.ask::<ResetOutcome>(Request::LetGo).await {
        Ok(_) | Err(RunsError::NotTracked { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn tracked(qemu: i32) -> Option<Run> {
    of_qemu(qemu).ok()?.filter(Run::is_tracked)
}

/// A server that tracks a guest's writes, and what it has told.
pub(crate) struct Tracking {
    run: Run,
    pub what: Tracked,
}

impl Tracking {
    /// Asks whoever tracks the writes of the guest in this QEMU what is tracked. None where nobody
    /// does, or the server doesn't tell.
    pub async fn of(qemu: i32) -> Option<Tracking> {
        let run = tracked(qemu)?;
        let told = tokio::time::timeout(PATIENCE, run.ask(Request::Tell)).await;
        told.ok()?.ok().map(|what| Tracking { run, what })
    }

    /// Has that server track no more. True where it has tracked the guest all the time since it was
    /// asked. False where it had ended before: then others may have tracked the guest meanwhile, and what
    /// is protected says nothing.
    ///
    /// # Errors
    /// When the server is there, and does not answer.
    pub async fn end(&self) -> Result<bool, RunsError> {
        let asked = tokio::time::timeout(PATIENCE, self.run.ask(Request::LetGo)).await;
        match asked {
            Ok(Ok(ResetOutcome::Done { .. })) => Ok(true),
            Ok(Ok(_) | Err(_)) => {
                self.wait_ended().await;
                Ok(false)
            }
            Err(_) => Err(RunsError::Asking {
                id: self.run.id.clone(),
                source: io::ErrorKind::TimedOut.into(),
            }),
        }
    }

    /// Waits for a moment for the end of a server that is being killed: its socket closes before its
    /// userfaultfd does, and with that goes the protection.
    async fn wait_ended(&self) {
        let until = Instant::now() + LAST_BREATH;
        while self.run.server().is_some() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Run {
    /// Takes the guest back to its image inside its QEMU. What it has written since is gone.
    ///
    /// # Errors
    /// When nobody tracks its writes: it was not started as one to be reset, is not resident yet, or
    /// its server was killed.
    pub async fn reset(&self) -> Result<ResetOutcome, RunsError> {
        self.ask(Request::Reset).await
    }

    /// Its server's process, as long as it lives.
    fn server(&self) -> Option<i32> {
        self.record.server.and_then(ProcessId::living)
    }

    fn is_tracked(&self) -> bool {
        self.directory().join(SOCKET).exists()
    }

    async fn ask<T: DeserializeOwned>(&self, request: Request) -> Result<T, RunsError> {
        let path = self.directory().join(SOCKET);
        ask(&path, request).await.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                RunsError::NotTracked { id: self.id.clone() }
            }
            _ => RunsError::Asking { id: self.id.clone(), source },
        })
    }
}
