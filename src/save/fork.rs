//! What a save tells of its moment to whoever starts clones of the guest, while it goes on.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::error::SaveError;
use super::event::SaveEvent;
use super::live::LivePages;
use super::moment::{Moment, PauseClock};
use super::receive::{Begun, Receiving, Stores};
use super::saving::Saving;
use crate::image::{Details, Sections};
use crate::machine::Machine;
use crate::page::Block;
use crate::qmp::RamBlock;
use crate::wire::run_state;

/// Clones that wait for the moment.
pub(crate) struct Forking {
    /// Whether an image is written as well.
    pub keep: bool,
    /// Told once, ahead of the pause; not where the guest has disks to capture, over which no QEMU
    /// can be started before they are frozen.
    pub ahead: Option<oneshot::Sender<Ahead>>,
    /// The pause waits for this.
    pub ready: Option<oneshot::Receiver<()>>,
    /// Told once.
    pub at_moment: Option<oneshot::Sender<AtMoment>>,
}

/// A guest that is about to be forked.
pub(crate) struct Ahead {
    pub machine: Machine,
    pub blocks: Vec<Block>,
}

impl Forking {
    /// What memory is put into.
    pub(super) fn stores(forking: &Option<Forking>) -> Stores {
        let keep = forking.as_ref().is_none_or(|forking| forking.keep);
        Stores { image: keep, memory: forking.is_some() }
    }
}

/// A guest at its moment: all of an image but the memory, and where that can be had.
pub(crate) struct AtMoment {
    pub blocks: Vec<Block>,
    pub details: Details,
    pub sections: Sections,
    pub pages: Arc<LivePages>,
}

impl<F: FnMut(SaveEvent)> Saving<'_, F> {
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
        let block = |block: &RamBlock| Block {
            name: block.name.clone(),
            len: block.used_len,
            page_size: block.page_size,
        };
        let blocks = self.checked.blocks.iter().map(block).collect();
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

impl AtMoment {
    fn new(begun: Begun, moment: Moment, machine: Machine, mut devices: Vec<u8>) -> AtMoment {
        let Begun { config, machine_type, blocks, merge, memory, places } = begun;
        if machine.running {
            run_state::set_running(&mut devices);
        }
        let details = Details {
            machine: Machine { machine_type, ..machine },
            moment_unix_us: moment.unix_us,
            pause_us: moment.pause.map(|pause| pause.as_micros() as u64),
        };
        let memory = memory.unwrap_or_else(|| unreachable!("clones have memory kept for them"));
        let pages = Arc::new(LivePages::new(merge, memory, blocks.clone(), places));
        let sections = Sections { config, devices, vmdesc: Vec::new() };
        AtMoment { blocks, details, sections, pages }
    }
}
