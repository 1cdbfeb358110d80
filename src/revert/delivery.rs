//! How a guest's memory is brought: what `revert` and `serve` have in common.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    Feed, FeedError, FeedEvent, FeedOptions, Prepared, Progress, RevertError, RevertEvent,
};
use super::{Way, feed_error};
use crate::cancel::Cancellation;
use crate::image::Image;
use crate::memory::{FaultReport, FillOptions, WorkingSet, WorkingSetError, working_set};

/// How often progress is told, by default.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Threads that prefetch, at most: more than this don't make any way of placing faster.
const MAX_PREFETCH: usize = 4;

/// How a guest's memory is brought.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// By which way it goes.
    pub way: Way,
    /// The most bytes a second that filling brings, as fast as can be without. What the
    /// guest asks for or waits for (a `preload`, and the first MiB of any working set)
    /// is not held back, and zeros, which are read from nowhere, don't count.
    pub fill_rate: Option<u64>,
    /// Filling, beyond the working set, waits until the guest has not asked for memory
    /// for so long.
    pub fill_delay: Option<Duration>,
    /// Whether the recorded working set is brought first, and recorded anew.
    pub working_set: bool,
    /// Nothing is filled for so long, while what the guest asks for is recorded.
    pub hold: Option<Duration>,
    /// The file of the working set; beside the image without.
    pub working_set_file: Option<PathBuf>,
    /// How often progress is told at most; it is told only where there is some.
    pub progress_every: Duration,
}

impl Default for Delivery {
    fn default() -> Delivery {
        Delivery {
            way: Way::Auto,
            fill_rate: None,
            fill_delay: None,
            working_set: true,
            hold: None,
            working_set_file: None,
            progress_every: PROGRESS_EVERY,
        }
    }
}

/// How a delivery went.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The final counts.
    pub progress: Progress,
    /// What was asked for, and how fast it was answered.
    pub faults: FaultReport,
    /// The way it went.
    pub way: Way,
}

impl Outcome {
    /// The event that tells it.
    pub(super) fn resident(&self) -> RevertEvent {
        let answers = &self.faults.timings;
        let us = |quantile| answers.value_at_quantile(quantile) as f64 / 1e3;
        RevertEvent::Resident {
            progress: self.progress,
            demands: answers.len(),
            answer_p50_us: us(0.5),
            answer_p99_us: us(0.99),
        }
    }
}

/// What a delivery needs before it can start, made ready while QEMU starts.
pub(super) struct Ready {
    /// What is sent before the guest runs.
    prepared: Prepared,
    fill: FillOptions,
}

impl Delivery {
    /// Makes ready what is needed ahead of the guest's memory. A working set that can't
    /// be read is only told.
    pub(super) fn prepare(&self, image: &Image, prepared: Prepared) -> Ready {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let fill = FillOptions {
            threads: threads.min(MAX_PREFETCH),
            working_set: self.recall(image).map(|set| set.pages).unwrap_or_default(),
            rate: self.fill_rate,
            hold: self.hold,
            delay: self.fill_delay,
        };
        Ready { prepared, fill }
    }

    /// Begins to feed the QEMU at the other end of `socket`.
    pub(super) fn start(
        &self,
        ready: Ready,
        image: &Arc<Image>,
        socket: UnixStream,
        pid: Option<i32>,
        preload: bool,
    ) -> Result<(Feed, UnboundedReceiver<FeedEvent>), RevertError> {
        let Ready { prepared, fill } = ready;
        let record = match (self.hold, self.working_set) {
            (Some(hold), _) => hold,
            (None, true) => working_set::RECORD_WINDOW,
            (None, false) => Duration::ZERO,
        };
        let options = FeedOptions { way: self.way, pid, fill, preload, record };
        Feed::start(prepared, Arc::new(Arc::clone(image)), socket, options).map_err(feed_error)
    }

    /// Where the image's working set is, if it has a place.
    fn working_set_path(&self, image: &Image) -> Option<PathBuf> {
        let named = self.working_set_file.clone();
        named.or_else(|| image.path().map(working_set::path_for))
    }

    /// The image's working set, if it is wanted and can be used.
    fn recall(&self, image: &Image) -> Option<WorkingSet> {
        if !self.working_set {
            return None;
        }
        let path = self.working_set_path(image)?;
        match WorkingSet::load(&path, image.identity(), &image.manifest().blocks) {
            Ok(set) => Some(set),
            Err(WorkingSetError::None(_)) => None,
            Err(error) => {
                tracing::warn!("reverting without a working set: {error}");
                None
            }
        }
    }

    /// Records the working set that a delivery has shown. It is a hint: that it can't be
    /// written harms nothing.
    pub(super) fn remember(&self, image: &Image, outcome: &Outcome) {
        if !self.working_set {
            return;
        }
        let demanded = outcome.faults.demanded.iter().map(|(_, page)| *page);
        let before = self.recall(image);
        let (identity, blocks) = (image.identity(), &image.manifest().blocks);
        let next = WorkingSet::following(before.as_ref(), identity, demanded, blocks);
        if let Some((next, path)) = next.zip(self.working_set_path(image))
            && let Err(error) = next.store(&path)
        {
            tracing::info!("the working set is not recorded: {error}");
        }
    }
}

/// What a feed has said before it was followed and its outcome needs.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub way: Option<Way>,
    pub direct_faults: Option<FaultReport>,
    /// The feed's last word: it may come before QEMU is heard to run the guest.
    pub finished: Option<FaultReport>,
}

/// Follows the feed to its end, telling its progress.
pub(super) async fn follow(
    feed: &Feed,
    steps: &mut UnboundedReceiver<FeedEvent>,
    heard: Heard,
    progress_every: Duration,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(RevertEvent),
) -> Result<Outcome, RevertError> {
    let mut tick = tokio::time::interval(progress_every.max(Duration::from_millis(1)));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = None;
    let mut interrupted = false;
    let mut way = heard.way.unwrap_or(Way::Socket);
    let mut direct_faults = heard.direct_faults;
    let progress = || {
        let counts = feed.memory().counts();
        Progress { pages: counts.present, total: counts.total, requests: counts.requests }
    };
    let mut finished = heard.finished;
    loop {
        if let Some(faults) = finished.take() {
            let faults = match direct_faults {
                Some(direct) => faults.merged(direct),
                None => faults,
            };
            return Ok(Outcome { progress: progress(), faults, way });
        }
        tokio::select! {
            // A guest that has all its memory is not given up.
            biased;
            step = steps.recv() => match step {
                Some(FeedEvent::Placing { way: taken, reason }) => {
                    way = taken;
                    on_event(RevertEvent::Placing { way, reason });
                }
                Some(FeedEvent::Loaded | FeedEvent::Preloaded) => {}
                Some(FeedEvent::Faults(report)) => direct_faults = report,
                Some(FeedEvent::Finished(faults)) => finished = Some(faults),
                Some(FeedEvent::Failed(error)) => return Err(feed_error(error)),
                None => return Err(feed_error(FeedError::HungUp)),
            },
            () = cancel.requested(), if !interrupted => {
                interrupted = true;
                feed.hurry();
                on_event(RevertEvent::StillNeeded);
            }
            () = cancel.requested_times(2) => {
                return Err(RevertError::Interrupted(
                    "the guest was stopped, since its memory was not complete",
                ));
            }
            _ = tick.tick() => {
                let now = progress();
                if told.replace(now) != Some(now) {
                    on_event(RevertEvent::Progress(now));
                }
            }
        }
    }
}
