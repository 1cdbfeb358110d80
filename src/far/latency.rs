//! How long requests take, to tell one that is unusually slow.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many of the last requests count.
const LAST: usize = 64;
/// How many have to be known before one can be called slow.
const ENOUGH: usize = 16;
/// The shortest time that is called slow.
const LEAST: Duration = Duration::from_millis(30);

/// The times of the last requests.
#[derive(Debug, Default)]
pub struct Latency(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    times: VecDeque<Duration>,
    /// Found out with each answer: whoever waits asks again and again.
    slow: Option<Duration>,
}

impl Latency {
    /// Notes that a request took so long.
    pub fn note(&self, took: Duration) {
        let mut ring = self.lock();
        if ring.times.len() == LAST {
            ring.times.pop_front();
        }
        ring.times.push_back(took);
        if ring.times.len() >= ENOUGH {
            let mut times: Vec<Duration> = ring.times.iter().copied().collect();
            times.sort_unstable();
            ring.slow = Some(times[times.len() * 95 / 100].max(LEAST));
        }
    }

    /// A request that takes longer is slower than 95 of 100; nothing while too few are known.
    pub fn slow(&self) -> Option<Duration> {
        self.lock().slow
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slow_ones_are_told_from_the_last_requests() {
        let latency = Latency::default();
        for _ in 0..ENOUGH - 1 {
            latency.note(Duration::from_secs(9));
        }
        assert_eq!(latency.slow(), None);
        for ms in 0..LAST as u64 {
            latency.note(Duration::from_millis(100 + ms));
        }
        let slow = latency.slow().unwrap();
        assert!(slow > Duration::from_millis(155) && slow < Duration::from_millis(164), "{slow:?}");
    }
}
