//! Cleaning up behind a save that was killed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::ending::wait_end;
use super::journal::{Journal, Plan, file_identity};
use super::left_over::LeftOver;
use super::overlays::{self, Overlay};
use super::release::release_memory;
use super::{SaveError, SaveEvent, agent, checks};
use crate::image::{ImageError, look};
use crate::qmp::Qmp;

/// How often write protection is looked for while QEMU does not answer.
const RELEASE_EVERY: Duration = Duration::from_millis(500);

/// What became of a save that was killed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovered {
    /// There is no journal, so nothing was looked at: no save was killed, or it was one of an
    /// image of another name.
    Nothing {
        /// Where the journal would be.
        journal: PathBuf,
    },
    /// It had come to its end: the image is whole, and the guest goes on in the overlays.
    Saved,
    /// It was undone: the guest runs on as before.
    Undone,
}

/// Cleans up behind a save of `image` that was killed at any point: lets the guest behind
/// the socket `qmp` go on if the save held it, thaws its file systems, puts QEMU's settings
/// back, and folds overlays back into the disks. A save that is still under way must not
/// be recovered: it would be undone under its hands.
///
/// # Errors
/// [`SaveError::LeftOver`] when something can't be undone, such as overlays when QEMU has ended
/// meanwhile; then it is named with what to do, and the journal stays until it is done.
/// [`SaveError::Unclear`] when it can't be told whether the image is whole; then nothing was
/// touched.
pub async fn recover(
    qmp: &Path,
    image: &Path,
    mut on_event: impl FnMut(SaveEvent),
) -> Result<Recovered, SaveError> {
    let Some((journal, mut plan)) = Journal::read(image)? else {
        return Ok(Recovered::Nothing { journal: Journal::path(image) });
    };
    let (whole, lives) = (is_whole(image, &plan)?, plan.qemu_lives());
    let left = match (whole, lives) {
        (true, false) => Vec::new(),
        // All else was undone before the image got its name.
        (true, true) => thaw(&mut plan, &mut on_event).await.into_iter().collect(),
        (false, false) => plan.overlays.iter().filter_map(Overlay::left_behind).collect(),
        (false, true) => {
            let pid = plan.qemu.map(|(pid, _)| pid);
            let qmp = reach(qmp, pid).await?;
            if qmp.peer_pid() != pid {
                return Err(SaveError::OtherQemu { pid: pid.unwrap_or(0) });
            }
            undo(&qmp, &mut plan, &mut on_event).await?
        }
    };
    if !left.is_empty() {
        // What was undone is not to be undone again.
        if let Err(error) = journal.replace(&plan) {
            tracing::debug!("{error}");
        }
        return Err(SaveError::LeftOver { cause: Box::new(SaveError::Killed), left });
    }
    journal.remove()?;
    Ok(if whole { Recovered::Saved } else { Recovered::Undone })
}

/// Whether the image is there that the save was writing. It gets its name when it is
/// whole, so it is unless there is nothing of that name, or what was there before.
///
/// # Errors
/// When that can't be told. Undoing the save of a whole image would destroy it.
fn is_whole(image: &Path, plan: &Plan) -> Result<bool, SaveError> {
    let unclear = |source| SaveError::Unclear { image: image.to_owned(), source };
    match file_identity(image) {
        Ok(None) => return Ok(false),
        Ok(found) if found == plan.replaces => return Ok(false),
        Ok(_) => {}
        Err(error) => return Err(unclear(ImageError::io("look for", image, error))),
    }
    // Images that it refers to may be missing.
    let disks = look(image).map_err(unclear)?.manifest.machine.disks;
    Ok(plan.overlays.iter().all(|overlay| {
        disks.iter().any(|disk| disk.overlay.as_deref() == Some(overlay.path.as_str()))
    }))
}

/// Connects to the QEMU in process `pid`, in which a snapshot was broken off. A guest that
/// waits for its write protection to go may hold QEMU up as a whole, so that is taken off
/// until QEMU answers: while the snapshot is being set up, it may still come.
async fn reach(qmp: &Path, pid: Option<i32>) -> Result<Qmp, SaveError> {
    let connect = Qmp::connect(qmp, checks::ANSWER_TIMEOUT);
    tokio::pin!(connect);
    loop {
        tokio::select! {
            connected = &mut connect => return Ok(connected?),
            () = tokio::time::sleep(RELEASE_EVERY) => if let Some(pid) = pid {
                release_memory(pid).map_err(SaveError::Protected)?;
            },
        }
    }
}

/// Undoes what is to be undone, as much of it as can be. Returns the rest.
async fn undo(
    qmp: &Qmp,
    plan: &mut Plan,
    on_event: &mut impl FnMut(SaveEvent),
) -> Result<Vec<LeftOver>, SaveError> {
    // The guest comes first.
    if plan.held && qmp.status().await? == "paused" {
        qmp.cont().await?;
    }
    // Its reader is gone, so a migration under way fails by itself.
    if qmp.migration_info().await?.status.is_some() {
        let _ = wait_end(qmp).await;
    }
    if let Some(pid) = qmp.peer_pid() {
        release_memory(pid).map_err(SaveError::Protected)?;
    }
    // Again: a migration that was in its set-up may have stopped it anew.
    if plan.held && qmp.status().await? == "paused" {
        qmp.cont().await?;
    }
    plan.held = false;
    // Only a guest that runs on can answer.
    let mut left: Vec<LeftOver> = thaw(plan, on_event).await.into_iter().collect();
    if let Err(error) = plan.settings.restore(qmp).await {
        left.push(LeftOver::Settings(error));
    }
    left.extend(overlays::undo(qmp, &plan.overlays, on_event).await);
    Ok(left)
}

/// Thaws the guest, if it may be frozen.
async fn thaw(plan: &mut Plan, on_event: &mut impl FnMut(SaveEvent)) -> Option<LeftOver> {
    let socket = plan.frozen.as_ref()?;
    match agent::thaw(socket, &agent::PATIENCE).await {
        Ok(()) => {
            plan.frozen = None;
            on_event(SaveEvent::Thawed);
            None
        }
        Err(error) => Some(LeftOver::Frozen(Some(error))),
    }
}
