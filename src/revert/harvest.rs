//! A working set recorded by a revert that is thrown away.

use std::time::Duration;

use super::error::RevertError;
use super::event::RevertEvent;
use super::journey::revert_held;
use super::options::{Delivery, Preload, RevertOptions};
use crate::cancel::Cancellation;
use crate::image::Image;
use crate::memory::{WorkingSet, working_set};

/// Reverts an image, and records what its guest asks for in the first `window` as the image's
/// working set, in place of an older one. The guest is isolated: it has no network, writes no
/// disk, and its serial ports lead nowhere. It is ended when its memory is complete.
///
/// # Errors
/// As for [`revert`](super::revert()); also when the working set can't be written.
pub async fn harvest(
    options: &RevertOptions,
    window: Duration,
    cancel: Cancellation,
    on_event: impl FnMut(RevertEvent) + Send,
) -> Result<WorkingSet, RevertError> {
    let mut options = options.clone();
    options.rewrite.isolated = true;
    options.rewrite.overlays.ephemeral = true;
    options.preload = Preload::Nothing;
    options.standby = false;
    options.delivery = Delivery {
        hold: Some(window),
        working_set: false,
        collapse: false,
        fail_on_damage: true,
        ..options.delivery
    };
    let mut held = revert_held(&options, cancel, on_event).await?;
    held.process.kill().await;

    let image = Image::open(&options.image)?;
    let (identity, demanded) = (image.identity(), held.outcome.demanded());
    let set = WorkingSet::following(None, identity, demanded, &image.manifest().blocks);
    let set = set.ok_or(RevertError::NothingDemanded)?;
    set.store(&working_set::path_for(&options.image))?;
    Ok(set)
}
