//! One reset: a guest that was brought back and has run is taken back inside its QEMU.

use super::runs::{How, Recorder, options};
use super::setup::{Run, Setup};
use super::{BenchError, Cache, Method, Sample};
use crate::cancel::Cancellation;
use crate::revert::session::Resettable;
use crate::revert::{Held, RevertError, revert_resettable};

/// Measures one reset: of a guest that has run until its memory was in place, and is asked to go
/// back from there. It is measured from the request on; its QEMU runs already.
pub(super) async fn measure(
    setup: &Setup<'_>,
    cache: Cache,
    round: u32,
    cancel: &Cancellation,
) -> Result<Sample, BenchError> {
    let run = setup.run()?;
    setup.settle(cache, &setup.image_files)?;
    let mut resettable = bring_back(setup, &run, cancel).await?;
    let mut recorder = Recorder::new(setup, &run);
    recorder.ready(resettable.pid().unwrap_or_default());
    resettable.reset().await?;
    recorder.running_complete();
    let mut held = held(resettable)?;
    let signs = recorder.signs(&mut held.process, cancel).await;
    held.process.kill().await;
    Ok(recorder.sample(setup, Method::Reset, cache, round, None, signs?))
}

/// Why the image's guest can't be reset so; none where it can.
pub(super) async fn lack(
    setup: &Setup<'_>,
    cancel: &Cancellation,
) -> Result<Option<String>, BenchError> {
    let run = setup.run()?;
    let reset = match bring_back(setup, &run, cancel).await {
        Ok(mut resettable) => resettable.reset().await.map(drop),
        Err(BenchError::Revert(error)) => Err(error),
        Err(error) => return Err(error),
    };
    match reset {
        Ok(()) => Ok(None),
        Err(RevertError::Reset(error)) => Ok(Some(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// Brings the guest back, such that it can be reset.
async fn bring_back(
    setup: &Setup<'_>,
    run: &Run,
    cancel: &Cancellation,
) -> Result<Resettable, BenchError> {
    let options = options(setup, run, &How::default());
    tokio::select! {
        resettable = revert_resettable(&options, Cancellation::new(), |_| {}) => Ok(resettable?),
        // The guest is of no use: it ends with what is dropped.
        () = cancel.requested() => Err(BenchError::Interrupted),
    }
}

/// The QEMU of a guest that needs no more resets.
fn held(resettable: Resettable) -> Result<Held, RevertError> {
    resettable.into_held().ok_or(RevertError::Interrupted("QEMU is not ours"))
}
