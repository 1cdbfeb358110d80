//! A store that does not answer while a guest still needs it: that is noted in the session's record, and
//! the guest is stopped once one of its disks has waited for too long.
//!
//! QEMU may carry that out at once and answer only when the disk's request is done: so nobody waits for it.
//! Memory that the guest waits for is told, and the guest stopped for it, by whoever serves memory.

use tokio::sync::watch::Receiver;

use super::halt::Halt;
use crate::far::Answering;
use crate::keeper::Ledger;
use crate::qmp::Qmp;
use crate::revert::event::{OnEvent, RevertEvent};
use crate::runs::{Entry, Notes};

/// What `ps` says that a guest waits for.
const STORE: &str = "store";

/// Hears whether the store of a guest answers.
#[derive(Clone)]
pub(super) struct StoreWatch(Receiver<Answering>);

impl StoreWatch {
    pub fn new(receiver: Receiver<Answering>) -> StoreWatch {
        StoreWatch(receiver)
    }

    /// Waits for a change, for ever if there can be none. Safe to cancel.
    pub async fn changed(&mut self) -> Answering {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.0.borrow_and_update().clone()
    }

    /// As it is now.
    pub fn now(&mut self) -> Answering {
        self.0.borrow_and_update().clone()
    }

    /// Whether requests fail.
    pub fn fails(&self) -> bool {
        *self.0.borrow() != Answering::Yes
    }
}

/// Notes that a store has ceased to answer, or answers again. Returns whether a guest that was stopped for
/// that can run again.
pub(super) fn note(
    answering: Answering,
    halt: &mut Halt,
    (qmp, ledger): (Option<&Qmp>, Option<&Ledger>),
    run: Option<&Entry>,
    on_event: OnEvent<'_>,
) -> bool {
    if let Some(run) = run {
        note_waiting(answering != Answering::Yes, &run.notes());
    }
    match answering {
        Answering::Yes => return halt.is_stopped(ledger),
        Answering::Waiting { .. } => {}
        Answering::GivenUp { why } => {
            if let Some(qmp) = qmp.filter(|_| !halt.is_stopped(ledger)) {
                let (reason, store) = (STORE.to_owned(), Some(why));
                on_event(RevertEvent::Stopped { reason, memory: None, store });
                halt.stop(qmp, ledger);
            }
        }
    }
    false
}

/// Has the record tell whether its guest waits for the store.
pub(super) fn note_waiting(waits: bool, notes: &Notes) {
    let waits_for = waits.then(|| STORE.to_owned());
    notes.note(move |record| record.waits_for = waits_for);
}

/// Waits until a store ceases to answer, or answers again; for ever where there is none.
pub(super) async fn changed(store: &mut Option<StoreWatch>) -> Answering {
    match store {
        Some(store) => store.changed().await,
        None => std::future::pending().await,
    }
}
