//! A save whose guest is forked: clones are started ahead of the moment, and told of it.

use super::checked::in_image;
use super::error::SaveError;
use super::forking::{Ahead, AtMoment};
use super::moment::PauseClock;
use super::receive::Receiving;
use super::saving::Saving;
use crate::machine::Machine;

impl Saving<'_> {
    /// Has QEMUs started for the clones, and waits until they are.
    pub async fn start_ahead(&mut self) -> Result<(), SaveError> {
        let machine = self.machine();
        let Some(forking) = &mut self.forking else { return Ok(()) };
        let (ahead, ready) = (forking.ahead.take(), forking.ready.take());
        let (Some(ahead), Some(ready), true) = (ahead, ready, self.undo.overlays().is_empty())
        else {
            return Ok(());
        };
        let machine_type = self.access.qmp.machine_type().await?;
        let blocks = self.checked.blocks.iter().map(in_image).collect();
        let _ = ahead.send(Ahead { machine: Machine { machine_type, ..machine }, blocks });
        tokio::select! {
            // Where they can't be started, that is for the clones to tell.
            _ = ready => Ok(()),
            () = self.cancel.requested() => Err(SaveError::Interrupted),
        }
    }

    /// Tells who waits to start clones that the moment has passed.
    pub fn begin_clones(&mut self, receiving: &mut Receiving, clock: &PauseClock) {
        let machine = self.machine();
        let Some(forking) = &mut self.forking else { return };
        // Without the devices there is nothing to start: whoever waits hears that nobody will tell.
        let told = forking.at_moment.take();
        let devices = self.devices.as_ref().and_then(|devices| devices.sections());
        let at_moment = clock.moment().zip(devices).zip(receiving.begun.try_recv().ok());
        if let (Some(told), Some(((moment, devices), begun))) = (told, at_moment) {
            let _ = told.send(AtMoment::new(begun, moment, machine, devices));
        }
    }
}
