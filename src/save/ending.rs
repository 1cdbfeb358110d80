//! The end of a migration: waited for, or brought about.

use std::time::Duration;

use tokio::sync::oneshot::error::TryRecvError;

use super::checks::Checked;
use super::receive::Receiving;
use super::{OUTGOING, SaveError, SaveEvent};
use crate::cancel::Cancellation;
use crate::qmp::Qmp;

/// How long QEMU may take to end a migration that it has been told to end, or whose
/// stream it has closed.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Ends a migration and its stream, so that QEMU holds nothing of the guest any more.
/// Returns the error that led here, or a worse one.
pub(super) async fn end(
    qmp: &Qmp,
    error: SaveError,
    checked: &Checked,
    mut receiving: Receiving,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(SaveEvent),
) -> SaveError {
    receiving.give_up();
    // Nothing is sent to this; it closes with the stream.
    let sent_all = receiving.ended.try_recv() == Err(TryRecvError::Closed);
    if checked.must_drain && !sent_all {
        on_event(SaveEvent::Draining);
    }
    let end = async {
        // A migration that was never begun has left QEMU its end under its name. In all
        // other cases there is no such name.
        let _ = qmp.closefd(OUTGOING).await;
        if !checked.must_drain {
            cancel_migration(qmp).await;
        }
        if !sent_all {
            // It fails when the stream has ended, as it is to.
            let _ = receiving.ended.await;
        }
        let _ = wait_end(qmp).await;
    };
    tokio::select! {
        () = end => error,
        () = cancel.requested_times(2) => SaveError::InterruptedTwice,
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

/// Ends a migration under way and waits until it has ended, so that the guest's
/// memory is no longer write-protected. An error means that QEMU is gone.
async fn cancel_migration(qmp: &Qmp) {
    if qmp.migrate_cancel().await.is_ok() {
        let _ = wait_end(qmp).await;
    }
}
