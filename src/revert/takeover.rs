//! The way of a guest whose page server has died, with another in its place.

use super::error::RevertError;
use super::event::RevertEvent;
use super::outcome::Outcome;
use super::session::Running;
use crate::cancel::Cancellation;
use crate::keeper::Inheritance;

/// Goes on where the server has died that `inheritance` is of, and returns once all the guest's
/// memory is in place.
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
    let running = Running::inherit(inheritance, cancel)?;
    let mut resident = running.fill(&mut on_event).await?;
    resident.collapse(&mut on_event).await;
    Ok(resident.let_go().1)
}
