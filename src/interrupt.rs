//! The wish to stop, as it reaches a save or a revert under way.

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
