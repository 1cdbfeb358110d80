//! A guest is taken back to its image by its server.

use std::io;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::run::of_qemu;
use super::{Run, RunsError};
use crate::host::procfs::Mapping;
use crate::host::uffd::Uffd;
use crate::reset::{Request, ResetOutcome, SOCKET, Tracked, ask};

/// How long a server may take to answer a save, for which the guest may stand still.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long what a server has protected may stay so once it is being killed: its threads end one after the
/// other, and then the kernel walks over that memory.
const LAST_BREATH: Duration = Duration::from_secs(5);

/// How often it is looked whether it still is.
const LOOK_EVERY: Duration = Duration::from_millis(5);

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
        Ok(_) => Ok(()),
        Err(RunsError::NotTracked { .. }) => {
            wait_unprotected(qemu).await;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Waits until nothing of the guest's memory is protected by a server that has ended, or is about to: its
/// socket closes before its userfaultfd does, and with that goes the protection.
async fn wait_unprotected(qemu: i32) {
    let until = Instant::now() + LAST_BREATH;
    while is_protected(qemu) && Instant::now() < until {
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether memory of a QEMU is protected, and not by itself.
fn is_protected(qemu: i32) -> bool {
    let protected = |mapping: &Mapping| mapping.has_flag(*b"uw");
    Mapping::all_of_in_detail(qemu).is_ok_and(|all| all.iter().any(protected))
        && Uffd::number_of(qemu).is_ok_and(|own| own == 0)
}

fn tracked(qemu: i32) -> Option<Run> {
    of_qemu(qemu).ok()?.filter(Run::is_tracked)
}

/// A server that tracks a guest's writes, and what it has told.
pub(crate) struct Tracking {
    qemu: i32,
    run: Run,
    pub what: Tracked,
}

impl Tracking {
    /// Asks whoever tracks the writes of the guest in this QEMU what is tracked. None where nobody
    /// does, or the server doesn't tell.
    pub async fn of(qemu: i32) -> Option<Tracking> {
        let run = tracked(qemu)?;
        let told = tokio::time::timeout(PATIENCE, run.ask(Request::Tell)).await;
        told.ok()?.ok().map(|what| Tracking { qemu, run, what })
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
                wait_unprotected(self.qemu).await;
                Ok(false)
            }
            Err(_) => Err(RunsError::Asking {
                id: self.run.id.clone(),
                source: io::ErrorKind::TimedOut.into(),
            }),
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
