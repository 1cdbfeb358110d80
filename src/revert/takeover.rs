//! The way of a guest whose page server has died, with another in its place.

use super::error::RevertError;
use super::event::RevertEvent;
use super::far;
use super::outcome::Outcome;
use super::session::{Inherited, Stage};
use crate::cancel::Cancellation;
use crate::keeper::Inheritance;

/// Goes on where the server has died that `inheritance` is of, and returns once all the guest's
/// memory is in place, and its disks if they were to follow from a repository.
///
/// `cancel` is answered as [`revert`](super::revert()) does for a guest that runs.
///
/// # Errors
/// When the guest can't be served any more. QEMU has then been ended.
pub async fn take_over(
    inheritance: Inheritance,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Outcome, RevertError> {
    let inherited = Inherited::of(inheritance, cancel).await?;
    let mut resident = match inherited.stage {
        Stage::Running(running) => {
            let mut resident = running.fill(&mut on_event).await?;
            resident.collapse(&mut on_event).await;
            resident
        }
        Stage::Resident(resident, taken_over) => {
            on_event(taken_over);
            *resident
        }
    };
    if let Some((snapshot, overlays)) = inherited.far.filter(|(far, _)| !far.disks().is_empty()) {
        far::fill_disks(&mut resident, &snapshot, &overlays, &mut on_event).await?;
    }
    Ok(resident.let_go().1)
}
