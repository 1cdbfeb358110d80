//! The wish to stop, as it reaches what is under way.

use std::sync::atomic::{AtomicBool, Ordering};

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
}

impl Stop {
    /// Asks to stop, from whatever thread.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has asked.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}
