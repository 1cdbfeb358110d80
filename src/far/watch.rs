//! Whether a store answers, for whoever has to tell of it and to stop the guest that waits for it.

use tokio::sync::watch::{Receiver, Sender};

use crate::repository::StoreWait;

/// Whether a store answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Answering {
    /// It does, for all that is known.
    #[default]
    Yes,
    /// Requests fail, and are tried again.
    Waiting {
        /// Why the last one failed.
        why: String,
    },
    /// They have been tried for as long as was wanted, and a guest's disk still waits for one.
    GivenUp {
        /// Why the last one failed.
        why: String,
    },
}

/// Notes whether a store answers.
#[derive(Debug)]
pub struct Watch(Sender<Answering>);

impl Default for Watch {
    fn default() -> Watch {
        Watch(Sender::new(Answering::Yes))
    }
}

impl Watch {
    /// Who wants to know of changes.
    pub fn receiver(&self) -> Receiver<Answering> {
        self.0.subscribe()
    }

    /// Notes what requests tell.
    pub fn hear(&self, wait: &StoreWait) {
        match wait {
            StoreWait::StoreWaiting { why, .. } => self.fails(why.clone()),
            StoreWait::StoreBack { .. } => self.answers(),
        }
    }

    /// Notes that a request has failed.
    pub fn fails(&self, why: String) {
        self.change(|now| (*now == Answering::Yes).then_some(Answering::Waiting { why }));
    }

    /// Notes that a request was answered.
    pub fn answers(&self) {
        self.change(|now| (*now != Answering::Yes).then_some(Answering::Yes));
    }

    /// Notes that a disk has waited for as long as it was to.
    pub fn give_up(&self, why: String) {
        let is_new = |now: &Answering| !matches!(now, Answering::GivenUp { .. });
        self.change(|now| is_new(now).then_some(Answering::GivenUp { why }));
    }

    fn change(&self, next: impl FnOnce(&Answering) -> Option<Answering>) {
        self.0.send_if_modified(|now| match next(now) {
            Some(next) => {
                *now = next;
                true
            }
            None => false,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_told() {
        let watch = Watch::default();
        let told = watch.receiver();
        let waiting = StoreWait::StoreWaiting {
            store: "s3://b".into(),
            why: "no route".into(),
            patience_s: 1,
        };
        watch.answers();
        assert!(!told.has_changed().unwrap());
        watch.hear(&waiting);
        assert_eq!(*told.borrow(), Answering::Waiting { why: "no route".into() });
        watch.give_up("late".into());
        // That it is tried again is no news any more.
        watch.hear(&waiting);
        assert_eq!(*told.borrow(), Answering::GivenUp { why: "late".into() });
        watch.hear(&StoreWait::StoreBack { store: "s3://b".into() });
        assert_eq!(*told.borrow(), Answering::Yes);
    }
}
