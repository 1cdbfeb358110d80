//! Taking a snapshot of a running guest: checks first, then a pause of milliseconds in
//! which its disks are frozen, then its memory is received while it runs on.

mod access;
mod address;
mod agent;
mod changed_since;
mod check;
mod checked;
mod collapse;
mod copies;
mod copy_error;
mod copying;
mod devices;
mod direct;
mod error;
mod event;
mod finish;
mod followers;
mod fork;
mod forking;
mod live;
mod merge;
mod migration;
mod moment;
mod options;
mod overlay_error;
mod overlays;
mod parent_tracker;
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
use self::followers::Followers;
use self::saving::Saving;
use crate::cancel::Cancellation;
use crate::image::Saved;
use crate::reset::ResetError;

pub use address::GuestAddress;
pub use check::error::{CheckError, Obstacle};
pub use check::{CheckItem, check};
pub use copy_error::CopyError;
pub use error::SaveError;
pub use event::{ChangedSince, PauseParts, SaveEvent, SwitchedDisk};
pub(crate) use forking::{Ahead, AtMoment, Forking};
pub use options::{DiskChoice, Quiesce, Reading, SaveOptions};
pub use overlay_error::OverlayError;
pub use recover::{Recovered, recover};
pub use resettable::SavedGuest;
pub use undo::error::{JournalError, LeftOver};

/// Saves a guest while it runs, and returns once the image is whole.
///
/// A guest with disks to capture is stopped; its disks are switched to overlays, QEMU
/// begins a background snapshot, and the guest goes on, all within one pause. What can be
/// done ahead of the pause is done ahead. A guest without disks is stopped by us only where its
/// memory is read from outside ([`Reading`]).
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
    on_event: impl FnMut(SaveEvent) + Send,
) -> Result<Saved, SaveError> {
    if !options.followable {
        return Ok(image_of(save_and_fork(options, None, cancel, on_event).await?));
    }
    if matches!(options.disks, DiskChoice::Copy | DiskChoice::Reflink) {
        return Err(SaveError::FollowedCopies);
    }
    let (followers, forking) = Followers::listen(&options.image)?;
    let saved = save_and_fork(options, Some(forking), cancel, on_event).await;
    followers.end().await;
    Ok(image_of(saved?))
}

/// The image of a save that had to write one.
fn image_of(saved: Option<Saved>) -> Saved {
    saved.unwrap_or_else(|| unreachable!("an image is left out only where clones are wanted"))
}

/// The same, with clones that wait for the moment. The image may be left out; its path is that of the
/// journal then.
///
/// # Errors
/// As [`save`].
pub(crate) async fn save_and_fork(
    options: &SaveOptions,
    forking: Option<Forking>,
    cancel: Cancellation,
    mut on_event: impl FnMut(SaveEvent) + Send,
) -> Result<Option<Saved>, SaveError> {
    let mut saving = Saving::begin(options, cancel, &mut on_event).await?;
    saving.forking = forking;
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
    mut on_event: impl FnMut(SaveEvent) + Send,
) -> Result<(Saved, Result<SavedGuest, ResetError>), SaveError> {
    let options = SaveOptions { resettable: true, ..options.clone() };
    let mut saving = Saving::begin(&options, cancel.clone(), &mut on_event).await?;
    let mut written = match saving.carry_out().await {
        Ok(written) => written,
        Err(error) => return Err(saving.fail(error).await),
    };
    let guest = saving.to_be_reset(&mut written);
    let saved = image_of(saving.succeed(written)?);
    let guest = SavedGuest::begin(guest, &options, &cancel).await;
    if let Ok(guest) = &guest {
        on_event(SaveEvent::Resettable { written: guest.written() });
    }
    Ok((saved, guest))
}

impl Saving<'_> {
    /// Nothing is written where only clones are wanted.
    async fn carry_out(&mut self) -> Result<Option<Written>, SaveError> {
        self.set_up().await?;
        self.prepare().await?;
        self.start_ahead().await?;
        let (received, moment) = self.take().await?;
        self.copy_disks().await?;
        let written = match received.has_image() {
            true => Some(self.write(received, moment).await?),
            false => {
                self.undo.restore_settings(&self.access.qmp).await?;
                None
            }
        };
        self.note_definition().await;
        Ok(written)
    }
}
