//! How often, and after how long, what has died is started again.

use std::time::{Duration, Instant};

/// Starts within [`WINDOW`] at most.
const MOST: usize = 10;

const WINDOW: Duration = Duration::from_secs(60);

/// How much longer each start within [`WINDOW`] waits than the one before it.
const STEP: Duration = Duration::from_millis(50);

/// The latest restarts. The first follows at once, the next ones after 50 ms, 100 ms and so
/// on; after ten in a minute there are no more.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    times: [Option<Instant>; MOST],
}

impl Restarts {
    /// Counts a restart that is wanted at `now`. Returns how long to wait before it; nothing
    /// where it is one too many.
    pub fn next(&mut self, now: Instant) -> Option<Duration> {
        let is_recent = |time: &Option<Instant>| {
            time.is_some_and(|time| now.saturating_duration_since(time) < WINDOW)
        };
        let recent = self.times.iter().filter(|time| is_recent(time)).count();
        let free = self.times.iter_mut().find(|time| !is_recent(time))?;
        *free = Some(now);
        Some(STEP * recent as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_are_spaced_and_given_up() {
        let mut restarts = Restarts::default();
        let start = Instant::now();
        let waits: Vec<_> = (0..12).map(|_| restarts.next(start)).collect();
        let expected = (0..10).map(|n| Some(STEP * n)).chain([None, None]);
        assert_eq!(waits, expected.collect::<Vec<_>>());
        assert_eq!(restarts.next(start + WINDOW), Some(Duration::ZERO));
    }
}
