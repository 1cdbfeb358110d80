//! Memory that can't be read at present, and how that is told.
//!
//! Nobody gets a wrong page: one that can't be read stays absent. What waits for it, a thread of
//! QEMU's, goes on waiting in its fault. Whether that is the end is for others to decide: where
//! somebody listens ([`Memory::telling`](super::Memory::telling)), everything else goes on, and
//! [`repair`](super::repair()) tries again; where nobody does, it is an error.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::MemoryError;
use crate::page::Run;

/// Pages of which it is told that they can't be read, at most. What the guest waits for is
/// always told.
const MOST_TOLD: usize = 100;

/// That memory can't be read, or can again.
#[derive(Debug)]
pub enum Unreadable {
    /// Memory that nobody has asked for can't be read.
    PassedOver(MemoryError),
    /// The guest waits for memory that can't be read.
    Awaited(MemoryError),
    /// All that the guest waited for is in place.
    Over,
}

/// Who is told, and what has been.
pub(super) struct Listener {
    tell: Box<dyn Fn(Unreadable) + Send + Sync>,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    /// Whether the guest waits for something that can't be read.
    awaited: bool,
    /// Where memory can't be read, and whether it is awaited there.
    places: HashSet<(String, u64, bool)>,
}

impl Told {
    /// Adds the place of an error; false where it was there.
    fn add(&mut self, error: &MemoryError, awaited: bool) -> bool {
        match error {
            MemoryError::Source { block, offset, .. } => {
                self.places.insert((block.clone(), *offset, awaited))
            }
            _ => true,
        }
    }
}

impl Listener {
    pub fn new(tell: impl Fn(Unreadable) + Send + Sync + 'static) -> Listener {
        Listener { tell: Box::new(tell), told: Mutex::default() }
    }

    /// Tells once of each place that memory there can't be read.
    pub fn passed_over(&self, error: MemoryError) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.places.len() < MOST_TOLD && told.add(&error, false) {
            (self.tell)(Unreadable::PassedOver(error));
        }
    }

    /// Notes by `note` that the guest waits, and tells it once of each place.
    pub fn awaited(&self, error: MemoryError, note: impl FnOnce()) {
        // The lock keeps what is told in the order of what has become true.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        note();
        told.awaited = true;
        if told.add(&error, true) {
            (self.tell)(Unreadable::Awaited(error));
        }
    }

    /// Tells, if the guest has waited, that nothing is `left` for which it does.
    pub fn look(&self, left: impl FnOnce() -> Vec<Run>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.awaited && left().is_empty() {
            told.awaited = false;
            told.places.retain(|(.., awaited)| !awaited);
            (self.tell)(Unreadable::Over);
        }
    }
}
