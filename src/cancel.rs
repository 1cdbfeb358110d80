//! The wish to stop, as it reaches what is under way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// How often somebody has asked to stop. A save gives up at the first wish; a
/// revert whose guest runs already finishes at the first and gives up at the second.
#[derive(Debug, Clone)]
pub struct Interrupts {
    count: watch::Receiver<u32>,
}

impl Interrupts {
    /// Interrupts that are never asked for.
    pub fn never() -> Interrupts {
        Interrupts { count: watch::channel(0).1 }
    }

    /// Interrupts, and the counter that raises them.
    pub fn channel() -> (watch::Sender<u32>, Interrupts) {
        let (sender, count) = watch::channel(0);
        (sender, Interrupts { count })
    }

    /// Waits until there were at least `n` interrupts; forever where there are none.
    pub async fn at_least(&mut self, n: u32) {
        if self.count.wait_for(|count| *count >= n).await.is_err() {
            std::future::pending().await
        }
    }
}

/// The wish to stop, as it reaches work that blocks and looks for it now and then.
#[derive(Debug, Default)]
pub struct Stop {
    asked: AtomicBool,
    /// Flags of others who look only at their own.
    others: Mutex<Vec<Arc<AtomicBool>>>,
}

impl Stop {
    /// Asks to stop, from whatever thread.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
        // Whoever adds a flag behind this sees the wish: the lock orders the two.
        for other in self.others.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            other.store(true, Ordering::Relaxed);
        }
    }

    /// Has the wish set this flag to true as well.
    pub fn pass_on(&self, flag: Arc<AtomicBool>) {
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_asked() {
            flag.store(true, Ordering::Relaxed);
        }
        others.push(flag);
    }

    /// Whether somebody has asked.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_to_stop_reaches_everybody_before_and_after() {
        let (stop, [before, after]) = (Stop::default(), [(); 2].map(|()| Arc::default()));
        stop.pass_on(Arc::clone(&before));
        assert!(!stop.is_asked() && !before.load(Ordering::Relaxed));
        stop.ask();
        stop.pass_on(Arc::clone(&after));
        assert!(stop.is_asked());
        assert!([before, after].iter().all(|flag| flag.load(Ordering::Relaxed)));
    }
}
