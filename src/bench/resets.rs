//! One reset: a guest that was brought back and has run is taken back inside its QEMU.

use super::runs::{How, Recorder, options};
use super::setup::Setup;
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
    let options = options(setup, &run, &How::default());
    let mut resettable = tokio::select! {
        resettable = revert_resettable(&options, Cancellation::new(), |_| {}) => resettable?,
        // The guest is of no use: it ends with what is dropped.
        () = cancel.requested() => return Err(BenchError::Interrupted),
    };
    let mut recorder = Recorder::new(setup, &run);
    recorder.ready(resettable.pid().unwrap_or_default());
    resettable.reset().await?;
    recorder.running_complete();
    let mut held = held(resettable)?;
    let signs = recorder.signs(&mut held.process, cancel).await;
    held.process.kill().await;
    Ok(recorder.sample(setup, Method::Reset, cache, round, None, signs?))
}

/// The QEMU of a guest that needs no more resets.
fn held(resettable: Resettable) -> Result<Held, RevertError> {
    resettable.into_held().ok_or(RevertError::Interrupted("QEMU is not ours"))
}
