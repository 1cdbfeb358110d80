//! The same for a QEMU that somebody else has started.

use super::error::RevertError;
use super::event::RevertEvent;
use super::options::ServeOptions;
use super::outcome::Outcome;
use super::session::Launched;
use crate::cancel::Cancellation;

/// Brings a guest back in a QEMU that somebody else started with the same machine and
/// made wait for its state. Returns once all its memory is in place and, unless
/// [`Delivery::collapse`](super::Delivery::collapse) is off, in huge pages.
///
/// # Errors
/// When the image or what connects us with QEMU fails. QEMU is then left to whoever started
/// it: it pauses the migration, and its guest waits rather than run on wrong memory.
pub async fn serve(
    options: &ServeOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Outcome, RevertError> {
    let launched = Launched::outside(options, cancel).await?;
    let armed = launched.arm(&mut on_event).await?;
    let running = armed.run(&mut on_event).await?;
    let mut resident = running.fill(&mut on_event).await?;
    resident.collapse(&mut on_event).await;
    Ok(resident.outcome().clone())
}
