//! How fast memory is filled, and whether at all.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Memory;
use crate::cancel::Cancellation;

/// How often a wait looks whether it has become needless.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Time that may be made up for: a read that took long is, a wait for a quiet guest isn't.
const MADE_UP: Duration = Duration::from_millis(100);

/// Holds filling back, speeds it up, or ends it.
#[derive(Debug)]
pub struct Pace {
    cancel: Cancellation,
    hurry: AtomicBool,
    start: Instant,
    rate: Option<Mutex<Rate>>,
}

/// A cap on a rate. Times count from the pace's start.
#[derive(Debug)]
struct Rate {
    bytes_a_second: u64,
    /// When all that has been counted may be in place.
    due: Duration,
}

impl Rate {
    fn new(bytes_a_second: u64) -> Rate {
        Rate { bytes_a_second: bytes_a_second.max(1), due: Duration::ZERO }
    }

    /// Counts bytes that have just been installed; says until when that was too fast.
    fn count(&mut self, now: Duration, bytes: u64) -> Duration {
        let from = self.due.max(now.saturating_sub(MADE_UP));
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_a_second as f64);
        self.due = from.saturating_add(takes);
        self.due
    }
}

impl Pace {
    /// A pace of so many bytes a second at most.
    pub fn new(rate: Option<u64>) -> Pace {
        Pace {
            cancel: Cancellation::new(),
            hurry: AtomicBool::new(false),
            start: Instant::now(),
            rate: rate.map(|rate| Mutex::new(Rate::new(rate))),
        }
    }

    /// Ends filling, between two pieces.
    pub fn stop(&self) {
        self.cancel.request();
    }

    /// Whether it has been ended.
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

    /// Counts bytes that were read and installed, and waits for as long as that was too fast.
    pub(super) fn account(&self, bytes: u64) {
        let Some(rate) = &self.rate else { return };
        // A number and a time are right whatever became of who held the lock.
        let mut rate = rate.lock().unwrap_or_else(PoisonError::into_inner);
        let due = rate.count(self.start.elapsed(), bytes);
        drop(rate);
        while self.waits() && self.start.elapsed() < due {
            std::thread::sleep(due.saturating_sub(self.start.elapsed()).min(LOOK_EVERY));
        }
    }

    /// Waits for so long.
    pub(super) fn wait(&self, hold: Duration) {
        let start = Instant::now();
        while self.waits() && start.elapsed() < hold {
            std::thread::sleep(LOOK_EVERY.min(hold));
        }
    }

    /// Waits until nobody has asked for memory for `quiet`, or its last page has come.
    pub(super) fn wait_quiet(&self, memory: &Memory, quiet: Duration) {
        let mut requests = memory.counts().requests;
        let mut since = Instant::now();
        while self.waits() && since.elapsed() < quiet {
            if memory.wait_complete(LOOK_EVERY.min(quiet)) {
                return;
            }
            let now = memory.counts().requests;
            if now != requests {
                (requests, since) = (now, Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_rate_is_kept_from_the_first_byte_on() {
        let mut rate = Rate::new(1000);
        let now = Duration::ZERO;
        assert_eq!(rate.count(now, 500), SECOND / 2);
        // Two threads that count at the same moment share the rate.
        assert_eq!(rate.count(now, 500), SECOND);
        assert_eq!(rate.count(SECOND, 1000), SECOND * 2);
        // A little time that was spent on reading is made up for.
        assert_eq!(rate.count(SECOND * 2 + MADE_UP / 2, 1000), SECOND * 3);
    }

    #[test]
    fn time_that_was_waited_is_not_made_up_for() {
        let mut rate = Rate::new(1000);
        let after = SECOND * 30;
        assert_eq!(rate.count(after, 1000), after - MADE_UP + SECOND);
        assert_eq!(rate.count(after, 1000), after - MADE_UP + SECOND * 2);
    }
}
