//! The thread that hears of each first write.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::ResetError;
use super::memory::Unit;
use super::shared::Shared;
use super::streams::{MOST_AHEAD, Streams};
use crate::host::uffd::Fault;
use crate::memory::FaultReader;
use crate::page::{PAGE_SIZE, PageBytes};
use crate::transport::TransportError;

/// Takes faults, notes what is about to be written, and lets it be written.
pub(super) struct FaultThread<'a> {
    shared: &'a Shared,
    reader: FaultReader,
    streams: Streams,
    /// What was in pages before they are written. Room for it is made ahead.
    old: Box<[PageBytes]>,
}

impl<'a> FaultThread<'a> {
    pub fn new(shared: &'a Shared, reader: FaultReader) -> FaultThread<'a> {
        let old = vec![[0; PAGE_SIZE]; MOST_AHEAD as usize].into_boxed_slice();
        FaultThread { shared, reader, streams: Streams::default(), old }
    }

    /// Answers faults until its reader is cancelled, or QEMU has ended.
    ///
    /// # Errors
    /// When one can't be answered: whoever waits for it waits until all protection is taken off.
    pub fn run(mut self) -> Result<(), ResetError> {
        // First writes come in bursts, in which it takes several times as long to be woken as to
        // answer.
        while self.reader.wait(Duration::MAX).map_err(gone)?.is_some() {
            for at in 0..self.reader.faults().len() {
                self.answer(self.reader.faults()[at])?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, fault: Fault) -> Result<(), ResetError> {
        let Shared { guest, uffd, compared, .. } = self.shared;
        let Some(unit) = guest.find(fault.address) else {
            // Not memory of the guest's: nothing of it is protected.
            let page = fault.address & !(PAGE_SIZE as u64 - 1);
            return Ok(uffd.wake(page, PAGE_SIZE as u64)?);
        };
        if !fault.protected {
            // Never used, or given back by the guest: the kernel would give zeros. What belongs
            // there is the image's to tell.
            self.shared.note(unit, false, None);
            return zero(self.shared, unit);
        }
        let compared = compared[unit.block.index()].load(Ordering::Acquire);
        if unit.number >= compared || unit.len != PAGE_SIZE as u64 {
            return Ok(self.shared.note_and_unprotect(unit, false, None)?);
        }
        self.answer_ahead(unit, compared)
    }

    /// Notes a page, and those behind it where the guest writes one behind the other.
    fn answer_ahead(&mut self, first: Unit, compared: u64) -> Result<(), ResetError> {
        let Shared { guest, uffd, .. } = self.shared;
        let wanted = self.streams.ahead(first.address).min(compared - first.number);
        let count = {
            let log = self.shared.log();
            (0..wanted)
                .take_while(|at| *at == 0 || !log.has(first.block, first.number + at))
                .count()
        };
        let count = guest.present_from(first, count as u64);
        let old = &mut self.old[..count as usize];
        // Ahead of the lock. The guest may have given some of it back.
        if count == 0 || !guest.read(first.address, old.as_flattened_mut())? {
            return Ok(self.shared.note_and_unprotect(first, false, None)?);
        }
        for (at, old) in old.iter().enumerate() {
            let unit = guest.unit(first.block, first.number + at as u64);
            self.shared.note(unit, false, Some(old));
        }
        Ok(uffd.unprotect(first.address, count * first.len)?)
    }
}

/// Notes a page that is expected to be written, with what is in it, and lets it be written: what
/// would cost a fault, ahead of it. The guest may run. Nothing is done with pages that are noted
/// already, missing or larger than 4096 bytes.
pub(super) fn expect(shared: &Shared, unit: Unit) -> Result<(), ResetError> {
    let is_small = unit.len == PAGE_SIZE as u64;
    if !is_small || shared.log().has(unit.block, unit.number) || !shared.guest.is_present(unit) {
        return Ok(());
    }
    // Nobody writes to it but after it has been noted: by us, or by whoever answers a fault in the
    // meantime, and then what is read here counts for nothing.
    let mut bytes = [0; PAGE_SIZE];
    if !shared.guest.read(unit.address, &mut bytes)? {
        return Ok(());
    }
    Ok(shared.note_and_unprotect(unit, true, Some(&bytes))?)
}

/// Installs zeros where memory is missing.
fn zero(shared: &Shared, unit: Unit) -> Result<(), ResetError> {
    let Shared { uffd, .. } = shared;
    // SAFETY: the host page is the guest's, and as long as that. What is there already is left as
    // it is.
    let installed = unsafe {
        match unit.len == PAGE_SIZE as u64 {
            true => uffd.zero(unit.address, unit.len, unit.len),
            // There is no zero page of the size of hugetlbfs's.
            false => uffd.copy(unit.address, &vec![0; unit.len as usize], unit.len),
        }
    };
    Ok(installed?)
}

/// That the faults can't be read any more.
pub(super) fn gone(error: TransportError) -> ResetError {
    let (TransportError::Gone(error) | TransportError::Io(error)) = error;
    ResetError::Thread(error)
}
