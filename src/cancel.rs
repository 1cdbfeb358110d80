//! Cancellation: one request to stop, for async code, for work that blocks, and for what
//! sleeps in the kernel.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// A request to stop that clones share. It counts, since some journeys end at the first
/// request and others only at the second: a save gives up at the first; a revert whose
/// guest runs already finishes at the first and gives up at the second.
#[derive(Clone, Default)]
pub struct Cancellation {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    requests: AtomicU32,
    /// Wakes those who await a request.
    requested: Notify,
    /// Called, and dropped, at the first request.
    hooks: Mutex<Vec<Hook>>,
}

type Hook = Box<dyn FnOnce() + Send>;

impl Cancellation {
    /// A cancellation that nobody has requested yet.
    pub fn new() -> Cancellation {
        Cancellation::default()
    }

    /// Requests to stop, once more. It may be called from any thread.
    pub fn request(&self) {
        self.shared.requests.fetch_add(1, Ordering::AcqRel);
        self.shared.requested.notify_waiters();
        for hook in std::mem::take(&mut *self.hooks()) {
            hook();
        }
    }

    /// How often stopping was requested.
    pub fn requests(&self) -> u32 {
        self.shared.requests.load(Ordering::Acquire)
    }

    /// Whether stopping was requested at all. It costs one load: loops may ask as often as
    /// they like.
    pub fn is_requested(&self) -> bool {
        self.requests() > 0
    }

    /// Waits for the first request; forever where none comes.
    pub fn requested(&self) -> impl Future<Output = ()> + Send + 'static {
        self.requested_times(1)
    }

    /// Waits until there were at least `times` requests; forever where they don't come.
    pub fn requested_times(&self, times: u32) -> impl Future<Output = ()> + Send + 'static {
        let cancel = self.clone();
        async move {
            loop {
                let mut told = std::pin::pin!(cancel.shared.requested.notified());
                // Enabled before the look, it hears of a request that comes between the two.
                told.as_mut().enable();
                if cancel.requests() >= times {
                    return;
                }
                told.await;
            }
        }
    }

    /// Has the first request call `hook`, at once where it has come already: to wake
    /// somebody who sleeps in the kernel.
    pub fn on_request(&self, hook: impl FnOnce() + Send + 'static) {
        let mut hooks = self.hooks();
        // Whoever requests behind this look takes the hooks behind us: the lock orders the two.
        if !self.is_requested() {
            hooks.push(Box::new(hook));
            return;
        }
        drop(hooks);
        hook();
    }

    /// A cancellation of its own, which a request of this one requests as well.
    pub fn child(&self) -> Cancellation {
        let child = Cancellation::new();
        let weak = Arc::downgrade(&child.shared);
        self.on_request(move || {
            if let Some(shared) = weak.upgrade() {
                Cancellation { shared }.request();
            }
        });
        child
    }

    fn hooks(&self) -> std::sync::MutexGuard<'_, Vec<Hook>> {
        // A list of hooks is whole whatever became of who held the lock.
        self.shared.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Cancellation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancellation").field("requests", &self.requests()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reaches_hooks_and_children_set_up_before_and_after_it() {
        let (cancel, called) = (Cancellation::new(), Arc::new(AtomicU32::new(0)));
        let count = || {
            let called = Arc::clone(&called);
            move || {
                called.fetch_add(1, Ordering::Relaxed);
            }
        };
        let before = cancel.child();
        cancel.on_request(count());
        assert!(!cancel.is_requested() && called.load(Ordering::Relaxed) == 0);
        cancel.request();
        cancel.request();
        cancel.on_request(count());
        let after = cancel.child();
        assert_eq!((cancel.requests(), called.load(Ordering::Relaxed)), (2, 2));
        assert!(before.is_requested() && after.is_requested());
    }

    #[test]
    fn a_child_is_cancelled_alone() {
        let cancel = Cancellation::new();
        let child = cancel.child();
        child.request();
        assert!(child.is_requested() && !cancel.is_requested());
    }

    #[tokio::test]
    async fn whoever_awaits_is_woken_by_as_many_requests_as_it_wants() {
        let cancel = Cancellation::new();
        let twice = tokio::spawn(cancel.requested_times(2));
        let once = tokio::spawn(cancel.requested());
        cancel.request();
        once.await.unwrap();
        assert!(!twice.is_finished());
        cancel.request();
        twice.await.unwrap();
    }
}
