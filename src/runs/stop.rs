//! A guest is ended together with its server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::left_over::{LeftOverKind, of_run};
use super::{ProcessId, Run, RunsError};
use crate::host::pidfd::Pidfd;

/// How long a process may take to end once it is told to, or killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// What came of stopping a revert.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stopped {
    /// The process of QEMU that was ended; none where it had ended before.
    pub qemu_pid: Option<i32>,
    /// What went with it.
    pub removed: Vec<PathBuf>,
    /// Overlays with what the guest had written: [`left_overs`](super::left_overs) finds them.
    pub kept: Vec<PathBuf>,
}

impl Stopped {
    /// That of a pool's guest, which its daemon has ended with all that it has written.
    pub(crate) fn of_pool(qemu_pid: Option<i32>) -> Stopped {
        Stopped { qemu_pid, removed: Vec::new(), kept: Vec::new() }
    }
}

impl Run {
    /// Ends QEMU, its server and its keeper, and removes what they leave, except for the
    /// overlays of a guest that has run. It blocks for some milliseconds; for up to half a minute
    /// where a server stands still.
    ///
    /// # Errors
    /// When a process can't be ended, or something not be removed.
    pub fn stop(&self) -> Result<Stopped, RunsError> {
        let record = &self.record;
        let mut paths = record.overlays.clone();
        paths.extend(record.sockets.iter().cloned().chain([self.directory()]));
        paths.retain(|path| path.symlink_metadata().is_ok());

        let qemu_pid = end("QEMU", record.qemu, Ending::Kill)?;
        // They end by themselves with their QEMU; before QEMU is up, when they are told to.
        end("its server", record.server_alone(), Ending::Tell)?;
        end("its keeper", record.keeper, Ending::Wait)?;

        let is_overlay = |what| what == LeftOverKind::Overlay;
        let left = of_run(self);
        let keeps = left.iter().any(|left| is_overlay(left.what));
        for left in left {
            // A record leads to the overlays.
            let stays = is_overlay(left.what) || (left.what == LeftOverKind::Record && keeps);
            if !stays {
                left.remove()?;
            }
        }
        let (kept, removed): (Vec<_>, Vec<_>) =
            paths.into_iter().partition(|path| path.symlink_metadata().is_ok());
        let kept = kept.into_iter().filter(|path| record.overlays.contains(path)).collect();
        Ok(Stopped { qemu_pid, removed, kept })
    }
}

/// How a process is ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// It is killed.
    Kill,
    /// It is told to end (SIGTERM), and killed if it doesn't.
    Tell,
    /// It is about to end, and killed if it doesn't.
    Wait,
}

/// Ends a process. Returns its number if it lived.
fn end(
    what: &'static str,
    process: Option<ProcessId>,
    ending: Ending,
) -> Result<Option<i32>, RunsError> {
    let Some(pid) = process.and_then(ProcessId::living) else { return Ok(None) };
    let failed = |source| RunsError::Process { what, pid, source };
    let pidfd = match Pidfd::open(pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // Held by the descriptor now: is it still the same?
    if process.and_then(ProcessId::living).is_none() {
        return Ok(None);
    }
    if ending == Ending::Tell {
        // It fails when the process has ended.
        let _ = pidfd.terminate();
    }
    if ending != Ending::Kill && pidfd.wait_end(PATIENCE) {
        return Ok(Some(pid));
    }
    match pidfd.kill() {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(failed(error)),
        _ => {}
    }
    match pidfd.wait_end(PATIENCE) {
        true => Ok(Some(pid)),
        false => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}
