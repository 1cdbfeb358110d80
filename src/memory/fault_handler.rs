//! Takes faults from a userfaultfd and has them answered.
//!
//! Faults come in bursts: it spins for a while after each before it sleeps ([`Spin`]).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::spin::Spin;
use super::{FaultReport, Memory, MemoryError, Pager};
use crate::cancel::Cancellation;
use crate::host::uffd::{FAULTS_AT_ONCE, FaultBuffer, Uffd};
use crate::page::{BlockId, PAGE_SIZE};
use crate::transport::{DirectTransport, TransportError};

/// The longest time to spin while memory is being filled: the processors are busy then, and a thread that has
/// just been given a page may wait for the processor on which we spin (on two processors, one
/// fault in a hundred waited for all of [`SPIN_MAX`]).
const SPIN_MAX_FILLING: Duration = Duration::from_micros(60);

/// Takes faults from a userfaultfd, of which others may be readers as well.
pub struct FaultHandler {
    memory: Arc<Memory>,
    pager: Pager,
    uffd: Arc<Uffd>,
    cancel: Cancellation,
    /// Becomes readable by cancelling, to end its sleep.
    wake: Arc<EventFd>,
    /// The blocks by address: first address, address behind the last, block.
    ranges: Vec<(u64, u64, BlockId)>,
    /// The addresses that the last read told of. Room for them is made ahead, so that taking
    /// faults allocates nothing.
    faults: Vec<u64>,
}

impl FaultHandler {
    /// A handler of the faults in the memory that `direct` serves. That must be every block,
    /// since no other reader hears of a fault that is read here. `cancel` ends [`run`], behind
    /// the faults that it has read.
    ///
    /// [`run`]: FaultHandler::run
    ///
    /// # Errors
    /// When a reader of the source or a descriptor can't be had.
    pub fn new(
        memory: Arc<Memory>,
        direct: &DirectTransport,
        cancel: &Cancellation,
    ) -> Result<FaultHandler, MemoryError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| MemoryError::FaultHandler(TransportError::Io(errno.into())))?;
        let wake = Arc::new(wake);
        cancel.on_request({
            let wake = Arc::clone(&wake);
            // It fails only when the counter is full, and then it is readable as well.
            move || _ = wake.write(1)
        });
        let range = |(index, block): (usize, &crate::page::Block)| {
            let id = BlockId(index as u16);
            direct.address(id).map(|start| (start, start + block.len, id))
        };
        let mut ranges: Vec<_> = memory.blocks().iter().enumerate().filter_map(range).collect();
        ranges.sort_unstable();
        Ok(FaultHandler {
            pager: Pager::new(Arc::clone(&memory))?,
            memory,
            uffd: Arc::clone(direct.uffd()),
            cancel: cancel.clone(),
            wake,
            ranges,
            faults: Vec::with_capacity(FAULTS_AT_ONCE),
        })
    }

    /// Records what is demanded, for so long from now on.
    pub fn recording(self, window: Duration) -> FaultHandler {
        FaultHandler { pager: self.pager.recording(window), ..self }
    }

    /// Takes and answers faults until it is cancelled. That the guest's process has ended shows
    /// only when a page is installed. In the report, an answer's time runs from reading the
    /// fault to the page being in place.
    ///
    /// # Errors
    /// When a fault could not be answered; the thread that waits for it waits forever.
    pub fn run(mut self) -> Result<FaultReport, MemoryError> {
        let mut buffer = FaultBuffer::default();
        let mut spin = Spin::default();
        while let Some(heard) = self.wait(&mut buffer, &mut spin)? {
            for at in 0..self.faults.len() {
                self.answer(self.faults[at], heard)?;
            }
        }
        Ok(self.pager.into_report())
    }

    /// Waits for faults, and returns when they were read; nothing once it is cancelled.
    fn wait(
        &mut self,
        buffer: &mut FaultBuffer,
        spin: &mut Spin,
    ) -> Result<Option<Instant>, MemoryError> {
        let start = Instant::now();
        let most = if self.memory.is_filling() { SPIN_MAX_FILLING } else { Duration::MAX };
        while start.elapsed() < most.min(spin.time()) && !self.is_stopped() {
            if let Some(heard) = self.take(buffer)? {
                spin.caught();
                return Ok(Some(heard));
            }
            std::hint::spin_loop();
        }
        spin.in_vain();
        while !self.is_stopped() {
            let mut fds = [
                PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            let asleep = Instant::now();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Err(MemoryError::FaultHandler(TransportError::Io(errno.into())));
                }
            }
            let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
            if fds[0].revents().is_some_and(|seen| seen.intersects(broken)) {
                return Ok(None);
            }
            if let Some(heard) = self.take(buffer)? {
                spin.woken(asleep.elapsed());
                return Ok(Some(heard));
            }
        }
        Ok(None)
    }

    fn is_stopped(&self) -> bool {
        self.cancel.is_requested()
    }

    /// Reads the faults that are there, and returns when; nothing when there are none.
    fn take(&mut self, buffer: &mut FaultBuffer) -> Result<Option<Instant>, MemoryError> {
        let faults =
            self.uffd.read_faults(buffer).map_err(|e| MemoryError::FaultHandler(e.into()))?;
        self.faults.clear();
        self.faults.extend(faults.map(|fault| fault.address));
        Ok((!self.faults.is_empty()).then(Instant::now))
    }

    fn find(&self, address: u64) -> Option<(u64, BlockId)> {
        let behind = self.ranges.partition_point(|(start, ..)| *start <= address);
        let (start, end, block) = *self.ranges.get(behind.checked_sub(1)?)?;
        (address < end).then_some((start, block))
    }

    fn answer(&mut self, address: u64, heard: Instant) -> Result<(), MemoryError> {
        let Some((start, block)) = self.find(address) else {
            // Not memory of the guest's. The thread is woken and faults again; the owner of the
            // userfaultfd may read that fault.
            let page = address & !(PAGE_SIZE as u64 - 1);
            return self
                .uffd
                .wake(page, PAGE_SIZE as u64)
                .map_err(|e| MemoryError::FaultHandler(e.into()));
        };
        let page_size = self.memory.block(block).page_size;
        let offset = (address - start) & !(page_size - 1);
        let len = page_size.min(self.memory.block(block).len - offset);
        self.pager.serve(block, offset, len, heard)
    }
}
