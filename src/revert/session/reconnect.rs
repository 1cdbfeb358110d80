//! A new stream for a QEMU whose migration was interrupted.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::qemu::INCOMING;
use crate::qmp::{Qmp, QmpError};
use crate::revert::error::RevertError;

/// How long QEMU may take to answer once faults are served again, before it is tried anew.
const REACH_TIMEOUT: Duration = Duration::from_secs(10);

/// How long QEMU may take to notice that its migration was interrupted, on a busy host.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(10);

/// The time between two attempts to give QEMU a new stream.
const RETRY: Duration = Duration::from_millis(250);

/// How often whoever waits for memory is woken while QEMU's own fault handler may have read a
/// fault and be unable to ask for it.
const WAKE_EVERY: Duration = Duration::from_millis(20);

/// A session that began by itself with a QEMU whose channel was lost.
pub(in crate::revert) struct Resuming {
    /// When the session began.
    pub began: Instant,
    /// Gives QEMU a new stream; none once it has ended.
    channel: Option<JoinHandle<Result<Qmp, RevertError>>>,
    /// QEMU's control socket, once it has the stream.
    qmp: Option<Qmp>,
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
        let channel = tokio::spawn(reconnect(monitor, theirs, wake));
        Resuming { began, channel: Some(channel), qmp: None }
    }

    /// Waits until QEMU has the stream. Safe to cancel, and to call again.
    ///
    /// # Errors
    /// When QEMU takes none.
    pub async fn connected(&mut self) -> Result<Option<Qmp>, RevertError> {
        if let Some(channel) = &mut self.channel {
            let ended = channel.await;
            self.channel = None;
            // A task that was ended or panicked has given nothing.
            self.qmp = ended.ok().transpose()?;
        }
        Ok(self.qmp.clone())
    }

    /// Waits until QEMU has refused the stream; for ever, if it takes it. Safe to cancel.
    pub async fn refused(&mut self) -> RevertError {
        match self.connected().await {
            Err(error) => error,
            Ok(_) => std::future::pending().await,
        }
    }
}

impl Drop for Resuming {
    fn drop(&mut self) {
        self.channel.iter().for_each(JoinHandle::abort);
    }
}

/// Has QEMU go on with its migration by `theirs`, however long it takes until it answers.
/// Meanwhile it wakes whoever waits for memory: QEMU's own fault handler may have read a fault,
/// and waits for a stream by which to ask.
async fn reconnect(
    monitor: PathBuf,
    theirs: UnixStream,
    wake: impl Fn() + Send,
) -> Result<Qmp, RevertError> {
    let began = Instant::now();
    let mut told = false;
    let mut tick = tokio::time::interval(WAKE_EVERY);
    loop {
        let attempt = give(&monitor, &theirs);
        tokio::pin!(attempt);
        let error = loop {
            tokio::select! {
                given = &mut attempt => match given {
                    Ok(Ok(qmp)) => return Ok(qmp),
                    Ok(Err(status)) if began.elapsed() > NOTICE_TIMEOUT => {
                        return Err(RevertError::NotInterrupted { status });
                    }
                    Ok(Err(status)) => break format!("its status is `{status}`"),
                    Err(error) => break error.to_string(),
                },
                _ = tick.tick() => wake(),
            }
        };
        if !std::mem::replace(&mut told, true) {
            tracing::info!("the guest is served, but QEMU's migration can't go on yet: {error}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Gives QEMU its end of the stream, or returns the status of a migration that is not one to go on
/// with.
async fn give(monitor: &Path, theirs: &UnixStream) -> Result<Result<Qmp, String>, QmpError> {
    let qmp = Qmp::connect(monitor, REACH_TIMEOUT).await?;
    let status = qmp.migration_info().await?.status.unwrap_or_default();
    if status != "postcopy-paused" {
        return Ok(Err(status));
    }
    qmp.getfd(INCOMING, theirs.as_fd()).await?;
    qmp.migrate_recover(&format!("fd:{INCOMING}")).await?;
    Ok(Ok(qmp))
}
