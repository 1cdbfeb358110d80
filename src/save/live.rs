//! Capturing memory for who waits for it, ahead of its turn.

use std::sync::Arc;

use super::direct::{Place, Places, capture};
use super::merge::Merge;
use crate::host::procfs::Pagemap;
use crate::memory::live::{Capture, GROUP};
use crate::page::{PAGE_SIZE, Run, SourceError};

/// Captures pages from the guest's own memory: what the guest has not written to is read there; what
/// it has, QEMU has sent before.
pub(super) struct AheadOfTurn {
    merge: Arc<Merge>,
    guest: Option<(Places, Pagemap)>,
}

impl AheadOfTurn {
    /// Captures what `merge` has not. `places` are in the stream's order.
    pub fn new(merge: Arc<Merge>, places: Option<Places>) -> AheadOfTurn {
        let guest = places.and_then(|places| {
            let pagemap = Pagemap::open(places.pid()).ok()?;
            Some((places, pagemap))
        });
        AheadOfTurn { merge, guest }
    }
}

impl Capture for AheadOfTurn {
    fn capture(&self, run: Run) -> Result<(), SourceError> {
        if let Some((places, pagemap)) = &self.guest
            && let Some(Place { start, read_only: false }) = places.of(run.block)
        {
            let mut buffer = [0; GROUP as usize * PAGE_SIZE];
            capture(places.pid(), pagemap, start, run, &self.merge, &mut buffer)?;
        }
        Ok(())
    }

    fn is_over(&self, run: Run) -> bool {
        let has_ended = self.merge.has_ended();
        let is_absent = self.merge.absent_within(run).is_some();
        if is_absent {
            // What was not captured when it was looked for comes by the stream.
            self.merge.want();
        }
        has_ended && is_absent
    }
}
