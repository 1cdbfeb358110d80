//! The thread that hears of each first write.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::ResetError;
use super::memory::Unit;
use super::shared::Shared;
use super::streams::{MOST_AHEAD, Streams};
use crate::host::uffd::{Fault, FaultBuffer};
use crate::memory::Spin;
use crate::page::{PAGE_SIZE, PageBytes};

/// Takes faults, notes what is about to be written, and lets it be written.
pub(super) struct FaultThread<'a> {
    shared: &'a Shared,
    /// Becomes readable when it is to end.
    wake: &'a EventFd,
    streams: Streams,
    /// What was in pages before they are written. Room for it is made ahead.
    old: Box<[PageBytes]>,
    /// The faults that the last read told of.
    faults: Vec<Fault>,
}

impl<'a> FaultThread<'a> {
    pub fn new(shared: &'a Shared, wake: &'a EventFd) -> FaultThread<'a> {
        let old = vec![[0; PAGE_SIZE]; MOST_AHEAD as usize].into_boxed_slice();
        FaultThread { shared, wake, streams: Streams::default(), old, faults: Vec::new() }
    }

    /// Answers faults until it is woken to end, or QEMU has ended.
    ///
    /// # Errors
    /// When one can't be answered: whoever waits for it waits until all protection is taken off.
    pub fn run(mut self) -> Result<(), ResetError> {
        let mut buffer = FaultBuffer::default();
        let mut spin = Spin::default();
        while self.wait(&mut buffer, &mut spin)? {
            for at in 0..self.faults.len() {
                self.answer(self.faults[at])?;
            }
        }
        Ok(())
    }

    /// Waits for faults; false when it is to end. First writes come in bursts, in which it takes
    /// several times as long to be woken as to answer.
    fn wait(&mut self, buffer: &mut FaultBuffer, spin: &mut Spin) -> Result<bool, ResetError> {
        let start = Instant::now();
        while start.elapsed() < spin.time() {
            if self.take(buffer)? {
                spin.caught();
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        spin.in_vain();
        let asleep = Instant::now();
        let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        loop {
            let mut fds = [
                PollFd::new(self.shared.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(ResetError::Thread(errno.into())),
            }
            let seen = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
            if seen(1).intersects(PollFlags::POLLIN) || seen(0).intersects(broken) {
                return Ok(false);
            }
            if self.take(buffer)? {
                spin.woken(asleep.elapsed());
                return Ok(true);
            }
        }
    }

    /// Reads the faults that are there; false when there are none.
    fn take(&mut self, buffer: &mut FaultBuffer) -> Result<bool, ResetError> {
        self.faults.clear();
        self.faults.extend(self.shared.uffd.read_faults(buffer)?);
        Ok(!self.faults.is_empty())
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
            note(self.shared, unit, false, None)?;
            return zero(self.shared, unit);
        }
        let compared = compared[unit.block.index()].load(Ordering::Acquire);
        if unit.number >= compared || unit.len != PAGE_SIZE as u64 {
            return without_content(self.shared, unit);
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
            return without_content(self.shared, first);
        }
        for (at, old) in old.iter().enumerate() {
            let unit = guest.unit(first.block, first.number + at as u64);
            note(self.shared, unit, false, Some(old))?;
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
    note(shared, unit, true, Some(&bytes))?;
    Ok(shared.uffd.unprotect(unit.address, unit.len)?)
}

/// Notes that a page is about to be written whose content the image has, and lets it be written.
fn without_content(shared: &Shared, unit: Unit) -> Result<(), ResetError> {
    note(shared, unit, false, None)?;
    Ok(shared.uffd.unprotect(unit.address, unit.len)?)
}

/// Notes that a page is about to be written, with what is in it where the image need not be
/// asked.
fn note(
    shared: &Shared,
    unit: Unit,
    expected: bool,
    old: Option<&PageBytes>,
) -> Result<(), ResetError> {
    let copy = old.map(|old| {
        move |room: &mut PageBytes| {
            room.copy_from_slice(old);
            Ok::<(), ResetError>(())
        }
    });
    shared.log().add(unit.block, unit.number, expected, copy)
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
