//! A guest that waits for memory that can't be read is stopped as a whole, if QEMU can do that.
//!
//! The thread that needs the memory waits in its fault whatever we do. QEMU's `stop` keeps other
//! virtual processors from going on without it, and the guest's clock from running. QEMU may not be
//! able to carry it out, or even to answer, before that thread goes on: so nobody waits for it.

use std::time::Duration;

use crate::keeper::Ledger;
use crate::qmp::{Events, Qmp, QmpError};

/// Whether QEMU has been told to stop the guest.
#[derive(Default)]
pub(super) struct Halt {
    /// What QEMU has told since then; none where a predecessor of this process told it.
    since: Option<Events>,
}

impl Halt {
    /// Has QEMU stop the guest, as soon as it can.
    pub fn stop(&mut self, qmp: &Qmp, ledger: Option<&Ledger>) {
        if self.since.is_some() {
            return;
        }
        self.since = Some(qmp.events());
        ledger.iter().for_each(|ledger| ledger.set_halted(true));
        let qmp = qmp.clone();
        tokio::spawn(async move {
            if let Err(error) = qmp.stop().await {
                tracing::info!("QEMU has not stopped the guest so far: {error}");
            }
        });
    }

    /// Whether QEMU was told to, by this process or a predecessor.
    pub fn is_stopped(&self, ledger: Option<&Ledger>) -> bool {
        self.since.is_some() || ledger.is_some_and(Ledger::is_halted)
    }

    /// Has QEMU run the guest again, if it was we who had it stopped.
    ///
    /// # Errors
    /// When QEMU does not answer or refuses; it can be tried again.
    pub async fn run(&mut self, qmp: &Qmp, ledger: Option<&Ledger>) -> Result<(), QmpError> {
        // Answered behind `stop`: the event that belongs to that has come by then.
        qmp.status().await?;
        let stopped = match &mut self.since {
            Some(since) => has_stopped(since).await,
            None => true,
        };
        if stopped {
            qmp.cont().await?;
        }
        self.since = None;
        ledger.iter().for_each(|ledger| ledger.set_halted(false));
        Ok(())
    }
}

/// Whether the guest has been stopped, by the events that have come so far. One that stood still
/// before is not.
async fn has_stopped(events: &mut Events) -> bool {
    let look = async {
        loop {
            match events.next().await {
                Ok(event) if event.name == "STOP" => return true,
                Ok(_) => {}
                // It may be among those that are lost.
                Err(QmpError::EventsLost(_)) => return true,
                Err(_) => return false,
            }
        }
    };
    tokio::time::timeout(Duration::ZERO, look).await == Ok(true)
}
