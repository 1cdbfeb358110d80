//! A guest is taken back to its image by its server.

use std::io;

use super::run::of_qemu;
use super::{Run, RunsError};
use crate::reset::{Request, ResetOutcome, SOCKET, ask};

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
    match run.ask(Request::LetGo).await {
        Ok(_) | Err(RunsError::NotTracked { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn tracked(qemu: i32) -> Option<Run> {
    of_qemu(qemu).ok()?.filter(Run::is_tracked)
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

    async fn ask(&self, request: Request) -> Result<ResetOutcome, RunsError> {
        let path = self.directory().join(SOCKET);
        ask(&path, request).await.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                RunsError::NotTracked { id: self.id.clone() }
            }
            _ => RunsError::Asking { id: self.id.clone(), source },
        })
    }
}
