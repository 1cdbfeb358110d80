//! How fast memory is filled.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Memory;
use crate::cancel::Cancellation;
use crate::rate::RateLimit;

/// How often a wait looks whether it is still needed.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// For how long filling waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FillDelay {
    /// Until nobody has asked for memory for so long.
    Quiet(Duration),
    /// For so long, whoever asks.
    Fixed {
        /// How long.
        fixed: Duration,
    },
}

/// Holds filling back, speeds it up, or ends it.
#[derive(Debug)]
pub struct Pace {
    cancel: Cancellation,
    hurry: AtomicBool,
    rate: Option<Mutex<RateLimit>>,
}

impl Pace {
    /// A pace of so many bytes a second at most.
    pub fn new(rate: Option<u64>) -> Pace {
        Pace {
            cancel: Cancellation::new(),
            hurry: AtomicBool::new(false),
            rate: rate.map(|rate| Mutex::new(RateLimit::new(rate, Instant::now()))),
        }
    }

    /// Ends filling, between two pieces.
    pub fn stop(&self) {
        self.cancel.request();
    }

    /// Whether filling has been ended.
    pub fn is_stopped(&self) -> bool {
        self.cancel.is_requested()
    }

    /// Fills at full speed from now on, waiting for nothing.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Relaxed);
    }

    fn waits(&self) -> bool {
        !self.is_stopped() && !self.hurry.load(Ordering::Relaxed)
    }

    /// Counts bytes that were read and installed, and waits until the rate allows more.
    pub(super) fn account(&self, bytes: u64) {
        let Some(rate) = &self.rate else { return };
        // A number and a time are right whatever became of who held the lock.
        let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
        let due = rate.count(Instant::now(), bytes);
        drop(rate);
        while self.waits() && Instant::now() < due {
            std::thread::sleep(due.saturating_duration_since(Instant::now()).min(LOOK_EVERY));
        }
    }

    /// Waits for `hold`.
    pub(super) fn wait(&self, hold: Duration) {
        let start = Instant::now();
        while self.waits() && start.elapsed() < hold {
            std::thread::sleep(LOOK_EVERY.min(hold));
        }
    }

    /// Waits for what `delay` says, or until the last page of memory has come.
    pub(super) fn wait_for_turn(&self, memory: &Memory, delay: FillDelay) {
        let (FillDelay::Quiet(length) | FillDelay::Fixed { fixed: length }) = delay;
        let mut requests = memory.counts().requests;
        let mut since = Instant::now();
        while self.waits() && since.elapsed() < length {
            if memory.wait_complete(LOOK_EVERY.min(length)) {
                return;
            }
            let now = memory.counts().requests;
            if now != requests && matches!(delay, FillDelay::Quiet(_)) {
                (requests, since) = (now, Instant::now());
            }
        }
    }
}
