//! What the threads of a tracker share: the guest's memory, and what is known of it.

use std::convert::Infallible;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::dirty::DirtyLog;
use super::memory::{GuestMemory, Unit};
use crate::host::uffd::{Uffd, UffdError};
use crate::page::PageBytes;

/// What the threads of a tracker share.
pub(super) struct Shared {
    pub guest: GuestMemory,
    pub uffd: Arc<Uffd>,
    /// Taken for each fault. Nobody else takes it but for the time of a few instructions, and
    /// whoever resets, when the guest stands still: an uncontended lock is some 20 ns of the 60 µs
    /// of a fault.
    log: Mutex<DirtyLog>,
    /// How many host pages of each block, from its first on, have been compared with the image.
    /// What stands in those, unless they are in the log, is what the image has.
    pub compared: Vec<AtomicU64>,
    ended: watch::Sender<bool>,
}

impl Shared {
    pub fn new(guest: GuestMemory, uffd: Arc<Uffd>) -> Shared {
        let units = guest.blocks().iter().map(|block| block.len.div_ceil(block.page_size));
        let log = Mutex::new(DirtyLog::new(units));
        let compared = guest.blocks().iter().map(|_| AtomicU64::new(0)).collect();
        Shared { guest, uffd, log, compared, ended: watch::Sender::new(false) }
    }

    /// Tells when nothing is tracked any more.
    pub fn ending(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    pub fn log(&self) -> MutexGuard<'_, DirtyLog> {
        // A thread that has panicked did not leave it half-changed: it panics on no input.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a page that is written, or `expected` to be, with what is in it where the image need
    /// not be asked for that.
    pub fn note(&self, unit: Unit, expected: bool, old: Option<&PageBytes>) {
        let copy = old.map(|old| {
            move |room: &mut PageBytes| -> Result<(), Infallible> {
                room.copy_from_slice(old);
                Ok(())
            }
        });
        let Ok(()) = self.log().add(unit.block, unit.number, expected, copy);
    }

    /// Notes a page, and lets it be written.
    ///
    /// # Errors
    /// When it stays protected.
    pub fn note_and_unprotect(
        &self,
        unit: Unit,
        expected: bool,
        old: Option<&PageBytes>,
    ) -> Result<(), UffdError> {
        self.note(unit, expected, old);
        self.uffd.unprotect(unit.address, unit.len)
    }

    /// Whether nothing is tracked any more.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Takes all protection off: nobody waits for us any more.
    pub fn let_go(&self) {
        self.ended.send_replace(true);
        for range in self.guest.ranges() {
            if let Err(error) = self.uffd.unregister(range.start, range.end - range.start)
                && !self.guest.has_ended()
            {
                tracing::warn!("memory at {:#x} can't be let go: {error}", range.start);
            }
        }
    }
}
