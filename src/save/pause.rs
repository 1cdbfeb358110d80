//! The pause: the guest is stopped, it is found out what it has written since the parent where that is tracked,
//! its disks are switched to their overlays, QEMU writes down the state of the devices, and begins the snapshot.

use super::error::SaveError;
use super::moment::PauseClock;
use super::saving::Saving;
use super::{migration, overlays};
use crate::failpoint::failpoint;
use crate::guest;

impl Saving<'_> {
    /// Whether the guest has to be stopped by us: where its disks are captured, the state of its
    /// devices is asked for, or what it has written. QEMU alone would stop it for a shorter time.
    pub fn stops_the_guest(&self) -> bool {
        !self.undo.overlays().is_empty() || self.devices.is_some() || self.since.is_tracked()
    }

    /// Begins the snapshot. A guest that [has to be stopped](Saving::stops_the_guest) is stopped
    /// and its disks are switched when this returns; [`Saving::release`] lets it go with the first
    /// page.
    pub async fn pause(&mut self, clock: &mut PauseClock) -> Result<(), SaveError> {
        self.check_unchanged().await?;
        if self.stops_the_guest() {
            if clock.running() {
                self.undo.hold()?;
                failpoint("held");
                // Writing the journal may have taken a while.
                self.check_unchanged().await?;
                clock.hold();
                self.access.stop().await?;
                clock.step();
                failpoint("stopped");
            }
            self.ask_tracker().await?;
            clock.step();
            if !self.undo.overlays().is_empty() {
                self.undo.switching();
                overlays::switch(&self.access, &self.checked, self.undo.overlays()).await?;
            }
            clock.step();
            failpoint("switched");
            if let Some(devices) = &mut self.devices {
                devices.take(&self.access.qmp).await;
            }
            clock.step();
        }
        self.begun = true;
        migration::begin(&self.access.qmp).await?;
        failpoint("migrating");
        Ok(())
    }

    /// Refuses a guest that has been stopped, or let go, since the checks: the next steps
    /// depend on it, and a guest that somebody else has stopped is not ours to let go. So is one
    /// whose devices are not those of the record any more: it could not be reverted.
    async fn check_unchanged(&self) -> Result<(), SaveError> {
        let state = self.access.qmp.status().await?;
        if (state == "running") != self.checked.machine.running {
            return Err(SaveError::Meanwhile { state });
        }
        match guest::device_paths(&self.access.qmp).await? == self.checked.devices {
            true => Ok(()),
            false => Err(SaveError::DevicesChanged),
        }
    }

    /// Lets a guest go that we hold, now that its memory is write-protected. QEMU before 9.0
    /// has let it go by itself; then this changes nothing.
    pub async fn release(&self, clock: &mut PauseClock) -> Result<(), SaveError> {
        if clock.held() {
            clock.step();
            self.access.cont().await?;
            clock.released();
        }
        Ok(())
    }
}
