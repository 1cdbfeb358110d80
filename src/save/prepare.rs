//! Ahead of the pause: QEMU is set up, and work that would make the pause longer is done
//! while the guest still runs.

use std::path::Path;

use super::devices::DeviceState;
use super::direct::Places;
use super::error::SaveError;
use super::event::SaveEvent;
use super::options::Reading;
use super::saving::Saving;
use super::{collapse, overlays, prefault};
use crate::failpoint::failpoint;
use crate::{guest, runs};

impl Saving<'_> {
    /// Sets QEMU up. QEMU itself may still refuse the save here; if it doesn't, the guest can
    /// be saved, as far as anybody can tell. Where a tracker is to tell what has changed since the
    /// parent, QEMU is asked in the pause: it looks whether it can protect memory, which the tracker
    /// still has.
    pub async fn set_up(&mut self) -> Result<(), SaveError> {
        self.set_up_qemu().await?;
        failpoint("settings");
        let checked = &self.checked;
        let event = SaveEvent::Checked {
            qemu: checked.machine.qemu.to_string(),
            ram_bytes: checked.ram_bytes(),
            captured_disks: checked.captured().map(|found| found.disk.describe()).collect(),
            uncaptured_disks: checked.machine.uncaptured_disks.clone(),
        };
        self.tell(event);
        if let Some(says) = self.checked.irrevertible.clone() {
            self.tell(SaveEvent::Warning { says });
        }
        let exposures = self.checked.parent.as_ref().map(|parent| parent.exposures());
        for says in exposures.unwrap_or_default() {
            self.tell(SaveEvent::Warning { says });
        }
        Ok(())
    }

    /// Makes the overlays, prefaults and collapses guest memory, and flushes disks.
    pub async fn prepare(&mut self) -> Result<(), SaveError> {
        let reset_point = self.options.resettable.then_some(guest::RESET_POINT);
        let overlays = self.undo.overlays();
        overlays::prepare(&self.access, &self.checked, overlays, reset_point).await?;
        self.prepare_reading().await?;
        let overlays: Vec<String> =
            self.undo.overlays().iter().map(|overlay| overlay.path.clone()).collect();
        let shorten_the_pause = self.pause_shortener();
        tokio::select! {
            // It only shortens the pause: the save goes on even if it has failed.
            _ = tokio::task::spawn_blocking(shorten_the_pause) => {}
            () = self.cancel.requested() => return Err(SaveError::Interrupted),
        }
        if !overlays.is_empty() {
            // What the guest writes to now is about to be frozen.
            runs::keep_overlays(self.checked.pid);
            self.tell(SaveEvent::Ready { overlays });
        }
        Ok(())
    }

    /// Finds the guest's memory in QEMU's. Where QEMU can be told to end its stream once all memory
    /// is captured, the state of the devices has to be asked for at the moment; elsewhere it comes
    /// last. A help, no more.
    async fn prepare_reading(&mut self) -> Result<(), SaveError> {
        let checked = &self.checked;
        if self.options.reading == Reading::Stream || !checked.background {
            return Ok(());
        }
        let qmp = &self.access.qmp;
        let ready = async {
            let places = Places::find(qmp, checked.pid, &checked.machine, &checked.blocks).await?;
            let wanted = !checked.must_drain || self.forking.is_some();
            let devices = match wanted {
                true => Some(DeviceState::prepare(qmp).await?),
                false => None,
            };
            Ok::<_, String>((places, devices))
        };
        match ready.await {
            Ok((places, devices)) => {
                (self.places, self.devices) = (Some(places), devices);
                Ok(())
            }
            Err(why) => {
                let what = "the guest's memory comes by QEMU's stream alone, which takes longer";
                self.tell(SaveEvent::Note { what: what.into(), why: why.clone() });
                self.compare_all(why).await
            }
        }
    }

    /// Work that makes the pause shorter, for a thread that may block.
    fn pause_shortener(&self) -> impl FnOnce() + Send + 'static {
        let checked = &self.checked;
        let (pid, blocks, background) = (checked.pid, checked.blocks.clone(), checked.background);
        let files: Vec<String> =
            checked.captured().map(|found| found.disk.chain[0].path.clone()).collect();
        // Only a guest that we stop waits for it: QEMU prefaults before it stops a guest.
        let prefault = background && self.stops_the_guest();
        // What it touched the tracker would take for written, and the kernel collapses nothing that is
        // write-protected.
        let is_tracked = self.since.is_tracked();
        let cancel = self.cancel.clone();
        move || {
            if prefault && !is_tracked {
                prefault::prefault(pid, &blocks, &cancel);
            }
            if background && !is_tracked {
                collapse::collapse_memory(pid, &blocks, &cancel);
            }
            // Stopping the guest flushes its disks, which then have little left to write.
            for file in files {
                if let Err(error) = guest::write_out(Path::new(&file)) {
                    tracing::debug!("flushing {file} ahead failed: {error}");
                }
            }
        }
    }
}
