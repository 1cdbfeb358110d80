//! How fast memory is filled, and whether at all.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Memory;

/// How often a wait looks whether it has become needless.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Holds filling back, speeds it up, or ends it.
#[derive(Debug)]
pub struct Pace {
    stopped: AtomicBool,
    hurry: AtomicBool,
    /// The most bytes a second.
    rate: Option<u64>,
    start: Instant,
    bytes: AtomicU64,
}

impl Pace {
    /// A pace of so many bytes a second at most.
    pub fn new(rate: Option<u64>) -> Pace {
        Pace {
            stopped: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            rate,
            start: Instant::now(),
            bytes: AtomicU64::new(0),
        }
    }

    /// Ends filling, between two pieces.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether it has been ended.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Fills at full speed from now on, waiting for nothing.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Relaxed);
    }

    fn waits(&self) -> bool {
        !self.is_stopped() && !self.hurry.load(Ordering::Relaxed)
    }

    /// Counts what has been installed, and waits for as long as that was too fast.
    pub(super) fn account(&self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let due = self.start + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        while self.waits() && Instant::now() < due {
            let left = due.saturating_duration_since(Instant::now());
            std::thread::sleep(left.min(LOOK_EVERY));
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
