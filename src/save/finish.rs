//! The end of a save: the image is made whole and gets its name, or everything is undone.

use std::io;
use std::time::Duration;

use super::copies::DiskCopy;
use super::error::SaveError;
use super::event::{SaveEvent, SwitchedDisk};
use super::moment::{Moment, millis};
use super::overlays::Overlay;
use super::receive::Received;
use super::resettable::ToBeReset;
use super::saving::Saving;
use crate::failpoint::failpoint;
use crate::guest;
use crate::host::uffd::Uffd;
use crate::image::{ImageError, Saved};
use crate::machine::{Disk, DiskRole, Machine};
use crate::page::PAGE_SIZE;

/// The record of a disk of which the snapshot has a copy.
fn copied(disk: Disk, copy: &DiskCopy) -> Disk {
    let mut chain = disk.chain;
    let originals = chain.iter().map(|file| file.path.clone()).collect();
    chain.truncate(if copy.needs_chain() { usize::MAX } else { 1 });
    if let Some(top) = chain.first_mut() {
        top.path = copy.path.clone();
        top.format = copy.format().to_owned();
    }
    Disk { chain, overlay: None, originals, ..disk }
}

/// An image that is whole.
pub(super) struct Written {
    saved: Saved,
    /// How long QEMU had to wait for us.
    stalled: Duration,
    /// Pages that were read from outside.
    direct_pages: u64,
    /// Pages that were taken from the parent unread.
    inherited_pages: u64,
    /// Copies of the userfaultfds that QEMU had meanwhile, where a reset wants them.
    userfaultfds: Option<io::Result<Vec<Uffd>>>,
    disks: Vec<SwitchedDisk>,
}

impl Saving<'_> {
    /// Makes the image whole, which takes as long as the disk or the bandwidth asks for, and
    /// gives it its name. An interrupt ends it.
    pub async fn write(
        &mut self,
        mut received: Received,
        moment: Moment,
    ) -> Result<Written, SaveError> {
        self.undo.restore_settings(&self.access.qmp).await?;
        failpoint("restored");
        let (stalled, writing) = (received.stalled(), received.cancellation());
        let (direct_pages, inherited_pages) = (received.direct_pages(), received.inherited_pages());
        let userfaultfds = received.take_userfaultfds();
        let mut machine = self.machine();
        let disks = SwitchedDisk::all_of(&machine.disks);
        let mut work = tokio::task::spawn_blocking(move || {
            for disk in &mut machine.disks {
                guest::stamp_files(disk)?;
            }
            received.finish(machine, moment)
        });
        let done = tokio::select! {
            done = &mut work => done,
            () = self.cancel.requested() => {
                writing.request();
                work.await
            }
        };
        match done.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())) {
            Err(SaveError::Image(ImageError::Interrupted(_))) => Err(SaveError::Interrupted),
            saved => {
                let saved = saved?;
                Ok(Written { saved, stalled, direct_pages, inherited_pages, userfaultfds, disks })
            }
        }
    }

    /// Notes disks that the domain will have again after its next start: libvirt changes its
    /// persistent definition too, where that names the same file.
    pub async fn note_definition(&mut self) {
        let Some(domain) = &self.access.domain else { return };
        let defined = match domain.persistent_disks().await {
            Ok(defined) => defined,
            Err(error) => return tracing::warn!("{error}"),
        };
        let goes_back = |overlay: &&Overlay| {
            let named = defined.iter().find(|disk| Some(&disk.target) == overlay.target.as_ref());
            named.is_some_and(|disk| disk.source.as_ref() != Some(&overlay.path))
        };
        let back: Vec<String> = self
            .undo
            .overlays()
            .iter()
            .filter(goes_back)
            .map(|overlay| {
                format!("{} ({})", overlay.target.as_deref().unwrap_or_default(), overlay.path)
            })
            .collect();
        if !back.is_empty() {
            let name = domain.name();
            let what =
                format!("the persistent definition of {name} names other files than it runs on");
            let why = format!(
                "it named others before, and libvirt leaves them: `virsh edit {name}` puts the \
                 overlays there: {}",
                back.join(", ")
            );
            self.tell(SaveEvent::Note { what, why });
        }
    }

    /// The record of the machine, with the disks as they were at the moment and the overlays
    /// in which the guest goes on.
    pub fn machine(&self) -> Machine {
        let mut overlays = self.undo.overlays().iter();
        let mut copies = self.undo.copies().iter();
        let disks = self.checked.disks.iter().map(|found| {
            let disk = found.disk.clone();
            if disk.role != DiskRole::Captured {
                return Disk { overlay: None, ..disk };
            }
            match copies.next() {
                Some(copy) => copied(disk, copy),
                None => Disk { overlay: overlays.next().map(|o| o.path.clone()), ..disk },
            }
        });
        Machine { disks: disks.collect(), ..self.checked.machine.clone() }
    }

    /// The guest of an image that is whole, as one that is to be reset inside its QEMU.
    pub fn to_be_reset(&self, written: &mut Option<Written>) -> ToBeReset {
        ToBeReset {
            qmp: self.access.qmp.clone(),
            pid: self.checked.pid,
            blocks: self.checked.blocks.clone(),
            devices: self.checked.devices.clone(),
            userfaultfds: written.as_mut().and_then(|written| written.userfaultfds.take()),
        }
    }

    /// The image has its name: nothing is to be undone any more.
    pub fn succeed(mut self, written: Option<Written>) -> Result<Option<Saved>, SaveError> {
        failpoint("named");
        let nothing_left = self.undo.nothing_left(&mut self.on_event);
        let Some(written) = written else { return nothing_left.map(|()| None) };
        let Written { saved, stalled, direct_pages, inherited_pages, disks, .. } = written;
        (self.on_event)(SaveEvent::Saved {
            bytes: saved.data_pages * PAGE_SIZE as u64,
            pages: saved.data_pages,
            zero_pages: saved.zero_pages,
            repeated_pages: saved.repeated_pages,
            parent_pages: saved.parent_pages,
            direct_pages,
            changed_since: self.since.told(inherited_pages),
            image_bytes: saved.image_bytes,
            stalled_ms: millis(stalled),
            disks,
        });
        nothing_left.map(|()| Some(saved))
    }

    /// The save has failed: undoes what it has changed. Returns why it failed, with what could
    /// not be undone.
    pub async fn fail(mut self, cause: SaveError) -> SaveError {
        if let Some(devices) = self.devices.take() {
            devices.discard(&self.access.qmp).await;
        }
        match cause {
            // QEMU takes no other settings while a migration is under way, nor commits.
            SaveError::InterruptedTwice => cause,
            cause => self.undo.all(&self.access, cause, &mut self.on_event).await,
        }
    }
}
