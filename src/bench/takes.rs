//! One take: a guest that waits, as a pool keeps it, is had to run.

use super::runs::{How, Recorder, options, working_set_of};
use super::setup::{Run, Setup};
use super::{BenchError, Cache, Method, Sample};
use crate::cancel::Cancellation;
use crate::revert::session::{Armed, Planned};
use crate::revert::{Preload, RevertError, RevertOptions};

/// Measures one take: of a guest that stands still ahead of its first instruction with its working
/// set in place. It is measured from the request on; its QEMU has loaded it already.
pub(super) async fn measure(
    setup: &Setup<'_>,
    cache: Cache,
    round: u32,
    cancel: &Cancellation,
) -> Result<Sample, BenchError> {
    let run = setup.run()?;
    let working_set = working_set_of(setup, &run)?;
    setup.settle(cache, &setup.image_files)?;
    let how =
        How { working_set: Some(working_set), preload: Preload::WorkingSet, ..How::default() };
    let options = RevertOptions { standby: true, ..options(setup, &run, &how) };
    tokio::select! {
        sample = take(setup, &run, &options, cache, round, cancel) => sample,
        // The guest is of no use: it ends with what is dropped.
        () = cancel.requested() => Err(BenchError::Interrupted),
    }
}

async fn take(
    setup: &Setup<'_>,
    run: &Run,
    options: &RevertOptions,
    cache: Cache,
    round: u32,
    cancel: &Cancellation,
) -> Result<Sample, BenchError> {
    let armed = arm(options).await?;
    let mut recorder = Recorder::new(setup, run);
    recorder.ready(armed.pid().unwrap_or_default());
    let hear = &mut |event| recorder.hear(&event);
    let resident = armed.run(hear).await?.fill(hear).await?;
    let held = resident.into_held().ok_or(RevertError::Interrupted("QEMU is not ours"));
    let mut held = held?;
    let signs = recorder.signs(&mut held.process, cancel).await;
    held.process.kill().await;
    Ok(recorder.sample(setup, Method::Pool, cache, round, Some(&held.outcome), signs?))
}

async fn arm(options: &RevertOptions) -> Result<Armed, RevertError> {
    let tell = &mut |_| {};
    let planned = Planned::new(options, Cancellation::new(), tell).await?;
    planned.launch(tell).await?.arm(tell).await
}
