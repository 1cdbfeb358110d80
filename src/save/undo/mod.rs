//! What a save has changed in the guest's QEMU, and how it is changed back.

pub(super) mod error;
pub(super) mod journal;
pub(super) mod overlays;

use std::time::Duration;

use self::error::LeftOver;
use self::journal::{Journal, Plan, file_identity};
use super::access::Access;
use super::checked::Checked;
use super::copies::DiskCopy;
use super::error::SaveError;
use super::event::{OnEvent, SaveEvent};
use super::options::{Quiesce, SaveOptions};
use super::overlays::Overlay;
use super::quiesce::Freezer;
use super::settings::Settings;
use crate::agent::AgentError;
use crate::cancel::Cancellation;
use crate::host::procfs::started;
use crate::qmp::{Qmp, QmpError};

/// What is to be undone should the save fail, and the journal that tells it should the save
/// be killed.
pub(super) struct Undo {
    plan: Plan,
    journal: Journal,
    /// Whether the guest may have written to the overlays.
    switched: bool,
    /// Why the guest could not be thawed.
    not_thawed: Option<AgentError>,
}

impl Undo {
    /// Decides on the overlays, and writes down what a save is about to change. Nothing is
    /// changed yet.
    pub fn begin(
        settings: Settings,
        options: &SaveOptions,
        checked: &Checked,
    ) -> Result<Undo, SaveError> {
        let copies = DiskCopy::plan(checked, options);
        let overlays = match !copies.is_empty() && !checked.background {
            // The guest stands still, and QEMU gives up its disks at the end.
            true => Vec::new(),
            false => Overlay::plan(checked, options.overlay_dir.as_deref(), &options.image)?,
        };
        let plan = Plan {
            qemu: started(checked.pid).map(|started| (checked.pid, started)),
            replaces: file_identity(&options.image).ok().flatten(),
            held: false,
            frozen: None,
            settings,
            overlays,
            copies,
        };
        let journal = Journal::create(&options.image, &plan)?;
        Ok(Undo { plan, journal, switched: false, not_thawed: None })
    }

    /// Sets QEMU up.
    pub async fn apply_settings(&self, qmp: &Qmp) -> Result<(), SaveError> {
        self.plan.settings.apply(qmp).await
    }

    /// The overlays, in the order of the disks to capture.
    pub fn overlays(&self) -> &[Overlay] {
        &self.plan.overlays
    }

    /// The copies of disks that are to be made, in the order of the disks to capture.
    pub fn copies(&self) -> &[DiskCopy] {
        &self.plan.copies
    }

    /// Commits all overlays back into their disks, which the save needs no more. Returns whether that
    /// has worked.
    pub async fn commit(
        &mut self,
        access: &Access,
        on_event: OnEvent<'_>,
    ) -> Result<bool, SaveError> {
        let left = overlays::undo_overlays(access, &self.plan.overlays, on_event).await;
        if left.is_empty() {
            self.plan.overlays.clear();
            // From now on the image stands for itself: it is whole if it has its name.
            self.write()?;
        }
        Ok(left.is_empty())
    }

    /// The disks are about to be switched to the overlays: the guest may write to them.
    pub fn switching(&mut self) {
        self.switched = true;
    }

    /// Freezes the guest's file systems by its agent, and returns how many those are. Whatever
    /// comes of it, [`Undo::thaw`] is due.
    pub async fn freeze(
        &mut self,
        quiesce: &Quiesce,
        access: &Access,
        cancel: &Cancellation,
    ) -> Result<u64, SaveError> {
        let domain = access.domain.as_ref();
        let freeze = async {
            let agent = Freezer::reach(quiesce, domain).await?;
            self.plan.frozen = Some(agent.frozen());
            self.write()?;
            Ok::<u64, SaveError>(agent.freeze().await?)
        };
        let frozen = tokio::select! {
            frozen = freeze => frozen,
            () = cancel.requested() => Err(SaveError::Interrupted),
        };
        if let Err(SaveError::Agent(AgentError::Refused { .. })) = frozen {
            // An agent that fails to freeze thaws by itself. It is told again to be sure, and
            // may refuse that too.
            if let Some(agent) = self.plan.frozen.take() {
                let _ = agent.thaw(domain).await;
            }
        }
        frozen
    }

    /// Thaws the guest's file systems, if they may be frozen, and returns whether it did.
    /// They count as frozen until that has worked, so this may be dropped at any time and
    /// called again.
    pub async fn thaw(&mut self, access: &Access) -> bool {
        let Some(agent) = &self.plan.frozen else { return false };
        match agent.thaw(access.domain.as_ref()).await {
            Ok(()) => self.plan.frozen = None,
            Err(error) => self.not_thawed = Some(error),
        }
        self.plan.frozen.is_none()
    }

    /// Writes down that we are about to stop the guest, which runs.
    pub fn hold(&mut self) -> Result<(), SaveError> {
        self.plan.held = true;
        self.write()
    }

    /// The guest that we held goes on, or never was held.
    pub fn let_go(&mut self) {
        self.plan.held = false;
    }

    /// To be called once the guest goes on: thaws it, and returns whether it did. From now on
    /// the journal says that a guest which is found paused was not paused by us. No failure
    /// in here ends the save.
    pub async fn guest_goes_on(&mut self, access: &Access) -> bool {
        if !self.plan.held && self.plan.frozen.is_none() {
            return false;
        }
        self.plan.held = false;
        let thawed = self.thaw(access).await;
        if let Err(error) = self.write() {
            tracing::debug!("{error}");
        }
        thawed
    }

    /// Writes down how things stand.
    fn write(&self) -> Result<(), SaveError> {
        Ok(self.journal.replace(&self.plan)?)
    }

    /// Puts QEMU's settings back.
    pub async fn restore_settings(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        self.plan.settings.restore(qmp).await
    }

    /// Undoes everything. Returns the error that made it necessary, together with what could
    /// not be undone: then the journal stays.
    pub async fn all(
        mut self,
        access: &Access,
        cause: SaveError,
        on_event: OnEvent<'_>,
    ) -> SaveError {
        let mut left = Vec::new();
        if let Err(error) = self.restore_settings(&access.qmp).await {
            left.push(LeftOver::Settings(error));
        }
        if self.plan.frozen.is_some() {
            left.push(LeftOver::Frozen(self.not_thawed.take()));
        }
        // A QEMU that has ended has no settings, and no guest that is frozen.
        if !left.is_empty() && has_ended(&access.qmp, &self.plan).await {
            left.clear();
            // Nor has its guest written anything to overlays that it never had.
            if !self.switched {
                self.plan.overlays.iter().for_each(Overlay::remove);
            }
        }
        left.extend(overlays::undo_overlays(access, &self.plan.overlays, on_event).await);
        self.plan.copies.iter().for_each(DiskCopy::remove);
        if left.is_empty() {
            return match self.journal.remove() {
                Ok(()) => cause,
                Err(error) => {
                    let left = vec![LeftOver::Journal(error)];
                    SaveError::LeftOver { cause: Box::new(cause), left }
                }
            };
        }
        // So that `recover` does not undo again what was undone.
        if let Err(error) = self.write() {
            tracing::debug!("{error}");
        }
        SaveError::LeftOver { cause: Box::new(cause), left }
    }

    /// The image is whole and there is nothing to undo: removes the journal. Where that
    /// fails, the save has still succeeded: the journal only stands in the way of the next
    /// save of that name, which is noted.
    ///
    /// # Errors
    /// [`SaveError::StillFrozen`], and then the journal stays, for [`recover`] to thaw the
    /// guest.
    ///
    /// [`recover`]: super::recover()
    pub fn nothing_left(self, on_event: OnEvent<'_>) -> Result<(), SaveError> {
        if let (Some(_), Some(error)) = (self.plan.frozen, self.not_thawed) {
            return Err(SaveError::StillFrozen(error));
        }
        if let Err(error) = self.journal.remove() {
            let what = "the image is whole, but its journal is still there".to_owned();
            let why = format!("{error}; `recover()` of this image removes it");
            on_event(SaveEvent::Note { what, why });
        }
        Ok(())
    }
}

/// Whether the guest's QEMU has ended. Its socket closes a little before its process ends.
async fn has_ended(qmp: &Qmp, plan: &Plan) -> bool {
    const LOOK_EVERY: Duration = Duration::from_millis(10);
    const LOOKS: u32 = 100;
    if qmp.ended().is_none() {
        return false;
    }
    for _ in 0..LOOKS {
        if !plan.qemu_lives() {
            return true;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    false
}
