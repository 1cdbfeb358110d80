//! Requests to a repository, by threads that wait for them: the urgent ones first.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Threads that fetch. Each waits for one answer: their number times the size of a request is what is
/// on its way at most.
const THREADS: usize = 24;
/// Of these, those that nobody but urgent requests get.
const KEPT_FREE: usize = 8;

type Work = Box<dyn FnOnce() + Send>;

/// Threads that fetch. Dropping it ends them, each as soon as the answer has come that it waits for;
/// nobody else waits for that.
pub struct Fetchers {
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    urgent: VecDeque<Work>,
    others: VecDeque<Work>,
    /// Threads that are at work for nothing urgent.
    busy: usize,
    ended: bool,
}

impl Fetchers {
    /// Starts the threads.
    ///
    /// # Errors
    /// When one can't be started.
    pub fn start() -> std::io::Result<Fetchers> {
        let fetchers = Fetchers { queue: Arc::default() };
        for _ in 0..THREADS {
            let queue = Arc::clone(&fetchers.queue);
            let builder = std::thread::Builder::new().name("fetch".into());
            builder.spawn(move || queue.serve())?;
        }
        Ok(fetchers)
    }

    /// Has something fetched that somebody waits for.
    pub fn urgent(&self, work: impl FnOnce() + Send + 'static) {
        self.queue.lock().urgent.push_back(Box::new(work));
        self.queue.changed.notify_one();
    }

    /// Has something fetched when there is nothing urgent.
    pub fn later(&self, work: impl FnOnce() + Send + 'static) {
        self.queue.lock().others.push_back(Box::new(work));
        self.queue.changed.notify_one();
    }
}

impl Drop for Fetchers {
    fn drop(&mut self) {
        let mut waiting = self.queue.lock();
        waiting.ended = true;
        waiting.urgent.clear();
        waiting.others.clear();
        drop(waiting);
        self.queue.changed.notify_all();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut waiting = self.lock();
        loop {
            if waiting.ended {
                return;
            }
            if let Some(work) = waiting.urgent.pop_front() {
                drop(waiting);
                work();
                waiting = self.lock();
            } else if waiting.busy < THREADS - KEPT_FREE
                && let Some(work) = waiting.others.pop_front()
            {
                waiting.busy += 1;
                drop(waiting);
                work();
                waiting = self.lock();
                waiting.busy -= 1;
                self.changed.notify_one();
            } else {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}
