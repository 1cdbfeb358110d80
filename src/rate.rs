//! A limit to bytes a second.

use std::time::{Duration, Instant};

/// Time that may be made up for: a call that took long is, an idle hour isn't.
const MADE_UP: Duration = Duration::from_millis(100);

/// A limit to how many bytes a second are moved. It only counts; whoever moves them waits.
#[derive(Debug, Clone)]
pub struct RateLimit {
    bytes_a_second: u64,
    /// When all that has been counted may have been moved.
    due: Instant,
}

impl RateLimit {
    /// So many bytes a second at most, from `now` on; at least one.
    pub fn new(bytes_a_second: u64, now: Instant) -> RateLimit {
        RateLimit { bytes_a_second: bytes_a_second.max(1), due: now }
    }

    /// Bytes a second.
    pub fn bytes_a_second(&self) -> u64 {
        self.bytes_a_second
    }

    /// When the next byte may be moved.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Counts bytes that have just been moved. Returns when the next one may be.
    pub fn count(&mut self, now: Instant, bytes: u64) -> Instant {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_a_second);
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let from = self.due.max(now.checked_sub(MADE_UP).unwrap_or(now));
        // A count adds 584 years at most: the clock has room for more of them than there are calls.
        self.due = from.checked_add(takes).unwrap_or(from);
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_rate_is_kept_from_the_first_byte_on() {
        let start = Instant::now();
        let mut rate = RateLimit::new(1000, start);
        assert_eq!(rate.count(start, 500), start + SECOND / 2);
        // Two threads that count at the same moment share the rate.
        assert_eq!(rate.count(start, 500), start + SECOND);
        assert_eq!(rate.count(start + SECOND, 1000), start + SECOND * 2);
        // A little time that was spent on reading is made up for.
        assert_eq!(rate.count(start + SECOND * 2 + MADE_UP / 2, 1000), start + SECOND * 3);
        assert_eq!(rate.due(), start + SECOND * 3);
    }

    #[test]
    fn time_that_was_waited_is_not_made_up_for() {
        let start = Instant::now();
        let mut rate = RateLimit::new(1000, start);
        let after = start + SECOND * 30;
        assert_eq!(rate.count(after, 1000), after - MADE_UP + SECOND);
        assert_eq!(rate.count(after, 1000), after - MADE_UP + SECOND * 2);
    }

    #[test]
    fn no_rate_and_no_count_is_too_extreme() {
        let start = Instant::now();
        for bytes_a_second in [0, 1, u64::MAX] {
            let mut rate = RateLimit::new(bytes_a_second, start);
            for _ in 0..100 {
                assert!(rate.count(start, u64::MAX) >= start);
            }
        }
    }
}
