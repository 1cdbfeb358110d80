//! How long a thread that waits for faults spins before it sleeps.
//!
//! Waking a thread that sleeps in poll(2) takes longer than answering the fault
//! itself (63 µs against 17 µs was measured with a bare loop), and faults come in
//! bursts. So it spins for a while after each fault before it sleeps: twice as
//! long as before, up to [`SPIN_MAX`], where that has caught a fault or would have; half
//! as long where the next fault was far away, so that faults that come one by one cost
//! hardly more than their answers.

use std::time::Duration;

/// The longest time to spin without an event.
const SPIN_MAX: Duration = Duration::from_micros(200);

/// The shortest time to spin. Without any, faults that come too fast to sleep in between
/// would never be seen to come in bursts.
const SPIN_MIN: Duration = Duration::from_micros(5);

/// How long to spin before the next sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spin(Duration);

impl Default for Spin {
    fn default() -> Spin {
        Spin(SPIN_MAX)
    }
}

impl Spin {
    /// How long to spin.
    pub fn time(self) -> Duration {
        self.0
    }

    /// A fault came while spinning.
    pub fn caught(&mut self) {
        self.0 = (self.0 * 2).min(SPIN_MAX);
    }

    /// No fault came while spinning.
    pub fn in_vain(&mut self) {
        self.0 = (self.0 / 2).max(SPIN_MIN);
    }

    /// A fault came this long after the handler went to sleep.
    pub fn woken(&mut self, after: Duration) {
        if after <= SPIN_MAX {
            self.caught();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_gets_short_for_faults_one_by_one_and_long_again_for_bursts() {
        let mut spin = Spin(SPIN_MAX);
        let far = Duration::from_millis(10);
        let spent: Duration = (0..100)
            .map(|_| {
                let spun = spin.0;
                spin.in_vain();
                spin.woken(far);
                spun
            })
            .sum();
        assert_eq!(spin, Spin(SPIN_MIN));
        assert!(spent < SPIN_MAX * 2 + SPIN_MIN * 100, "{spent:?}");
        // Faults that come right after it has gone to sleep, then while it spins.
        for _ in 0..20 {
            spin.woken(SPIN_MAX / 4);
        }
        assert_eq!(spin, Spin(SPIN_MAX));
        spin.in_vain();
        spin.caught();
        assert_eq!(spin, Spin(SPIN_MAX));
    }
}
