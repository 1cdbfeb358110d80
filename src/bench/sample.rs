//! What one run has shown, and the quantities that are compared.

use hdrhistogram::Histogram;
use schemars::JsonSchema;
use serde::{Serialize, Serializer};

use super::Cache;

/// A way of bringing a guest back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// snapback, by userfaultfd, without a working set.
    Uffd,
    /// snapback, by userfaultfd, with the recorded working set.
    UffdWorkingSet,
    /// The same, where the guest runs only once its working set is in place.
    UffdPreload,
    /// snapback, by QEMU's postcopy socket, without a working set.
    Socket,
    /// snapback, a guest that waits, as a pool keeps it.
    Pool,
    /// snapback, inside the guest's own QEMU: a reset.
    Reset,
    /// QEMU's `-incoming` from a file that holds a migration stream.
    Stream,
    /// QEMU's `-incoming` from a file made with the capability `mapped-ram`.
    MappedRam,
    /// The same with the capability `multifd`.
    MappedRamMultifd,
    /// QEMU's `loadvm` from a qcow2 disk.
    LoadVm,
}

impl Method {
    /// The name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Method::Uffd => "uffd",
            Method::UffdWorkingSet => "uffd+ws",
            Method::UffdPreload => "uffd+preload",
            Method::Socket => "socket",
            Method::Pool => "pool",
            Method::Reset => "reset",
            Method::Stream => "stream",
            Method::MappedRam => "mapped-ram",
            Method::MappedRamMultifd => "mapped-ram+multifd",
            Method::LoadVm => "loadvm",
        }
    }

    /// Whether it is QEMU's own, to which snapback is compared.
    pub fn is_peer(self) -> bool {
        use Method::*;
        matches!(self, Stream | MappedRam | MappedRamMultifd | LoadVm)
    }

    /// What it does, in a sentence.
    pub fn explanation(self) -> &'static str {
        match self {
            Method::Uffd => "snapback, pages installed by userfaultfd, no working set",
            Method::UffdWorkingSet => "the same, the recorded working set first",
            Method::UffdPreload => "the same, the guest runs once its working set is in place",
            Method::Socket => "snapback, pages sent by QEMU's postcopy socket, no working set",
            Method::Pool => {
                "snapback, a guest that waits with its working set in place is had to run"
            }
            Method::Reset => "snapback, a reset inside the guest's own QEMU, which has run",
            Method::Stream => "QEMU loads a migration stream from a file",
            Method::MappedRam => "QEMU loads a mapped-ram file",
            Method::MappedRamMultifd => "QEMU loads a mapped-ram file by multifd, 2 channels",
            Method::LoadVm => "QEMU loads a snapshot in a qcow2 disk (loadvm)",
        }
    }
}

impl JsonSchema for Method {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Method".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        String::json_schema(generator)
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What one run has shown. Fields that don't apply, or could not be measured, are absent.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Sample {
    /// How the guest was brought back.
    pub way: Method,
    /// Whether the files were in the page cache.
    pub cache: Cache,
    /// The round of runs that it belongs to, from 1.
    pub round: u32,
    /// From the start of the revert until QEMU's QMP answers, in milliseconds.
    pub start_ms: f64,
    /// From then until the guest runs (QEMU's event RESUME), in milliseconds.
    pub running_ms: f64,
    /// From then until the guest's first sign of life, in milliseconds.
    pub first_sign_ms: Option<f64>,
    /// From running until the Nth sign, in milliseconds.
    pub nth_sign_ms: Option<f64>,
    /// From running until all memory is in place, in milliseconds; 0 where it was all
    /// loaded before.
    pub complete_ms: f64,
    /// Demand faults that had to be answered with a page.
    pub faults: Option<u64>,
    /// How long answering one took: median, in microseconds.
    pub fault_p50_us: Option<f64>,
    /// The same: the 99th percentile.
    pub fault_p99_us: Option<f64>,
    /// The same: the longest.
    pub fault_max_us: Option<f64>,
    /// Memory brought a second from running to complete, zeros included, in bytes.
    pub fill_bytes_per_s: Option<f64>,
    /// The same, only pages that are not all zeros.
    pub data_bytes_per_s: Option<f64>,
    /// CPU time of this program from the start until complete, in seconds.
    pub server_cpu_s: Option<f64>,
    /// CPU time of QEMU, the guest's included, until complete, in seconds.
    pub qemu_cpu_s: Option<f64>,
    /// QEMU's resident memory when the guest ran, in bytes.
    pub running_rss_bytes: Option<u64>,
    /// The same when all memory was in place.
    pub complete_rss_bytes: Option<u64>,
    /// The times of all answers to faults, in nanoseconds.
    #[serde(skip)]
    pub fault_times: Option<Histogram<u64>>,
}

/// In what a quantity is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Microseconds.
    Us,
    /// Seconds.
    Seconds,
    /// Pieces.
    Count,
    /// Bytes, shown as MiB.
    Bytes,
    /// Bytes a second, shown as MiB/s.
    Rate,
    /// One thing divided by another.
    Ratio,
}

impl Unit {
    /// The unit's sign, as shown.
    pub fn sign(self) -> &'static str {
        match self {
            Unit::Ms => "ms",
            Unit::Us => "µs",
            Unit::Seconds => "s",
            Unit::Count | Unit::Ratio => "",
            Unit::Bytes => "MiB",
            Unit::Rate => "MiB/s",
        }
    }

    /// A value as shown, without its unit.
    pub fn show(self, value: f64) -> String {
        let value = match self {
            Unit::Bytes | Unit::Rate => value / f64::from(1 << 20),
            _ => value,
        };
        match self {
            Unit::Count => format!("{value:.0}"),
            Unit::Seconds => format!("{value:.2}"),
            Unit::Ratio if value < 9.995 => format!("{value:.2}"),
            _ if value.abs() < 99.95 => format!("{value:.1}"),
            _ => format!("{value:.0}"),
        }
    }
}

/// A quantity that runs are compared by.
pub struct Metric {
    /// Its name in JSON, the field's of [`Sample`].
    pub key: &'static str,
    /// What it is, in short.
    pub title: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// Its group: quantities of one group are shown together.
    pub group: &'static str,
    /// Its value in a run.
    pub of: fn(&Sample) -> Option<f64>,
}

/// All quantities.
pub const METRICS: &[Metric] = &[
    metric("start_ms", "start → QEMU ready", Unit::Ms, "Times", |s| Some(s.start_ms)),
    metric("running_ms", "ready → running", Unit::Ms, "Times", |s| Some(s.running_ms)),
    metric("complete_ms", "running → complete", Unit::Ms, "Times", |s| Some(s.complete_ms)),
    metric("first_sign_ms", "running → first sign", Unit::Ms, "Signs of life", |s| {
        s.first_sign_ms
    }),
    metric("nth_sign_ms", "running → Nth sign", Unit::Ms, "Signs of life", |s| s.nth_sign_ms),
    metric("faults", "answered", Unit::Count, "Demand faults", |s| s.faults.map(|n| n as f64)),
    metric("fault_p50_us", "p50", Unit::Us, "Demand faults", |s| s.fault_p50_us),
    metric("fault_p99_us", "p99", Unit::Us, "Demand faults", |s| s.fault_p99_us),
    metric("fault_max_us", "longest", Unit::Us, "Demand faults", |s| s.fault_max_us),
    metric("fill_bytes_per_s", "all memory", Unit::Rate, "Fill rate", |s| s.fill_bytes_per_s),
    metric("data_bytes_per_s", "data only", Unit::Rate, "Fill rate", |s| s.data_bytes_per_s),
    metric("server_cpu_s", "snapback", Unit::Seconds, "CPU until complete", |s| s.server_cpu_s),
    metric("qemu_cpu_s", "QEMU and guest", Unit::Seconds, "CPU until complete", |s| s.qemu_cpu_s),
    metric("running_rss_bytes", "when running", Unit::Bytes, "QEMU's memory", |s| {
        s.running_rss_bytes.map(|bytes| bytes as f64)
    }),
    metric("complete_rss_bytes", "when complete", Unit::Bytes, "QEMU's memory", |s| {
        s.complete_rss_bytes.map(|bytes| bytes as f64)
    }),
];

/// The times, from QEMU being ready, by which ways are compared to peers.
pub(super) const COMPARED: &[Metric] = &[
    metric("running", "ready → running", Unit::Ms, "", |s| Some(s.running_ms)),
    metric("first_sign", "ready → first sign", Unit::Ms, "", |s| {
        Some(s.running_ms + s.first_sign_ms?)
    }),
    metric("nth_sign", "ready → Nth sign", Unit::Ms, "", |s| Some(s.running_ms + s.nth_sign_ms?)),
    metric("complete", "ready → complete", Unit::Ms, "", |s| Some(s.running_ms + s.complete_ms)),
];

const fn metric(
    key: &'static str,
    title: &'static str,
    unit: Unit,
    group: &'static str,
    of: fn(&Sample) -> Option<f64>,
) -> Metric {
    Metric { key, title, unit, group, of }
}
