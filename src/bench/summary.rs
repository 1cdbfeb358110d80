//! All runs together: spreads, and ratios to QEMU's own ways.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::Serialize;

use super::sample::{COMPARED, COMPARED_DOMAINS};
use super::stats::Spread;
use super::{Cache, Host, METRICS, Method, Metric, Sample, Skipped, State};

/// What was measured.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Subject {
    /// The image.
    pub image: String,
    /// Its identity.
    pub identity: String,
    /// Its length in bytes.
    pub image_bytes: u64,
    /// The guest's memory, of all RAMBlocks, in bytes.
    pub memory_bytes: u64,
    /// How much of that is not zeros, in bytes.
    pub data_bytes: u64,
    /// The QEMU that ran it: version and package.
    pub qemu: String,
    /// The machine type.
    pub machine_type: String,
    /// Runs of each way.
    pub runs: u32,
    /// The pattern of a sign of life, if that was watched for.
    pub sign: Option<String>,
    /// How many signs were waited for.
    pub nth: Option<usize>,
    /// Pages in the working set that was recorded for the runs.
    pub working_set_pages: Option<u64>,
    /// The domain of libvirt's, if it was reverted as one.
    pub domain: Option<String>,
}

impl Subject {
    /// The times by which ways are compared.
    pub(super) fn compared(&self) -> &'static [Metric] {
        if self.domain.is_some() { COMPARED_DOMAINS } else { COMPARED }
    }
}

/// The runs of one way with one state of the page cache.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct WaySummary {
    /// The way.
    pub way: Method,
    /// Whether the files were in the page cache.
    pub cache: Cache,
    /// The spread of each quantity that was measured, by [`METRICS`]' keys.
    pub metrics: BTreeMap<&'static str, Spread>,
    /// The times of all answers to faults in all runs, in nanoseconds.
    #[serde(skip)]
    pub fault_times: Option<Histogram<u64>>,
}

/// How many times a peer takes as long as one of snapback's ways.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Ratio {
    /// snapback's way.
    pub way: Method,
    /// QEMU's own.
    pub peer: Method,
    /// Whether the files were in the page cache.
    pub cache: Cache,
    /// To which point, from QEMU being ready, or of domains from the start: `running`,
    /// `first_sign`, `nth_sign` or `complete`.
    pub to: &'static str,
    /// The peer's time divided by the way's, round by round.
    pub ratio: Spread,
}

/// The result of a bench.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Summary {
    /// What was measured.
    pub subject: Subject,
    /// Where it was measured.
    pub host: Host,
    /// The state of that machine.
    pub state: State,
    /// Each way with each state of the page cache.
    pub ways: Vec<WaySummary>,
    /// snapback's ways beside QEMU's own.
    pub ratios: Vec<Ratio>,
    /// The ways that were not measured, and why.
    pub skipped: Vec<Skipped>,
}

impl Summary {
    pub(super) fn new(
        subject: Subject,
        host: Host,
        state: State,
        samples: &[Sample],
        skipped: Vec<Skipped>,
    ) -> Summary {
        let mut kinds: Vec<(Method, Cache)> = Vec::new();
        for sample in samples {
            if !kinds.contains(&(sample.way, sample.cache)) {
                kinds.push((sample.way, sample.cache));
            }
        }
        let of = |(way, cache): (Method, Cache)| -> Vec<&Sample> {
            samples.iter().filter(|s| s.way == way && s.cache == cache).collect()
        };
        let ways = kinds.iter().map(|kind| summarize(*kind, &of(*kind))).collect();
        let mut ratios = Vec::new();
        for &(way, cache) in kinds.iter().filter(|(way, _)| !way.is_peer()) {
            for &(peer, _) in kinds.iter().filter(|kind| kind.0.is_peer() && kind.1 == cache) {
                let (ours, theirs) = (of((way, cache)), of((peer, cache)));
                ratios.extend(compare(way, peer, cache, &ours, &theirs, subject.compared()));
            }
        }
        Summary { subject, host, state, ways, ratios, skipped }
    }

    /// The states of the page cache that were measured.
    pub fn caches(&self) -> Vec<Cache> {
        let caches = [Cache::Warm, Cache::Cold].into_iter();
        caches.filter(|cache| self.ways.iter().any(|way| way.cache == *cache)).collect()
    }

    /// The ways that were measured.
    pub fn methods(&self) -> Vec<Method> {
        let mut methods = Vec::new();
        for way in &self.ways {
            if !methods.contains(&way.way) {
                methods.push(way.way);
            }
        }
        methods
    }

    /// The spread of a quantity, if it was measured.
    pub fn spread(&self, way: Method, cache: Cache, key: &str) -> Option<&Spread> {
        let found = self.ways.iter().find(|w| w.way == way && w.cache == cache);
        found.and_then(|way| way.metrics.get(key))
    }
}

fn summarize((way, cache): (Method, Cache), samples: &[&Sample]) -> WaySummary {
    let spread = |of: fn(&Sample) -> Option<f64>| Spread::of(samples.iter().filter_map(|s| of(s)));
    let metrics = METRICS.iter().filter_map(|m| Some((m.key, spread(m.of)?))).collect();
    let mut times = samples.iter().filter_map(|sample| sample.fault_times.clone());
    let fault_times = times.next().map(|first| {
        times.fold(first, |mut all, more| {
            // All have the same bounds.
            let _ = all.add(more);
            all
        })
    });
    WaySummary { way, cache, metrics, fault_times }
}

fn compare(
    way: Method,
    peer: Method,
    cache: Cache,
    ours: &[&Sample],
    theirs: &[&Sample],
    compared: &[Metric],
) -> Vec<Ratio> {
    let ratio = |of: fn(&Sample) -> Option<f64>| {
        let pairs = ours.iter().filter_map(|our| {
            let their = theirs.iter().find(|their| their.round == our.round)?;
            Some(of(their)? / of(our)?)
        });
        Spread::of(pairs)
    };
    let to = compared.iter();
    to.filter_map(|m| Some(Ratio { way, peer, cache, to: m.key, ratio: ratio(m.of)? })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(way: Method, round: u32, running_ms: f64) -> Sample {
        let cache = Cache::Warm;
        let mut times = Histogram::new_with_bounds(1, 1_000_000, 3).unwrap();
        times.record(u64::from(round) * 1000).unwrap();
        Sample {
            way,
            cache,
            round,
            start_ms: 40.0,
            running_ms,
            first_sign_ms: None,
            nth_sign_ms: None,
            complete_ms: 0.0,
            faults: Some(1),
            fault_p50_us: None,
            fault_p99_us: None,
            fault_max_us: None,
            fill_bytes_per_s: None,
            data_bytes_per_s: None,
            server_cpu_s: None,
            qemu_cpu_s: None,
            running_rss_bytes: None,
            complete_rss_bytes: None,
            fault_times: (!way.is_peer()).then_some(times),
        }
    }

    #[test]
    fn runs_are_compared_round_by_round() {
        let samples = [
            sample(Method::Uffd, 1, 2.0),
            sample(Method::Stream, 1, 20.0),
            sample(Method::Uffd, 2, 4.0),
            sample(Method::Stream, 2, 60.0),
            // Its partner is missing.
            sample(Method::Uffd, 3, 1.0),
        ];
        let subject = Subject {
            image: "vm.snap".into(),
            identity: String::new(),
            image_bytes: 1,
            memory_bytes: 1,
            data_bytes: 1,
            qemu: String::new(),
            machine_type: String::new(),
            runs: 3,
            sign: None,
            nth: None,
            working_set_pages: None,
            domain: None,
        };
        let summary = Summary::new(subject, Host::here(), State::default(), &samples, Vec::new());
        assert_eq!(summary.methods(), [Method::Uffd, Method::Stream]);
        assert_eq!(summary.caches(), [Cache::Warm]);
        let ratio = &summary.ratios[0];
        assert_eq!((ratio.to, ratio.ratio.n), ("running", 2));
        assert_eq!((ratio.ratio.min, ratio.ratio.median, ratio.ratio.max), (10.0, 12.5, 15.0));
        assert_eq!(summary.ratios.len(), 2, "no sign of life was watched for");
        let times = summary.ways[0].fault_times.as_ref().unwrap();
        assert_eq!(times.len(), 3);
        assert!(summary.ways[1].fault_times.is_none());
    }
}
