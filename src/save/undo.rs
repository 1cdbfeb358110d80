//! What a save has changed in the guest's QEMU, and how it is changed back.

use std::path::Path;

use super::agent::Freeze;
use super::checks::Checked;
use super::journal::{Journal, Plan, started};
use super::overlays::{self, Overlay};
use super::settings::Settings;
use super::{SaveError, SaveEvent, SaveOptions};
use crate::interrupt::Interrupts;
use crate::qmp::{Qmp, QmpError};

/// What is to be undone should the save fail; with disks, it is written down in a
/// journal as well.
pub(super) struct Undo {
    plan: Plan,
    journal: Option<Journal>,
    /// The settings have been put back.
    restored: bool,
}

impl Undo {
    /// So far, only settings were changed.
    pub fn new(settings: Settings) -> Undo {
        let plan = Plan { qemu: None, held: false, frozen: None, settings, overlays: Vec::new() };
        Undo { plan, journal: None, restored: false }
    }

    /// Decides on the overlays and writes it all down. Nothing is made yet.
    pub fn plan(
        &mut self,
        options: &SaveOptions,
        checked: &Checked,
    ) -> Result<&[Overlay], SaveError> {
        let overlays =
            Overlay::plan(checked.captured(), options.overlay_dir.as_deref(), &options.image)?;
        let qemu = started(checked.pid).map(|started| (checked.pid, started));
        let (held, frozen) = (checked.machine.running, options.quiesce.clone());
        let plan = Plan { qemu, held, frozen, overlays, ..self.plan.clone() };
        self.journal = Some(Journal::create(&options.image, &plan)?);
        self.plan = plan;
        Ok(&self.plan.overlays)
    }

    /// The overlays, in the order of the disks to capture.
    pub fn overlays(&self) -> &[Overlay] {
        &self.plan.overlays
    }

    /// Freezes the guest's file systems.
    pub async fn freeze(
        &self,
        agent: &Path,
        interrupts: &mut Interrupts,
        on_event: &mut impl FnMut(SaveEvent),
    ) -> Result<Freeze, SaveError> {
        let freeze = async { Ok(Freeze::all(agent, on_event).await?) };
        let interrupted = tokio::select! {
            frozen = freeze => return frozen,
            () = interrupts.at_least(1) => Err(SaveError::Interrupted),
        };
        // It may have been about to answer.
        let _ = super::agent::thaw(agent).await;
        interrupted
    }

    /// Neither held nor frozen any more: should we be killed from now on, whoever has
    /// paused the guest meanwhile was not us.
    pub fn guest_goes_on(&mut self) {
        if !self.plan.held && self.plan.frozen.is_none() {
            return;
        }
        (self.plan.held, self.plan.frozen) = (false, None);
        if let Some(journal) = &self.journal
            && let Err(error) = journal.replace(&self.plan)
        {
            tracing::debug!("{error}");
        }
    }

    /// Puts QEMU's settings back.
    pub async fn restore_settings(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        self.plan.settings.restore(qmp).await?;
        self.restored = true;
        Ok(())
    }

    /// Undoes everything. Returns the error that made it necessary, or a worse one.
    pub async fn all(
        mut self,
        qmp: &Qmp,
        cause: SaveError,
        on_event: &mut impl FnMut(SaveEvent),
    ) -> SaveError {
        if !self.restored {
            // Fails when QEMU has gone: nothing is to be restored then.
            let _ = self.restore_settings(qmp).await;
        }
        let left = overlays::undo(qmp, &self.plan.overlays, on_event).await;
        if !left.is_empty() {
            return SaveError::LeftOver { cause: Box::new(cause), left };
        }
        match self.nothing_left() {
            Ok(()) => cause,
            Err(error) => error,
        }
    }

    /// Nothing is left to be undone.
    pub fn nothing_left(self) -> Result<(), SaveError> {
        Ok(self.journal.map_or(Ok(()), Journal::remove)?)
    }
}
