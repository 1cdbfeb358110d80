//! What is counted of pools.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The upper bounds of a histogram's buckets, in seconds.
const BOUNDS: [f64; 12] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// How long something took, each time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    counts: [u64; BOUNDS.len()],
    sum: f64,
    count: u64,
}

impl Histogram {
    fn record(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.counts[bucket] += 1;
        }
        self.sum += seconds;
        self.count += 1;
    }

    /// Each upper bound in seconds, with how often it took no longer.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let mut total = 0;
        BOUNDS.iter().zip(self.counts).map(move |(bound, count)| {
            total += count;
            (*bound, total)
        })
    }

    /// All of it together, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// How often.
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// What has been counted of one pool since the daemon was started.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Figures {
    /// Takes, from the request until QEMU ran the guest.
    pub takes: Histogram,
    /// Resets inside QEMU, until the guest ran again.
    pub resets_in_place: Histogram,
    /// Resets by a new process, until the guest ran again.
    pub resets_new_process: Histogram,
    /// Guests that were armed.
    pub armed: u64,
    /// Guests that are no more.
    pub released: u64,
    /// Requests of guests for memory that have been served, of guests that are no more.
    pub faults: u64,
    /// Bytes of memory that have been brought, of guests that are no more.
    pub bytes: u64,
    /// Failures, by [`ErrorKind::code`](crate::ErrorKind::code).
    pub failures: BTreeMap<String, u64>,
}

/// The figures of one pool, counted from anywhere.
#[derive(Debug, Default)]
pub(super) struct Counted(Mutex<Figures>);

impl Counted {
    pub fn count(&self, change: impl FnOnce(&mut Figures)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn now(&self) -> Figures {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn take(&self, took: Duration) {
        self.count(|figures| figures.takes.record(took));
    }

    pub fn reset(&self, in_place: bool, took: Duration) {
        self.count(|figures| match in_place {
            true => figures.resets_in_place.record(took),
            false => figures.resets_new_process.record(took),
        });
    }

    pub fn failure(&self, code: &str) {
        self.count(|figures| *figures.failures.entry(code.to_owned()).or_default() += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_took_no_longer() {
        let counted = Counted::default();
        for ms in [1, 1, 2, 30, 9000] {
            counted.take(Duration::from_millis(ms));
        }
        let takes = counted.now().takes;
        assert_eq!((takes.count(), takes.sum()), (5, 9.034));
        let at = |bound: f64| takes.cumulative().find(|(at, _)| *at == bound).unwrap().1;
        assert_eq!((at(0.0005), at(0.001), at(0.002), at(0.05), at(5.0)), (0, 2, 3, 4, 4));
    }
}
