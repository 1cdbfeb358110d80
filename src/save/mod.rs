//! Taking a snapshot of a running guest: checks first, then a pause of milliseconds in
//! which its disks are frozen, then its memory is received while it runs on.

mod access;
mod address;
mod agent;
mod check;
mod checked;
mod collapse;
mod error;
mod event;
mod finish;
mod migration;
mod moment;
mod options;
mod overlay_error;
mod overlays;
mod pause;
mod prefault;
mod prepare;
mod quiesce;
mod receive;
mod recover;
mod release;
mod resettable;
mod saving;
mod settings;
mod take;
mod undo;

use self::finish::Written;
use self::saving::Saving;
use crate::cancel::Cancellation;
use crate::image::Saved;
use crate::reset::ResetError;

pub use address::GuestAddress;
pub use check::error::{CheckError, Obstacle};
pub use check::{CheckItem, check};
pub use error::SaveError;
pub use event::{PauseParts, SaveEvent, SwitchedDisk};
pub use options::{DiskChoice, Quiesce, SaveOptions};
pub use overlay_error::OverlayError;
pub use recover::{Recovered, recover};
pub use resettable::SavedGuest;
pub use undo::error::{JournalError, LeftOver};

/// Saves a guest while it runs, and returns once the image is whole.
///
/// A guest with disks to capture is stopped; its disks are switched to overlays, QEMU
/// begins a background snapshot, and the guest goes on, all within one pause. What can be
/// done ahead of the pause is done ahead. Any other guest is never stopped by us.
///
/// **A guest whose disks were captured lives in the overlays from then on**, whose paths
/// [`SaveEvent::Saved`] tells: see [`SwitchedDisk`].
///
/// The first request of `cancel` ends the save: the guest runs on and no image is left. QEMU
/// before 8.1 has to send all memory before it lets go of the guest (see
/// [`SaveEvent::Draining`]); a second request doesn't wait for that, and may leave the guest
/// hanging.
///
/// # Errors
/// See [`SaveError`]; [`SaveError::StillFrozen`] leaves a whole image. Whatever else fails,
/// the guest runs on as before, its disks and migration settings are what they were, and
/// nothing is left behind. After a SIGKILL, [`recover`] does all that.
pub async fn save(
    options: &SaveOptions,
    cancel: Cancellation,
    on_event: impl FnMut(SaveEvent),
) -> Result<Saved, SaveError> {
    let mut saving = Saving::begin(options, cancel, on_event).await?;
    match saving.carry_out().await {
        Ok(written) => saving.succeed(written),
        Err(error) => Err(saving.fail(error).await),
    }
}

/// As [`save`], and then the guest, which goes on in its QEMU, can be taken back to the image there
/// ([`SavedGuest::reset`]). [`SaveOptions::resettable`] is taken for set. It returns once it is known
/// what the guest has written since the moment, for which all its memory is compared with the image.
///
/// # Errors
/// As [`save`]. Where the image is whole, but the guest can't be reset, that is told beside it: the
/// guest runs on as behind any save.
pub async fn save_resettable(
    options: &SaveOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(SaveEvent),
) -> Result<(Saved, Result<SavedGuest, ResetError>), SaveError> {
    let options = SaveOptions { resettable: true, ..options.clone() };
    let mut saving = Saving::begin(&options, cancel.clone(), &mut on_event).await?;
    let mut written = match saving.carry_out().await {
        Ok(written) => written,
        Err(error) => return Err(saving.fail(error).await),
    };
    let guest = saving.to_be_reset(&mut written);
    let saved = saving.succeed(written)?;
    let guest = SavedGuest::begin(guest, &options, &cancel).await;
    if let Ok(guest) = &guest {
        on_event(SaveEvent::Resettable { written: guest.written() });
    }
    Ok((saved, guest))
}

impl<F: FnMut(SaveEvent)> Saving<'_, F> {
    async fn carry_out(&mut self) -> Result<Written, SaveError> {
        self.set_up().await?;
        self.prepare().await?;
        let (received, moment) = self.take().await?;
        let written = self.write(received, moment).await?;
        self.note_definition().await;
        Ok(written)
    }
}
