//! Resident: all memory is in place, and the guest depends on nobody.

use std::sync::Arc;

use tokio::sync::watch::Receiver;

use super::away::{self, StoreWatch};
use super::confined::Confinement;
use super::halt::Halt;
use super::preparation::{Placed, Preparation};
use super::qemu::Qemu;
use crate::cancel::Cancellation;
use crate::far::Answering;
use crate::guest::Process;
use crate::host::pidfd::Pidfd;
use crate::image::Image;
use crate::keeper::{Keeper, Ledger};
use crate::qmp::Qmp;
use crate::reset::ResetError;
use crate::revert::collapse::{Collapsing, collapse};
use crate::revert::event::{OnEvent, RevertEvent};
use crate::revert::outcome::Outcome;
use crate::revert::rtc::Rtc;
use crate::runs::Entry;

/// A guest that has all its memory. Dropping it ends a QEMU of ours: take it out with
/// [`into_held`](Resident::into_held) to let it live on.
pub struct Resident {
    pub(super) qemu: Qemu,
    pub(super) outcome: Outcome,
    /// Nothing where its memory is left as it came, or has been collapsed.
    pub(super) collapsing: Option<Collapsing>,
    /// What a reset inside its QEMU needs; none where that was not asked for.
    pub(super) reset: Option<Result<(Placed, Preparation), ResetError>>,
    pub(super) image: Arc<Image>,
    pub(super) rtc: Rtc,
    pub(super) confinement: Confinement,
    pub(super) cancel: Cancellation,
    /// What a successor needs where its disks follow, until they have.
    pub(super) kept: Option<(Keeper, Ledger)>,
    /// The session's record, which goes with it.
    pub(super) run: Option<Entry>,
}

/// A guest that has been brought back and is still its owner's: QEMU ends when this is
/// dropped.
#[derive(Debug)]
#[non_exhaustive]
pub struct Held {
    /// QEMU's process.
    pub(crate) process: Process,
    /// QEMU's control socket.
    pub(crate) qmp: Qmp,
    /// How its memory came.
    pub outcome: Outcome,
}

impl Held {
    /// QEMU's process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Ends QEMU. Overlays of its disks stay, unless they are ephemeral.
    pub async fn end(mut self) {
        self.process.kill().await;
    }

    /// Lets QEMU live on by itself; returns its process id.
    pub fn detach(mut self) -> i32 {
        self.process.detach();
        self.process.pid()
    }
}

impl Resident {
    /// Waits until its QEMU has ended, where that is one that we have started. Safe to cancel.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.qemu.ended()
    }

    /// QEMU's monitor, where it is ours, or was of a process whose place we have taken.
    pub(in crate::revert) async fn monitor(&self) -> Option<Qmp> {
        self.qemu.last_qmp().await
    }

    /// Waits for `work` of QEMU's on disks that are still in a repository. Meanwhile the guest is stopped
    /// while a disk waits for too long, and runs again when the store answers.
    pub(in crate::revert) async fn while_disks_follow<T>(
        &self,
        qmp: &Qmp,
        answering: Receiver<Answering>,
        work: impl Future<Output = T>,
        on_event: OnEvent<'_>,
    ) -> T {
        let ledger = self.kept.as_ref().map(|(_, ledger)| ledger);
        let (mut store, mut halt) = (StoreWatch::new(answering), Halt::default());
        let mut answering = Some(store.now());
        tokio::pin!(work);
        loop {
            if let Some(answering) = answering.take() {
                let qemu = (Some(qmp), ledger);
                let can_run = away::note(answering, &mut halt, qemu, self.run.as_ref(), on_event);
                if can_run {
                    on_event(RevertEvent::Repaired);
                    if let Err(error) = halt.run(qmp, ledger).await {
                        let what = "the guest was stopped, and may stand still".to_owned();
                        on_event(RevertEvent::Note { what, why: error.to_string() });
                    }
                }
            }
            tokio::select! {
                biased;
                done = &mut work => return done,
                changed = store.changed() => answering = Some(changed),
            }
        }
    }

    /// Its disks have followed: it depends on nobody any more.
    pub(in crate::revert) fn has_disks(&mut self) {
        self.kept = None;
    }

    /// How its memory came.
    pub fn outcome(&self) -> &Outcome {
        &self.outcome
    }

    /// Collapses its memory into huge pages, if [`Delivery::collapse`] is set and the memory was
    /// installed directly, and tells it by [`RevertEvent::Collapsed`]. Nothing of it is needed
    /// by the guest, which runs meanwhile; a request of the session's cancellation ends it, as
    /// does dropping the future.
    ///
    /// [`Delivery::collapse`]: crate::revert::Delivery::collapse
    pub async fn collapse(&mut self, on_event: OnEvent<'_>) {
        let Some(collapsing) = self.collapsing.take() else { return };
        let cancel = CancelOnDrop(self.cancel.child());
        let cancelled = cancel.0.clone();
        let confinement = std::mem::take(&mut self.confinement);
        let work = tokio::task::spawn_blocking(move || match confinement.broker() {
            Some(broker) => collapsing.run(|stretch| broker.collapse(stretch), &cancelled),
            None => {
                // There is none where QEMU has ended.
                let process = Pidfd::open(collapsing.pid).ok()?;
                collapsing.run(|stretch| collapse(&process, stretch), &cancelled)
            }
        });
        match work.await {
            Ok(event) => event.map_or((), on_event),
            // The guest needs nothing of it, but a fault of ours is not to be hidden.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => {}
        }
    }

    /// The QEMU that we have started for it; nothing where somebody else, such as libvirt, has.
    pub fn into_held(self) -> Option<Held> {
        match self.qemu {
            Qemu::Ours { process, qmp, .. } => Some(Held { process, qmp, outcome: self.outcome }),
            Qemu::Domain { .. } | Qemu::Theirs { .. } | Qemu::Adopted(_) => None,
        }
    }

    /// Lets QEMU live on, whoever has started it; returns its process id, where it is known.
    pub fn let_go(self) -> (Option<i32>, Outcome) {
        let pid = self.qemu.pid();
        match self.qemu {
            Qemu::Ours { mut process, .. } => process.detach(),
            Qemu::Domain { mut domain, .. } => domain.let_go(),
            Qemu::Adopted(mut qemu) => qemu.let_go(),
            Qemu::Theirs { .. } => {}
        }
        (pid, self.outcome)
    }
}

/// Ends blocking work whose result nobody awaits any more.
struct CancelOnDrop(Cancellation);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.request();
    }
}
