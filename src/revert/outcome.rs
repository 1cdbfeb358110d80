//! How a guest's memory came.

use super::event::{Progress, RevertEvent};
use super::options::Placement;
use crate::memory::FaultReport;
use crate::page::Page;

/// How a guest's memory came.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outcome {
    /// The final counts.
    pub progress: Progress,
    /// By which transport it came.
    pub placement: Placement,
    /// What was asked for, and how fast it was answered.
    pub(crate) faults: FaultReport,
}

impl Outcome {
    /// How many answers brought memory, as opposed to requests for what was on its way.
    pub fn demands(&self) -> u64 {
        self.faults.timings.len()
    }

    /// The time in microseconds that this share of the answers (0 to 1) took at most, from
    /// the request being read to the page being on its way; 0 where there were none.
    pub fn answer_us(&self, share: f64) -> f64 {
        self.faults.timings.value_at_quantile(share) as f64 / 1e3
    }

    /// The pages that were asked for and recorded, in order.
    pub fn demanded(&self) -> impl Iterator<Item = Page> {
        self.faults.demanded.iter().map(|(_, page)| *page)
    }

    /// The event that tells it.
    pub(super) fn resident(&self) -> RevertEvent {
        RevertEvent::Resident {
            progress: self.progress,
            demands: self.demands(),
            answer_p50_us: self.answer_us(0.5),
            answer_p99_us: self.answer_us(0.99),
        }
    }
}
