//! A new stream for a QEMU whose migration was interrupted.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::qemu::INCOMING;
use crate::qmp::{Qmp, QmpError};

/// How long QEMU may take to answer once faults are served again, before it is tried anew.
const REACH_TIMEOUT: Duration = Duration::from_secs(10);

/// The time between two attempts to give QEMU a new stream.
const RETRY: Duration = Duration::from_millis(250);

/// How often whoever waits for memory is woken while QEMU's own fault handler may have read a
/// fault and be unable to ask for it.
const WAKE_EVERY: Duration = Duration::from_millis(20);

/// A session that began by itself with a QEMU whose channel was lost.
pub(super) struct Resuming {
    /// When the session began.
    pub began: Instant,
    /// Gives QEMU a new stream, and returns its control socket then.
    channel: JoinHandle<Qmp>,
}

impl Resuming {
    /// Begins to give QEMU, whose control socket is `monitor`, the other end of our stream. `wake`
    /// wakes whoever waits for memory.
    pub fn start(
        began: Instant,
        monitor: PathBuf,
        theirs: UnixStream,
        wake: impl Fn() + Send + 'static,
    ) -> Resuming {
        Resuming { began, channel: tokio::spawn(reconnect(monitor, theirs, wake)) }
    }

    /// Waits for QEMU's control socket; nothing where the task has been ended.
    pub async fn qmp(&mut self) -> Option<Qmp> {
        (&mut self.channel).await.ok()
    }
}

impl Drop for Resuming {
    fn drop(&mut self) {
        self.channel.abort();
    }
}

/// Has QEMU go on with its migration by `theirs`, however long it takes until it answers.
/// Meanwhile it wakes whoever waits for memory: QEMU's own fault handler may have read a fault,
/// and waits for a stream by which to ask.
async fn reconnect(monitor: PathBuf, theirs: UnixStream, wake: impl Fn() + Send) -> Qmp {
    let mut told = false;
    let mut tick = tokio::time::interval(WAKE_EVERY);
    loop {
        let attempt = give(&monitor, &theirs);
        tokio::pin!(attempt);
        let error = loop {
            tokio::select! {
                given = &mut attempt => match given {
                    Ok(qmp) => return qmp,
                    Err(error) => break error,
                },
                _ = tick.tick() => wake(),
            }
        };
        if !std::mem::replace(&mut told, true) {
            tracing::warn!("the guest is served, but QEMU's migration can't go on yet: {error}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn give(monitor: &Path, theirs: &UnixStream) -> Result<Qmp, QmpError> {
    let qmp = Qmp::connect(monitor, REACH_TIMEOUT).await?;
    qmp.getfd(INCOMING, theirs.as_fd()).await?;
    qmp.migrate_recover(&format!("fd:{INCOMING}")).await?;
    Ok(qmp)
}
