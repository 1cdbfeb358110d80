//! What a fork tells while it goes on.

use std::time::Duration;

use crate::revert::RevertEvent;
use crate::save::SaveEvent;

/// What happens during a fork.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ForkEvent {
    /// To the guest that is forked.
    Save(SaveEvent),
    /// To one of its clones.
    Clone {
        /// Which one.
        index: usize,
        /// Time since the moment was known; zero before.
        since_moment: Duration,
        /// What.
        event: RevertEvent,
    },
}
