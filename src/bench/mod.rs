//! Measures ways of reverting a guest on this machine.
//!
//! An image is reverted repeatedly, by each of snapback's ways and optionally by QEMU's own, from
//! files made from the same guest. The ways take turns, so that drift of the machine affects all
//! alike. Each run has its own QEMU and directory, which are gone when it ends. `docs/bench.md`
//! explains the quantities.

mod cache;
mod compare;
mod directory;
mod domains;
mod host;
mod peers;
mod record;
pub mod report;
mod resets;
mod runs;
mod sample;
mod setup;
mod sign;
mod state;
mod stats;
mod summary;
pub mod tables;
mod takes;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

pub use cache::Cache;
pub use compare::{Change, CompareError, Comparison, Verdict, compare};
pub use host::Host;
pub use record::{Record, csv};
pub use sample::{METRICS, Method, Metric, Sample, Unit};
pub use sign::{Sign, SignError};
pub use state::State;
pub use stats::Spread;
pub use summary::{Ratio, Subject, Summary, WaySummary};

use self::domains::Domains;
use self::peers::Peer;
use self::runs::{How, bring_back};
use self::setup::Setup;
use self::state::Watch;
use crate::cancel::Cancellation;
use crate::guest::GuestError;
use crate::guest::NewPort;
use crate::image::{Image, ImageError};
use crate::kind::{Details, ErrorKind};
use crate::libvirt::{DomainAddress, LibvirtError};
use crate::memory::WorkingSet;
use crate::qmp::QmpError;
use crate::revert::{Placement, RevertError};

/// What to measure.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BenchOptions {
    /// The image.
    pub image: PathBuf,
    /// Runs of each way, at least 1.
    pub runs: u32,
    /// Rounds ahead of the runs that don't count.
    pub warm_up: u32,
    /// The processors on which this process and all QEMUs are, where they were chosen: this only
    /// tells it.
    pub pinned: Option<String>,
    /// Whether QEMU's own ways are measured too.
    pub peers: bool,
    /// Whether each way is also measured with the page cache cold.
    pub cold: bool,
    /// Another QEMU binary than the recorded one.
    pub qemu: Option<PathBuf>,
    /// `(OLD, NEW)`: as [`RewriteOptions::paths`]; `{run}` in NEW stands for each run's
    /// directory. Sockets and output files that no rule maps go to that directory under their
    /// own names.
    ///
    /// [`RewriteOptions::paths`]: crate::guest::RewriteOptions::paths
    pub paths: Vec<(String, String)>,
    /// As [`RewriteOptions::ports`].
    ///
    /// [`RewriteOptions::ports`]: crate::guest::RewriteOptions::ports
    pub ports: Vec<(u16, NewPort)>,
    /// The signs of life to wait for.
    pub sign: Option<Sign>,
    /// More arguments for QEMU.
    pub extra: Vec<String>,
    /// Revert the image as siblings of this domain of libvirt's, beside libvirt's own ways where
    /// `peers` is set. Of the other options, `runs`, `cold` and `paths` count.
    pub domain: Option<DomainAddress>,
}

impl BenchOptions {
    /// Ten warm runs of each of snapback's ways, and none of QEMU's own.
    pub fn new(image: impl Into<PathBuf>) -> BenchOptions {
        BenchOptions {
            image: image.into(),
            runs: 10,
            warm_up: 1,
            pinned: None,
            peers: false,
            cold: false,
            qemu: None,
            paths: Vec::new(),
            ports: Vec::new(),
            sign: None,
            extra: Vec::new(),
            domain: None,
        }
    }
}

/// A way that is not measured.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Skipped {
    /// The way.
    pub way: Method,
    /// Why.
    pub reason: String,
}

/// What happens during a bench.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum BenchEvent {
    /// The guest is brought back once or more, to find out and to record.
    Preparing {
        /// What for.
        what: String,
    },
    /// A way is not measured.
    Skipped(Skipped),
    /// What makes figures worse than they could be, or harder to repeat.
    Warning {
        /// What.
        says: String,
    },
    /// One run has been measured.
    Run(Box<Sample>),
}

/// Why a bench failed. All QEMUs that it started have been ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The guest does not run when it is reverted.
    #[error(
        "the guest was paused when it was saved, or -S was given: it would not run, and there is nothing to measure"
    )]
    Paused,
    /// A run failed.
    #[error(
        "{0}\n(each run starts another QEMU on this host; what two QEMUs can't share is replaced by \
         `BenchOptions::paths`, OLD={{run}}/NEW for a path, HOST:PORT=HOST:OTHER for a port)"
    )]
    Revert(#[from] RevertError),
    /// QEMU can't be started as recorded.
    #[error(transparent)]
    Vm(#[from] GuestError),
    /// libvirt failed, or refuses.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The domain's definition can't be used.
    #[error("{0}")]
    Definition(String),
    /// QEMU's control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest's signs of life.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// One of QEMU's own ways failed.
    #[error(
        "QEMU failed to {doing} in a way of its own (measure without `BenchOptions::peers`): {said}"
    )]
    Peer {
        /// The operation.
        doing: &'static str,
        /// QEMU's message.
        said: String,
    },
    /// A run went by another way than those before it.
    #[error("in a run of `{}` memory went by socket: {reason}", way.name())]
    WayLost {
        /// The way that was to be measured.
        way: Method,
        /// Why it was not taken.
        reason: String,
    },
    /// QEMU ended during a run.
    #[error("QEMU ended while signs of life of its guest were awaited; it says: {log}")]
    Ended {
        /// The end of its log.
        log: String,
    },
    /// A file of ours can't be used.
    #[error("`{path}` can't be {doing}: {source}", path = path.display())]
    File {
        /// The operation.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file can't be made cold.
    #[error(
        "{percent} % of `{path}` stay in the page cache, so there are no cold runs: its file \
         system lives in memory, or another process uses it", path = path.display()
    )]
    NotCold {
        /// The file.
        path: PathBuf,
        /// How much of it stays.
        percent: u64,
    },
    /// The guest writes to a disk that runs would change.
    #[error(
        "the guest writes to the disk {disk}, which each run would change and which can't be \
         copied: give each run its own with `BenchOptions::paths` OLD={{run}}/NEW, or one that may be changed"
    )]
    Disk {
        /// The disk as the image names it.
        disk: String,
    },
    /// The bench was cancelled.
    #[error("interrupted: all QEMUs that were started have been ended")]
    Interrupted,
}

impl BenchError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use BenchError::*;
        match self {
            Image(error) => error.kind(),
            Revert(error) => error.kind(),
            Vm(error) => error.kind(),
            Qmp(error) => error.kind(),
            Libvirt(error) => error.kind(),
            Definition(_) => ErrorKind::InputInvalid,
            Sign(error) => error.kind(),
            File { source, .. } => ErrorKind::of_io(source),
            Ended { .. } => ErrorKind::QemuEnded,
            Paused => ErrorKind::GuestState,
            Interrupted => ErrorKind::Interrupted,
            _ => ErrorKind::QemuFailed,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use BenchError::*;
        let path = match self {
            Image(error) => return error.details(),
            Revert(error) => return error.details(),
            Vm(error) => return error.details(),
            Qmp(error) => return error.details(),
            Libvirt(error) => return error.details(),
            Sign(error) => return error.details(),
            File { path, .. } | NotCold { path, .. } => Some(path),
            _ => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

/// What a bench has shown.
#[derive(Debug)]
pub struct Measured {
    /// The spreads and the comparisons.
    pub summary: Summary,
    /// Each run.
    pub runs: Vec<Sample>,
}

/// Measures an image. `on_event` is called as things happen.
///
/// # Errors
/// When a run fails, or when it is cancelled. All QEMUs and files are gone by then.
pub async fn bench(
    options: &BenchOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(BenchEvent),
) -> Result<Measured, BenchError> {
    let setup = Setup::new(options)?;
    let mut caches = vec![Cache::Warm];
    if options.cold {
        // A file that can't be made cold is refused before hours of runs.
        setup.image_files.iter().try_for_each(|file| Cache::Cold.prepare(file))?;
        caches.push(Cache::Cold);
    }
    let (entrants, recorded) = match &options.domain {
        Some(domain) => enter_domains(Domains::new(&setup, domain), &cancel, &mut on_event).await?,
        None => enter(&setup, &cancel, &mut on_event).await?,
    };
    for skipped in &recorded.skipped {
        on_event(BenchEvent::Skipped(skipped.clone()));
    }
    if options.warm_up > 0 {
        on_event(BenchEvent::Preparing { what: "rounds that don't count".into() });
    }
    for round in 1..=options.warm_up {
        for method in &recorded.methods {
            entrants.measure(&setup, *method, Cache::Warm, round, &cancel).await?;
        }
    }
    let watch = Watch::begin(options.pinned.clone());
    let warn = |says| BenchEvent::Warning { says };
    let known = watch.state().warnings();
    known.iter().cloned().map(warn).for_each(&mut on_event);
    let mut samples = Vec::new();
    for round in 1..=options.runs {
        for &cache in &caches {
            for method in &recorded.methods {
                let sample = entrants.measure(&setup, *method, cache, round, &cancel).await?;
                on_event(BenchEvent::Run(Box::new(sample.clone())));
                samples.push(sample);
            }
        }
    }
    let subject = Subject {
        image: options.image.display().to_string(),
        identity: setup.identity.clone(),
        image_bytes: setup.image_bytes,
        memory_bytes: setup.memory_bytes,
        data_bytes: setup.data_bytes,
        qemu: recorded.qemu,
        machine_type: setup.machine.machine_type.clone(),
        runs: options.runs,
        sign: options.sign.as_ref().map(|sign| sign.pattern.to_string()),
        nth: options.sign.as_ref().map(|sign| sign.nth),
        working_set_pages: recorded.working_set_pages,
        domain: options.domain.as_ref().map(|domain| domain.domain.clone()),
    };
    let state = watch.end();
    let news = state.warnings().into_iter().filter(|says| !known.contains(says));
    news.map(warn).for_each(&mut on_event);
    let summary = Summary::new(subject, Host::here(), state, &samples, recorded.skipped);
    Ok(Measured { summary, runs: samples })
}

/// Finds out which ways there are, and makes what QEMU's own load.
async fn enter<'a>(
    setup: &'a Setup<'a>,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(BenchEvent),
) -> Result<(Entrants<'a>, Recorded), BenchError> {
    on_event(BenchEvent::Preparing { what: "recording a working set".into() });
    let mut recorded = record(setup, cancel).await?;
    let mut peers = Vec::new();
    if setup.options.peers {
        let making = |way: Method| on_event(making(way));
        let (made, more) = peers::make(setup, cancel, making).await?;
        recorded.skipped.extend(more);
        recorded.methods.extend(made.iter().map(|peer| peer.method));
        peers = made;
    }
    Ok((Entrants::Guests(peers), recorded))
}

/// The same of a domain.
async fn enter_domains<'a>(
    mut domains: Domains<'a>,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(BenchEvent),
) -> Result<(Entrants<'a>, Recorded), BenchError> {
    on_event(BenchEvent::Preparing { what: "bringing the domain back".into() });
    let (mut methods, mut skipped) = domains.try_out(cancel).await?;
    if domains.has_peers() {
        on_event(making(Method::DomainRestore));
        let (made, more) = domains.make_peers(cancel).await?;
        methods.extend(made);
        skipped.extend(more);
    }
    let qemu = domains.qemu();
    let recorded = Recorded { methods, skipped, qemu, working_set_pages: None };
    Ok((Entrants::Domains(Box::new(domains)), recorded))
}

fn making(way: Method) -> BenchEvent {
    BenchEvent::Preparing { what: format!("making what {} loads", way.name()) }
}

/// What takes turns.
enum Entrants<'a> {
    /// Guests of ours, beside QEMU's own ways.
    Guests(Vec<Peer>),
    /// A domain of libvirt's, beside libvirt's own.
    Domains(Box<Domains<'a>>),
}

impl Entrants<'_> {
    async fn measure(
        &self,
        setup: &Setup<'_>,
        method: Method,
        cache: Cache,
        round: u32,
        cancel: &Cancellation,
    ) -> Result<Sample, BenchError> {
        let peers = match self {
            Entrants::Domains(domains) => {
                return domains.measure(method, cache, round, cancel).await;
            }
            Entrants::Guests(peers) => peers,
        };
        if let Some(peer) = peers.iter().find(|peer| peer.method == method) {
            return peers::measure(setup, peer, cache, round, cancel).await;
        }
        match method {
            Method::Pool => takes::measure(setup, cache, round, cancel).await,
            Method::Reset => resets::measure(setup, cache, round, cancel).await,
            _ => runs::measure(setup, method, cache, round, cancel).await,
        }
    }
}

/// What the first reverts found out.
struct Recorded {
    /// The ways that work here, in the order in which they take turns.
    methods: Vec<Method>,
    skipped: Vec<Skipped>,
    /// QEMU's version and package.
    qemu: String,
    working_set_pages: Option<u64>,
}

/// Reverts whose demands are the working set of the runs that count: the second adds
/// what the first has missed.
const RECORDINGS: u32 = 2;

/// Records a working set as a user's first reverts would, and finds out which ways
/// there are and whether the guest gives signs of life.
async fn record(setup: &Setup<'_>, cancel: &Cancellation) -> Result<Recorded, BenchError> {
    let working_set = setup.working_set();
    let how = How { working_set: Some(working_set.clone()), ..How::default() };
    let (mut placing, mut qemu) = (None, String::new());
    for _ in 0..RECORDINGS {
        let run = setup.run()?;
        let (mut recorder, mut held) = bring_back(setup, &run, &how, cancel).await?;
        let signs = recorder.signs(&mut held.process, cancel).await;
        held.process.kill().await;
        signs?;
        let version = held.qmp.version();
        qemu = format!("{version} {}", version.package).trim_end().to_owned();
        placing = recorder.placing;
    }
    let by_uffd = [Method::Uffd, Method::UffdWorkingSet, Method::UffdPreload];
    let (mut methods, mut skipped) = (Vec::new(), Vec::new());
    match placing {
        Some((Placement::Uffd, _)) => methods.extend(by_uffd),
        placing => {
            let reason = placing.map_or_else(String::new, |(_, reason)| reason);
            skipped.extend(by_uffd.map(|way| Skipped { way, reason: reason.clone() }));
        }
    }
    methods.extend([Method::Socket, Method::Pool]);
    match resets::lack(setup, cancel).await? {
        None => methods.push(Method::Reset),
        Some(reason) => skipped.push(Skipped { way: Method::Reset, reason }),
    }
    Ok(Recorded { methods, skipped, qemu, working_set_pages: pages_in(setup, &working_set)? })
}

/// How many pages the recorded working set has; nothing where the guest asked for none.
fn pages_in(setup: &Setup<'_>, path: &std::path::Path) -> Result<Option<u64>, BenchError> {
    let image = Image::open(&setup.options.image)?;
    let set = WorkingSet::load(path, image.identity(), &image.manifest().blocks);
    Ok(set.ok().map(|set| set.pages.len() as u64))
}
