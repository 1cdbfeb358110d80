//! Running: the guest runs, its memory follows.

use super::connection::Connection;
use super::lifecycle::Told;
use super::qemu::finish_postcopy;
use super::resident::Resident;
use crate::keeper::Ledger;
use crate::revert::error::RevertError;
use crate::revert::event::{OnEvent, Progress, RevertEvent};
use crate::revert::outcome::Outcome;
use crate::revert::recorded;

/// A guest that runs, or could, and depends on the image being served. Dropping it ends a
/// QEMU of ours.
pub struct Running {
    pub(super) connection: Connection,
}

impl Running {
    /// QEMU's process id, where it is known.
    pub fn pid(&self) -> Option<i32> {
        self.connection.qemu.pid()
    }

    /// How much of its memory is in place.
    pub fn progress(&self) -> Progress {
        self.connection.progress()
    }

    /// Serves the guest until all its memory is in place.
    ///
    /// The first request of the session's cancellation is answered with
    /// [`RevertEvent::StillNeeded`], and memory is filled at full speed; the second ends the
    /// session. Where memory can't be read, the first one ends it as soon as there is nothing
    /// else to be brought.
    ///
    /// # Errors
    /// When memory can't be brought, or the session is cancelled.
    pub async fn fill(self, on_event: OnEvent<'_>) -> Result<Resident, RevertError> {
        let Running { mut connection } = self;
        if let Err(error) = follow(&mut connection, on_event).await {
            return Err(connection.fail(error).await);
        }
        connection.run_again(on_event).await;
        let progress = connection.progress();
        let collapsing = connection.collapsing();
        let placed = connection.placed();
        let preparation = connection.take_preparation();
        let rtc = connection.rtc;
        let disks_ledger = connection.disks_ledger();
        let Connection {
            qemu, lifecycle, image, delivery, cancel, keeper, confinement, run, ..
        } = connection;
        let (placement, faults) = lifecycle.into_result();
        let outcome = Outcome { progress, placement, faults };
        let mut let_go = true;
        if let (Some(qmp), true) = (qemu.last_qmp().await, placement.is_postcopy())
            // QEMU has confirmed that it has all of the guest, which depends on nobody
            // any more: whatever happens from here on, it stays.
            && let Err(error) = finish_postcopy(&qmp, qemu.turned_on()).await
        {
            tracing::warn!("the guest's memory is complete, but QEMU was not tidied up: {error}");
            let_go = false;
        }
        // What is registered while QEMU still has to let go of it would be lost.
        let placed = placed.filter(|_| let_go);
        let reset = preparation.and_then(|preparation| match preparation {
            Ok(preparation) => Some(Ok((placed?, preparation))),
            Err(error) => Some(Err(error)),
        });
        // It needs no successor from here on but for its disks.
        disks_ledger.iter().for_each(Ledger::set_resident);
        let kept = keeper.zip(disks_ledger);
        run.iter().for_each(|run| run.note(|record| record.resident = true));
        on_event(outcome.resident());
        if placement.is_postcopy() {
            recorded::remember(confinement.broker(), &delivery, &image, &outcome);
        }
        Ok(Resident {
            qemu,
            outcome,
            collapsing,
            reset,
            image,
            rtc,
            confinement,
            cancel,
            kept,
            run,
        })
    }
}

/// Follows what brings memory to its end.
async fn follow(connection: &mut Connection, on_event: OnEvent<'_>) -> Result<(), RevertError> {
    let cancel = connection.cancel.clone();
    let mut hurried = false;
    loop {
        tokio::select! {
            // A guest that has all its memory is not given up.
            biased;
            followed = connection.advance(on_event) => return followed,
            () = cancel.requested(), if !hurried => {
                hurried = true;
                connection.hurry();
                connection.lifecycle.hear(Told::Interrupted)?;
                on_event(RevertEvent::StillNeeded);
            }
            () = cancel.requested_times(2) => {
                return Err(RevertError::Interrupted(
                    "the guest was stopped, since its memory was not complete",
                ));
            }
        }
    }
}
