//! The way of a guest whose page server and keeper have both died.

use super::error::RevertError;
use super::event::RevertEvent;
use super::options::ResumeOptions;
use super::outcome::Outcome;
use super::session::Running;
use crate::cancel::Cancellation;

/// Goes on with a guest whose page server and keeper have died before its memory was complete, and
/// returns once it is and, unless [`Delivery::collapse`](super::Delivery::collapse) is off, in huge
/// pages. The guest may have waited meanwhile for memory that it has touched; nothing else is lost.
///
/// Memory is put in place directly where QEMU's userfaultfd can be had, however it came before;
/// else by QEMU's socket, if it came by that before and QEMU answers. In either case QEMU's
/// migration is taken up again by its control socket (`migrate-recover`), and completes.
///
/// `cancel` is answered as [`revert`](super::revert()) does for a guest that runs.
///
/// # Errors
/// When the image can't be used, or QEMU is not one that waits for its memory: nothing was changed
/// then. When memory can't be brought: QEMU and its guest are left to wait, and may be taken up
/// again.
pub async fn resume(
    options: &ResumeOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Outcome, RevertError> {
    let running = Running::resume(options, cancel).await?;
    let mut resident = running.fill(&mut on_event).await?;
    resident.collapse(&mut on_event).await;
    Ok(resident.outcome().clone())
}
