//! All runs of a bench, for other programs: as JSON, and as a table for spreadsheets.

use serde::Serialize;

use super::{METRICS, Sample, Summary};

/// What a record is, and its version.
pub(super) const RECORD: &str = "snapback bench 1";

/// A bench as it is saved: its summary, and each run.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    record: &'static str,
    #[serde(flatten)]
    summary: &'a Summary,
    runs: &'a [Sample],
}

impl<'a> Record<'a> {
    /// That of a bench.
    pub fn new(summary: &'a Summary, runs: &'a [Sample]) -> Record<'a> {
        Record { record: RECORD, summary, runs }
    }
}

/// The runs as lines of values between commas, with a head (RFC 4180).
pub fn csv(runs: &[Sample]) -> String {
    let head = ["way", "cache", "round"].into_iter().chain(METRICS.iter().map(|m| m.key));
    let mut text = head.collect::<Vec<_>>().join(",") + "\r\n";
    for run in runs {
        let names = [run.way.name().to_owned(), run.cache.name().to_owned(), run.round.to_string()];
        // What was not measured is empty.
        let value = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
        let values = METRICS.iter().map(|metric| value((metric.of)(run)));
        text += &(names.into_iter().chain(values).collect::<Vec<_>>().join(",") + "\r\n");
    }
    text
}
