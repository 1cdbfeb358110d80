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

/// Problems that are told, at most, where nobody waits. What the guest waits for is always told.
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
    /// What is wrong with memory that was passed over: the same for all that is stored together.
    problems: HashSet<String>,
    /// Where the guest waits for memory.
    places: HashSet<(String, u64)>,
}

impl Listener {
    pub fn new(tell: impl Fn(Unreadable) + Send + Sync + 'static) -> Listener {
        Listener { tell: Box::new(tell), told: Mutex::default() }
    }

    /// Tells once of each problem that keeps memory from being read.
    pub fn passed_over(&self, error: MemoryError) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let MemoryError::Source { source, .. } = &error else { return };
        if told.problems.len() < MOST_TOLD && told.problems.insert(source.to_string()) {
            (self.tell)(Unreadable::PassedOver(error));
        }
    }

    /// Notes by `note` that the guest waits, and tells it once of each place.
    pub fn awaited(&self, error: MemoryError, note: impl FnOnce()) {
        // The lock keeps what is told in the order of what has become true.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        note();
        told.awaited = true;
        let MemoryError::Source { block, offset, .. } = &error else { return };
        if told.places.insert((block.clone(), *offset)) {
            (self.tell)(Unreadable::Awaited(error));
        }
    }

    /// Tells, if the guest has waited, that nothing is `left` for which it does.
    pub fn look(&self, left: impl FnOnce() -> Vec<Run>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.awaited && left().is_empty() {
            told.awaited = false;
            told.places.clear();
            (self.tell)(Unreadable::Over);
        }
    }
}
