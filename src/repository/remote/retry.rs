//! Requests that are tried again.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::Reach;
use super::failure::{Verdict, judge};
use crate::repository::error::{StoreError, StoreFailure};

/// How long the first pause is between two tries, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long one try may take, beside what its bytes take at the least rate.
const ONE_TRY: Duration = Duration::from_secs(20);
/// Bytes a second that a connection brings at least.
const LEAST_RATE: u64 = 128 << 10;
/// The try from which on people are told.
const TOLD_FROM: u32 = 2;

/// A store that is waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[non_exhaustive]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum StoreWait {
    /// Requests fail, and are tried again.
    StoreWaiting {
        /// The store.
        store: String,
        /// Why the last one failed.
        why: String,
        /// For how many seconds it will be tried again.
        patience_s: u64,
    },
    /// It answers again.
    StoreBack {
        /// The store.
        store: String,
    },
}

/// Tries requests of one store.
pub struct Retry {
    name: String,
    reach: Reach,
    slots: Semaphore,
    waiting: AtomicUsize,
}

/// Counts a request that waits for the store.
struct Waiting<'a>(&'a Retry);

impl Waiting<'_> {
    /// It has been answered.
    fn answered(self) {
        if self.0.waiting.load(Ordering::Relaxed) == 1 {
            self.0.tell(StoreWait::StoreBack { store: self.0.name.clone() });
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Retry {
    pub fn new(name: String, reach: Reach, slots: usize) -> Retry {
        Retry { name, reach, slots: Semaphore::new(slots), waiting: AtomicUsize::new(0) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn tell(&self, event: StoreWait) {
        if let Some(tell) = &self.reach.on_wait {
            tell(event);
        }
    }

    /// Makes a request of so many bytes, again and again while it fails in a way that may pass.
    pub async fn run<T, F>(
        &self,
        doing: &'static str,
        object: &str,
        bytes: u64,
        mut request: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let error = |failure, problem: String, tries| StoreError {
            failure,
            doing,
            object: object.to_owned(),
            repository: self.name.clone(),
            problem,
            tries,
        };
        let stopped = || error(StoreFailure::Interrupted, "interrupted".into(), None);
        let mut stop = std::pin::pin!(self.reach.cancel.requested());
        let limit = ONE_TRY + Duration::from_secs(bytes / LEAST_RATE);
        let (mut tries, mut first, mut pause, mut waiting) = (0, None, FIRST_PAUSE, None);
        loop {
            tries += 1;
            let one = async {
                // Nobody closes it.
                let _slot = self.slots.acquire().await;
                tokio::time::timeout(limit, request()).await
            };
            let answer = tokio::select! {
                biased;
                () = &mut stop => return Err(stopped()),
                answer = one => answer,
            };
            let verdict = match answer {
                Ok(Ok(value)) => {
                    waiting.map(Waiting::answered).unwrap_or_default();
                    return Ok(value);
                }
                Ok(Err(refused)) => judge(&refused),
                Err(_) => Verdict {
                    failure: StoreFailure::Unreachable,
                    passes: true,
                    problem: format!("no answer within {} s", limit.as_secs()),
                },
            };
            let Verdict { failure, passes, problem } = verdict;
            let began = *first.get_or_insert_with(Instant::now);
            // The pause has a jitter, so that those that failed together don't come back together.
            let rest = pause.mul_f64(0.5 + f64::from(jitter()) / 510.0);
            let out_of_time = began.elapsed() + rest > self.reach.patience;
            if !passes || out_of_time {
                let tried = passes.then(|| (tries, began.elapsed()));
                return Err(error(failure, problem, tried));
            }
            if tries >= TOLD_FROM && waiting.is_none() {
                if self.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
                    let patience_s = self.reach.patience.as_secs();
                    let store = self.name.clone();
                    self.tell(StoreWait::StoreWaiting { store, why: problem, patience_s });
                }
                waiting = Some(Waiting(self));
            }
            tokio::select! {
                () = &mut stop => return Err(stopped()),
                () = tokio::time::sleep(rest) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// A random byte.
fn jitter() -> u8 {
    crate::repository::format::ids::random()[0]
}
