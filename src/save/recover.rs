//! Cleaning up behind a save that was killed.

use std::path::{Path, PathBuf};

use super::access::Access;
use super::address::GuestAddress;
use super::copies::DiskCopy;
use super::error::SaveError;
use super::event::{OnEvent, SaveEvent, SwitchedDisk};
use super::migration::wait_end;
use super::overlays::Overlay;
use super::release::{release_memory, while_releasing};
use super::undo::error::LeftOver;
use super::undo::journal::{Journal, Plan, file_identity};
use super::undo::overlays::undo_overlays;
use crate::image::{ImageError, inspect};
use crate::libvirt::PATIENCE;

/// What became of a save that was killed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovered {
    /// There is no journal, so nothing was looked at: no save was killed, or it was one of an
    /// image of another name.
    Nothing {
        /// Where the journal would be.
        journal: PathBuf,
    },
    /// It had come to its end: the image is whole, and the guest goes on in the overlays.
    Saved {
        /// The disks that were switched to overlays, as in [`SaveEvent::Saved`].
        disks: Vec<SwitchedDisk>,
    },
    /// It was undone: the guest runs on as before.
    Undone,
}

/// Cleans up behind a save of `image` that was killed at any point: lets the guest go on if the save
/// held it, thaws its file systems, puts QEMU's settings
/// back, and commits overlays back into the disks. Where another process recovers the save, such as
/// the one that its keeper has started, it waits for that. Don't recover a save that is still under
/// way: it would be undone while it runs.
///
/// # Errors
/// [`SaveError::LeftOver`] when something can't be undone, such as overlays when QEMU has ended
/// meanwhile; then it is named with what to do, and the journal stays until it is done.
/// [`SaveError::Unclear`] when it can't be told whether the image is whole; then nothing was
/// touched.
pub async fn recover(
    guest: impl Into<GuestAddress>,
    image: &Path,
    mut on_event: impl FnMut(SaveEvent) + Send,
) -> Result<Recovered, SaveError> {
    let Some((journal, mut plan)) = Journal::claim(image).await? else {
        return Ok(Recovered::Nothing { journal: Journal::path(image) });
    };
    let guest = guest.into();
    let (saved, lives) = (find_saved(image, &plan)?, plan.qemu_lives());
    let left = match (&saved, lives) {
        (Some(_), false) => Vec::new(),
        // All else was undone before the image got its name.
        (Some(_), true) if plan.frozen.is_none() => Vec::new(),
        (Some(_), true) => {
            let access = match &guest {
                // All of QEMU's places may be taken: its agent has a socket of its own.
                GuestAddress::Socket(_) => None,
                GuestAddress::Domain(_) => Some(Access::open(&guest, PATIENCE).await?),
            };
            thaw(access.as_ref(), &mut plan, &mut on_event).await.into_iter().collect()
        }
        (None, false) => {
            plan.copies.iter().for_each(DiskCopy::remove);
            plan.overlays.iter().filter_map(Overlay::left_behind).collect()
        }
        (None, true) => {
            let pid = plan.qemu.map(|(pid, _)| pid);
            let access = reach(&guest, pid).await?;
            if access.qmp.peer_pid() != pid {
                return Err(SaveError::OtherQemu { pid: pid.unwrap_or(0) });
            }
            undo(&access, &mut plan, &mut on_event).await?
        }
    };
    if !left.is_empty() {
        // So that the next attempt does not undo again what was undone.
        if let Err(error) = journal.replace(&plan) {
            tracing::debug!("{error}");
        }
        return Err(SaveError::LeftOver { cause: Box::new(SaveError::Killed), left });
    }
    journal.remove()?;
    Ok(match saved {
        Some(disks) => Recovered::Saved { disks },
        None => Recovered::Undone,
    })
}

/// Looks for the image that the save was writing, and returns the disks whose guest goes on in
/// overlays. The image gets its name when it is whole, so it is there unless there is no file
/// of that name, or the one that was there before.
///
/// # Errors
/// When that can't be told. Undoing the save of a whole image would destroy it.
fn find_saved(image: &Path, plan: &Plan) -> Result<Option<Vec<SwitchedDisk>>, SaveError> {
    let unclear = |source| SaveError::Unclear { image: image.to_owned(), source };
    match file_identity(image) {
        Ok(None) => return Ok(None),
        Ok(found) if found == plan.replaces => return Ok(None),
        Ok(_) => {}
        Err(error) => return Err(unclear(ImageError::io("look for", image, error))),
    }
    // The images that it refers to need not be there.
    let disks = inspect(image).map_err(unclear)?.manifest.machine.disks;
    let is_known = |overlay: &Overlay| {
        disks.iter().any(|disk| disk.overlay.as_deref() == Some(overlay.path.as_str()))
    };
    Ok(plan.overlays.iter().all(is_known).then(|| SwitchedDisk::all_of(&disks)))
}

/// Connects to the QEMU in process `pid`, whose snapshot was broken off.
async fn reach(guest: &GuestAddress, pid: Option<i32>) -> Result<Access, SaveError> {
    // libvirtd may just be restarted.
    while_releasing(pid, Access::open(guest, PATIENCE)).await.map_err(SaveError::Protected)?
}

/// Undoes as much as can be undone. Returns the rest.
async fn undo(
    access: &Access,
    plan: &mut Plan,
    on_event: OnEvent<'_>,
) -> Result<Vec<LeftOver>, SaveError> {
    let qmp = &access.qmp;
    // The guest comes first.
    if plan.held && qmp.status().await? == "paused" {
        access.cont().await?;
    }
    // A migration under way fails by itself, since nobody reads its stream.
    if qmp.migration_info().await?.status.is_some() {
        let _ = wait_end(qmp).await;
    }
    if let Some(pid) = qmp.peer_pid() {
        release_memory(pid).map_err(SaveError::Protected)?;
    }
    // Again: a migration that was in its set-up may have stopped it anew.
    if plan.held && qmp.status().await? == "paused" {
        access.cont().await?;
    }
    plan.held = false;
    // Only a guest that runs on can answer.
    let mut left: Vec<LeftOver> = thaw(Some(access), plan, on_event).await.into_iter().collect();
    if let Err(error) = plan.settings.restore(qmp).await {
        left.push(LeftOver::Settings(error));
    }
    left.extend(undo_overlays(access, &plan.overlays, on_event).await);
    plan.copies.iter().for_each(DiskCopy::remove);
    Ok(left)
}

/// Thaws the guest, if it may be frozen.
async fn thaw(access: Option<&Access>, plan: &mut Plan, on_event: OnEvent<'_>) -> Option<LeftOver> {
    let agent = plan.frozen.as_ref()?;
    match agent.thaw(access.and_then(|access| access.domain.as_ref())).await {
        Ok(()) => {
            plan.frozen = None;
            on_event(SaveEvent::Thawed);
            None
        }
        Err(error) => Some(LeftOver::Frozen(Some(error))),
    }
}
