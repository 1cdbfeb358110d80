//! QEMU's side of a save: the migration into a socket of ours, from its beginning to its end.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};

use super::error::SaveError;
use super::receive::Receiving;
use super::release::while_releasing;
use crate::qmp::Qmp;

/// The name under which QEMU is given its end of the migration stream.
const OUTGOING: &str = "snapback-outgoing";

/// Room that is asked for in the socket between QEMU and us, in bytes: some milliseconds'
/// worth of pages, so that QEMU does not wait whenever our thread is not running.
const SOCKET_BYTES: usize = 1 << 20;

/// How long QEMU may take to end a migration that it has been told to end, or whose
/// stream it has closed.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the first page of a migration may take that QEMU may have been told to begin, once it
/// can't be asked any more: far longer than its set-up, some milliseconds a GiB.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Gives QEMU one end of a new socket for its migration stream, and returns the other.
pub(super) async fn open_stream(qmp: &Qmp) -> Result<UnixStream, SaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
    // More than the system's limit is given to root only (socket(7)). Less does as well.
    let _ = setsockopt(&theirs, SndBuf, &SOCKET_BYTES);
    let _ = setsockopt(&theirs, SndBufForce, &SOCKET_BYTES);
    qmp.getfd(OUTGOING, theirs.as_fd()).await?;
    // `theirs` is closed here, so that only QEMU holds that end: when QEMU closes it, the
    // stream is over.
    Ok(ours)
}

/// Begins the migration into the socket of [`open_stream`].
pub(super) async fn begin(qmp: &Qmp) -> Result<(), SaveError> {
    Ok(qmp.migrate(&format!("fd:{OUTGOING}")).await?)
}

/// Ends the migration and its stream, so that QEMU holds nothing of the guest any more. A
/// QEMU that has to be `drained`, whose process that is, is not told to cancel: it sends all memory
/// first, and leaves memory write-protected if it can't. Whether QEMU has been told to begin is
/// `begun`.
pub(super) async fn end(qmp: &Qmp, mut receiving: Receiving, drained: Option<i32>, begun: bool) {
    // The name exists only if the migration was never begun; QEMU still holds its end then.
    let _ = qmp.closefd(OUTGOING).await;
    if drained.is_none() && qmp.migrate_cancel().await.is_ok() {
        // Until then the guest's memory is write-protected.
        let _ = wait_end(qmp).await;
    }
    if qmp.ended().is_some() {
        // QEMU can't be told any more to let go of a stream that it does not send.
        receiving.end_unless_begun(if begun { BEGIN_TIMEOUT } else { Duration::ZERO }).await;
    }
    receiving.ended().await;
    if let Err(error) = while_releasing(drained, wait_end(qmp)).await {
        tracing::warn!("the guest's memory may still be write-protected: {error}");
    }
}

/// Waits until QEMU's migration is over, however it has ended: nothing more of it is needed.
pub(super) async fn wait_over(qmp: &Qmp) -> Result<(), SaveError> {
    match wait_end(qmp).await {
        Err(SaveError::Migration { status, .. }) if status == "cancelled" || status == "failed" => {
            Ok(())
        }
        ended => ended,
    }
}

/// Waits until QEMU's migration is over, and says how it ended.
pub(super) async fn wait_end(qmp: &Qmp) -> Result<(), SaveError> {
    let deadline = tokio::time::Instant::now() + END_TIMEOUT;
    loop {
        let info = qmp.migration_info().await?;
        let status = info.status.unwrap_or_default();
        match status.as_str() {
            "completed" => return Ok(()),
            "setup" | "active" | "device" | "cancelling"
                if tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            _ => {
                return Err(SaveError::Migration { status, reason: info.error_desc });
            }
        }
    }
}
