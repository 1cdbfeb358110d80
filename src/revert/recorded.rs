//! The working set of an image: read before a revert, recorded after it.

use std::path::PathBuf;

use super::broker::Broker;
use super::options::Delivery;
use super::outcome::Outcome;
use crate::image::Image;
use crate::memory::{WorkingSet, WorkingSetError, working_set};

/// The image's working set, if it is wanted and can be used. It is a hint: a failure to read
/// it is only logged.
pub(super) fn recall(delivery: &Delivery, image: &Image) -> Option<WorkingSet> {
    if !delivery.working_set {
        return None;
    }
    let path = path(delivery, image)?;
    match WorkingSet::load(&path, image.identity(), &image.manifest().blocks) {
        Ok(set) => Some(set),
        Err(WorkingSetError::None(_)) => None,
        Err(error) => {
            tracing::warn!("reverting without a working set: {error}");
            None
        }
    }
}

/// Records the working set that a revert has shown, by the broker of a process in a sandbox. A
/// failure to write it is only logged.
pub(super) fn remember(
    broker: Option<&Broker>,
    delivery: &Delivery,
    image: &Image,
    outcome: &Outcome,
) {
    if !delivery.working_set {
        return;
    }
    let before = recall(delivery, image);
    let (identity, blocks) = (image.identity(), &image.manifest().blocks);
    let next = WorkingSet::following(before.as_ref(), identity, outcome.demanded(), blocks);
    let Some((next, path)) = next.zip(path(delivery, image)) else { return };
    let stored = match broker {
        None => next.store(&path),
        Some(broker) => broker
            .store_working_set(&next.encode())
            .map_err(|source| WorkingSetError::Io { path, doing: "written", source }),
    };
    if let Err(error) = stored {
        tracing::info!("the working set is not recorded: {error}");
    }
}

/// The file of the working set, where the image has one.
pub(super) fn path(delivery: &Delivery, image: &Image) -> Option<PathBuf> {
    let named = delivery.working_set_file.clone();
    named.or_else(|| image.path().map(working_set::path_for))
}
