//! The proof that an image can be reverted: by doing it, and throwing the guest away.

use std::time::{Duration, Instant};

use super::error::RevertError;
use super::event::RevertEvent;
use super::far;
use super::journey::revert_held;
use super::options::{Delivery, RevertOptions};
use crate::cancel::Cancellation;
use crate::memory::FillDelay;

/// Reverts an image until all its memory is in place, and ends the guest then. It is cut
/// off: no network, no disk is written, its serial ports lead nowhere. Returns the time from
/// the beginning until it ran.
///
/// # Errors
/// As for [`revert`](super::revert()); also when the guest does not run at the end, unless it
/// was saved while it was paused.
pub async fn prove(
    options: &RevertOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Duration, RevertError> {
    let mut options = options.clone();
    options.rewrite.isolated = true;
    options.rewrite.overlays.ephemeral = true;
    options.standby = false;
    options.delivery = Delivery {
        working_set: false,
        collapse: false,
        fail_on_damage: true,
        // Nobody is waited for.
        fill_delay: options
            .delivery
            .fill_delay
            .or(Some(FillDelay::Fixed { fixed: Duration::ZERO })),
        ..options.delivery
    };

    let start = Instant::now();
    let mut ran_after = Duration::ZERO;
    let hear = |event| {
        if let RevertEvent::Running { .. } = event {
            ran_after = start.elapsed();
        }
        on_event(event);
    };
    let mut held = revert_held(&options, cancel, hear).await?;
    let status = held.qmp.status().await?;
    let was_running = far::image(&options)?.manifest().machine.running;
    let words = held.process.log_tail();
    let outcome = match was_running && status != "running" {
        true => Err(RevertError::not_run(status).with_end_of_qemu(None, &words)),
        false => Ok(ran_after),
    };
    held.process.kill().await;
    outcome
}
