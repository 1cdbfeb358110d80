//! What a save tells whoever starts clones of the guest.

use std::path::Path;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::error::SaveError;
use super::live::AheadOfTurn;
use super::moment::Moment;
use super::receive::Begun;
use crate::cancel::Cancellation;
use crate::guest;
use crate::identity::Identity;
use crate::image::{Details, Image, Sections, skeleton};
use crate::machine::Machine;
use crate::memory::live::LivePages;
use crate::page::Block;
use crate::wire::run_state;

/// Clones that wait for the moment.
pub(crate) struct Forking {
    /// Told once, ahead of the pause; not where the guest has disks to capture, over which no QEMU
    /// can be started before they are frozen.
    pub ahead: Option<oneshot::Sender<Ahead>>,
    /// The pause waits for this.
    pub ready: Option<oneshot::Receiver<()>>,
    /// Told once.
    pub at_moment: Option<oneshot::Sender<AtMoment>>,
    /// Requested once the clones run, or have had their time: until then the processors are theirs.
    pub clones_run: Cancellation,
}

/// A guest that is about to be forked.
pub(crate) struct Ahead {
    pub machine: Machine,
    pub blocks: Vec<Block>,
}

/// A guest at its moment: all of an image but the memory, and where that can be had.
pub(crate) struct AtMoment {
    pub blocks: Vec<Block>,
    pub details: Details,
    pub sections: Sections,
    pub pages: Arc<LivePages>,
    /// The identity of the image that is written, or of none.
    pub identity: Identity,
}

impl AtMoment {
    /// An image of the guest without memory, under whatever path. Blocks while disks are looked at.
    ///
    /// # Errors
    /// When a disk can't be looked at, or memory is short.
    pub fn image(mut self, path: &Path) -> Result<Arc<Image>, SaveError> {
        for disk in &mut self.details.machine.disks {
            guest::stamp_files(disk)?;
        }
        let AtMoment { blocks, details, sections, identity, .. } = self;
        Ok(skeleton(path, identity, &blocks, details, &sections)?)
    }

    pub(super) fn new(
        begun: Begun,
        moment: Moment,
        machine: Machine,
        mut devices: Vec<u8>,
    ) -> AtMoment {
        let Begun { config, machine_type, blocks, identity, merge, memory, places } = begun;
        if machine.running {
            run_state::set_running(&mut devices);
        }
        let details = Details {
            machine: Machine { machine_type, ..machine },
            moment_unix_us: moment.unix_us,
            pause_us: moment.pause.map(|pause| pause.as_micros() as u64),
        };
        let memory = memory.unwrap_or_else(|| unreachable!("clones have memory kept for them"));
        let capture = Box::new(AheadOfTurn::new(merge, places));
        let pages = Arc::new(LivePages::new(memory, blocks.clone(), capture));
        let sections = Sections { config, devices, vmdesc: Vec::new() };
        AtMoment { blocks, details, sections, pages, identity }
    }
}
