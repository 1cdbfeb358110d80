//! One run: a guest reverted by snapback, measured until all its memory is in place.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::setup::{Run, Setup};
use super::sign::{SignError, Watch};
use super::{BenchError, Cache, Method, Sample, host};
use crate::cancel::Cancellation;
use crate::guest::Process;
use crate::host::procfs::resident_memory;
use crate::revert::{
    Delivery, Held, Outcome, Placement, Preload, RevertError, RevertEvent, RevertOptions,
    revert_held,
};

/// How snapback brings a guest back.
#[derive(Debug, Clone, Default)]
pub(super) struct How {
    pub placement: Placement,
    /// The file of the working set, which is used and recorded.
    pub working_set: Option<PathBuf>,
    pub preload: Preload,
}

impl How {
    /// As a way to be measured does it, where `working_set` is recorded already.
    fn of(method: Method, working_set: &Path) -> How {
        let recorded = || Some(working_set.to_owned());
        match method {
            // As a user has it; that it is userfaultfd is looked at afterwards.
            Method::Uffd => How::default(),
            Method::UffdWorkingSet => How { working_set: recorded(), ..How::default() },
            Method::UffdPreload => {
                How { working_set: recorded(), preload: Preload::WorkingSet, ..How::default() }
            }
            _ => How { placement: Placement::Socket, ..How::default() },
        }
    }
}

/// Measures one run of one of snapback's ways.
pub(super) async fn measure(
    setup: &Setup<'_>,
    method: Method,
    cache: Cache,
    round: u32,
    cancel: &Cancellation,
) -> Result<Sample, BenchError> {
    let run = setup.run()?;
    let working_set = working_set_of(setup, &run)?;
    setup.settle(cache, &setup.image_files)?;
    let how = How::of(method, &working_set);
    let (mut recorder, mut held) = bring_back(setup, &run, &how, cancel).await?;
    let signs = recorder.signs(&mut held.process, cancel).await;
    held.process.kill().await;
    if held.outcome.placement != Placement::Uffd && how.placement != Placement::Socket {
        let reason = recorder.placing.map_or_else(String::new, |(_, reason)| reason);
        return Err(BenchError::WayLost { way: method, reason });
    }
    Ok(recorder.sample(setup, method, cache, round, Some(&held.outcome), signs?))
}

/// The file of a run's working set. Each run begins with the same; what it adds goes with its
/// directory.
pub(super) fn working_set_of(setup: &Setup<'_>, run: &Run) -> Result<PathBuf, BenchError> {
    let working_set = run.path().join("working-set");
    match fs::copy(setup.working_set(), &working_set) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(BenchError::File { doing: "copied", path: setup.working_set(), source })
        }
        _ => Ok(working_set),
    }
}

/// Brings a guest back, all of its memory.
pub(super) async fn bring_back(
    setup: &Setup<'_>,
    run: &Run,
    how: &How,
    cancel: &Cancellation,
) -> Result<(Recorder, Held), BenchError> {
    let options = options(setup, run, how);
    let mut recorder = Recorder::new(setup, run);
    let ours = Cancellation::new();
    let mut interrupted = false;
    let held = {
        let revert = revert_held(&options, ours.clone(), |event| recorder.hear(&event));
        tokio::pin!(revert);
        loop {
            tokio::select! {
                held = &mut revert => break held,
                () = cancel.requested(), if !interrupted => {
                    interrupted = true;
                    // The guest of a run is of no use: it is ended even if it runs.
                    ours.request();
                    ours.request();
                }
            }
        }
    };
    match held {
        Ok(mut held) if interrupted => {
            held.process.kill().await;
            Err(BenchError::Interrupted)
        }
        Err(RevertError::Interrupted(_)) => Err(BenchError::Interrupted),
        held => Ok((recorder, held?)),
    }
}

/// How the guest of a run is brought back.
pub(super) fn options(setup: &Setup<'_>, run: &Run, how: &How) -> RevertOptions {
    RevertOptions {
        rewrite: run.rewrite(setup.options),
        delivery: Delivery {
            placement: how.placement,
            working_set: how.working_set.is_some(),
            working_set_file: how.working_set.clone(),
            // Nothing that a run measures comes behind it.
            collapse: false,
            fail_on_damage: true,
            ..Delivery::default()
        },
        preload: how.preload,
        ..RevertOptions::new(&setup.options.image)
    }
}

/// A point in a run.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    rss: Option<u64>,
    /// CPU time so far: QEMU's and our own.
    qemu_cpu: Option<Duration>,
    own_cpu: Option<Duration>,
}

impl Mark {
    /// This moment. The time is taken first.
    fn now(pid: i32) -> Mark {
        Mark {
            at: Instant::now(),
            rss: resident_memory(pid).ok(),
            qemu_cpu: host::cpu_time_of(pid).ok(),
            own_cpu: host::own_cpu_time().ok(),
        }
    }
}

/// Takes the times of a run.
pub(super) struct Recorder {
    sign: Option<(super::Sign, PathBuf)>,
    /// Length of the port's file before the run, in bytes.
    offset: u64,
    began: Instant,
    /// QEMU's process id, once it is ready.
    pid: i32,
    own_cpu_before: Option<Duration>,
    ready: Option<Instant>,
    running: Option<Mark>,
    complete: Option<Mark>,
    watch: Option<Result<Watch, SignError>>,
    /// By which way memory came, and why.
    pub placing: Option<(Placement, String)>,
}

impl Recorder {
    /// Time begins to run now.
    pub fn new(setup: &Setup<'_>, run: &Run) -> Recorder {
        let sign = setup.options.sign.as_ref().map(|sign| (sign.clone(), run.place(&sign.path)));
        let offset = sign
            .as_ref()
            .and_then(|(_, path)| fs::metadata(path).ok())
            .map_or(0, |meta| meta.len());
        Recorder {
            sign,
            offset,
            own_cpu_before: host::own_cpu_time().ok(),
            pid: 0,
            ready: None,
            running: None,
            complete: None,
            watch: None,
            placing: None,
            began: Instant::now(),
        }
    }

    /// Takes note of what is told.
    pub fn hear(&mut self, event: &RevertEvent) {
        match event {
            RevertEvent::QemuReady { pid } => self.ready(*pid),
            RevertEvent::Placing { placement, reason } => {
                self.placing = Some((*placement, reason.clone()));
            }
            RevertEvent::Running { .. } => self.running(),
            RevertEvent::Resident { .. } => self.complete(),
            _ => {}
        }
    }

    /// QEMU answers; its ports are there.
    pub fn ready(&mut self, pid: i32) {
        self.ready = Some(Instant::now());
        self.pid = pid;
        let start = |(sign, path): &(super::Sign, PathBuf)| Watch::start(sign, path, self.offset);
        self.watch = self.sign.as_ref().map(start);
    }

    /// The guest runs.
    fn running(&mut self) {
        self.running = Some(Mark::now(self.pid));
    }

    /// All memory is in place.
    fn complete(&mut self) {
        self.complete = Some(Mark::now(self.pid));
    }

    /// The guest runs, and all its memory was in place before.
    pub fn running_complete(&mut self) {
        self.running();
        self.complete = self.running;
    }

    /// Waits for the signs of life that were asked for; the first and the Nth.
    pub async fn signs(
        &mut self,
        process: &mut Process,
        cancel: &Cancellation,
    ) -> Result<Option<(Instant, Instant)>, BenchError> {
        let Some(watch) = self.watch.take() else { return Ok(None) };
        let mut watch = watch?;
        tokio::select! {
            signs = watch.wait() => Ok(Some(signs?)),
            Some(_) = process.wait_exit(Duration::MAX) => {
                Err(BenchError::Ended { log: process.log_tail() })
            }
            () = cancel.requested() => Err(BenchError::Interrupted),
        }
    }

    /// What the run has shown.
    pub fn sample(
        self,
        setup: &Setup<'_>,
        way: Method,
        cache: Cache,
        round: u32,
        outcome: Option<&Outcome>,
        signs: Option<(Instant, Instant)>,
    ) -> Sample {
        let ms =
            |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        // The marks are there: a run that failed has given an error instead.
        let ready = self.ready.unwrap_or(self.began);
        let running_at = self.running.map_or(ready, |mark| mark.at);
        let complete_at = self.complete.map_or(running_at, |mark| mark.at);
        let filling = complete_at.saturating_duration_since(running_at).as_secs_f64();
        let rate = |bytes: u64| (filling > 0.0).then(|| bytes as f64 / filling);
        let times = outcome.map(|outcome| &outcome.faults.timings);
        let some_times = times.filter(|times| !times.is_empty());
        let us = |quantile: f64| Some(some_times?.value_at_quantile(quantile) as f64 / 1e3);
        let own_cpu =
            self.complete.and_then(|mark| mark.own_cpu?.checked_sub(self.own_cpu_before?));
        Sample {
            way,
            cache,
            round,
            start_ms: ms(self.began, ready),
            running_ms: ms(ready, running_at),
            first_sign_ms: signs.map(|(first, _)| ms(running_at, first)),
            nth_sign_ms: signs.map(|(_, nth)| ms(running_at, nth)),
            complete_ms: ms(running_at, complete_at),
            faults: times.map(|times| times.len()),
            fault_p50_us: us(0.5),
            fault_p99_us: us(0.99),
            fault_max_us: us(1.0),
            fill_bytes_per_s: rate(setup.memory_bytes),
            data_bytes_per_s: rate(setup.data_bytes),
            server_cpu_s: own_cpu.map(|time| time.as_secs_f64()),
            qemu_cpu_s: self.complete.and_then(|mark| mark.qemu_cpu).map(|time| time.as_secs_f64()),
            running_rss_bytes: self.running.and_then(|mark| mark.rss),
            complete_rss_bytes: self.complete.and_then(|mark| mark.rss),
            fault_times: times.cloned(),
        }
    }
}
