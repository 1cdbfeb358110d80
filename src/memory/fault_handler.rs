//! Takes faults from a userfaultfd and has them answered.
//!
//! Waking a thread that sleeps in poll(2) takes longer than answering the fault
//! itself (63 µs against 17 µs was measured with a bare loop), and faults come in
//! bursts. So the intake spins for a while after each fault before it sleeps: twice as
//! long as before, up to [`SPIN_MAX`], where that has caught a fault or would have; half
//! as long where the next fault was far away, so that faults that come one by one cost
//! hardly more than their answers.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{FaultReport, FaultServer, Memory, MemoryError};
use crate::cancel::Cancellation;
use crate::host::uffd::{EVENTS_AT_ONCE, EventBuffer, Uffd, UffdEvent};
use crate::page::{BlockId, PAGE_SHIFT, PAGE_SIZE, Run};
use crate::transport::{DirectPlace, PlaceError};

/// The longest time to spin without an event.
const SPIN_MAX: Duration = Duration::from_micros(200);

/// The same while memory is being filled: the processors are busy then, and whoever has
/// just been given a page may be waiting for the one that spins (on two processors, one
/// fault in a hundred waited out all of [`SPIN_MAX`]).
const SPIN_MAX_FILLING: Duration = Duration::from_micros(60);

/// The shortest time to spin. It is what tells that faults have begun to come in bursts
/// where they come too fast to be slept between.
const SPIN_MIN: Duration = Duration::from_micros(5);

/// How long to spin before the next sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spin(Duration);

impl Spin {
    /// Spinning has caught an event.
    fn caught(&mut self) {
        self.0 = (self.0 * 2).min(SPIN_MAX);
    }

    /// Spinning has caught nothing.
    fn in_vain(&mut self) {
        self.0 = (self.0 / 2).max(SPIN_MIN);
    }

    /// An event came, so long after the intake went to sleep: would spinning have caught it?
    fn woken(&mut self, after: Duration) {
        if after <= SPIN_MAX {
            self.caught();
        }
    }
}

/// The thread that takes faults; one of possibly several readers of a userfaultfd.
pub struct Intake {
    memory: Arc<Memory>,
    server: FaultServer,
    uffd: Arc<Uffd>,
    cancel: Cancellation,
    /// Readable once it is cancelled: wakes it where it sleeps.
    wake: Arc<EventFd>,
    /// The blocks by address: first address, address behind the last, block.
    ranges: Vec<(u64, u64, BlockId)>,
    /// Addresses that somebody waits for and nobody has answered, with the time of the event.
    waiting: VecDeque<(u64, Instant)>,
}

impl Intake {
    /// An intake of the faults that `direct` installs pages for; it must know every
    /// block, since a fault that is taken here is told to nobody else. `cancel` makes its `run`
    /// return once what it is answering is answered.
    ///
    /// # Errors
    /// When a reader of the source or a descriptor can't be had.
    pub fn new(
        memory: Arc<Memory>,
        direct: &DirectPlace,
        cancel: &Cancellation,
    ) -> Result<Intake, MemoryError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| MemoryError::Intake(PlaceError::Io(errno.into())))?;
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
        Ok(Intake {
            server: FaultServer::new(Arc::clone(&memory))?,
            memory,
            uffd: Arc::clone(direct.uffd()),
            cancel: cancel.clone(),
            wake,
            ranges,
            waiting: VecDeque::with_capacity(4 * EVENTS_AT_ONCE),
        })
    }

    /// Records what is demanded, for so long from now on.
    pub fn recording(self, window: Duration) -> Intake {
        Intake { server: self.server.recording(window), ..self }
    }

    /// Takes and answers faults until it is stopped; that the process has gone whose
    /// memory it is shows only when a page is installed. Returns what was seen; an
    /// answer's time runs from the event being read to the page being in place.
    ///
    /// # Errors
    /// When a fault could not be answered; whoever waits for it waits forever.
    pub fn run(mut self) -> Result<FaultReport, MemoryError> {
        let mut events = EventBuffer::default();
        let mut spin = Spin(SPIN_MAX);
        while self.wait(&mut events, &mut spin)? {
            for _ in 0..self.waiting.len() {
                let Some(fault) = self.waiting.pop_front() else { break };
                match self.answer(fault) {
                    // The event that ends this may be ours to read.
                    Err(error) if error.is_passing() => self.waiting.push_back(fault),
                    done => done?,
                }
            }
        }
        Ok(self.server.into_report())
    }

    /// Waits until somebody waits for memory; false when it is time to stop.
    fn wait(&mut self, events: &mut EventBuffer, spin: &mut Spin) -> Result<bool, MemoryError> {
        if !self.waiting.is_empty() {
            std::thread::yield_now();
            self.take(events)?;
            return Ok(!self.is_stopped());
        }
        // Where the layout changes, each look keeps others from installing.
        if !self.uffd.tells_of_layout() {
            let start = Instant::now();
            let most = if self.memory.is_filling() { SPIN_MAX_FILLING } else { SPIN_MAX };
            while start.elapsed() < most.min(spin.0) && !self.is_stopped() {
                if self.take(events)? {
                    spin.caught();
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            spin.in_vain();
        }
        while !self.is_stopped() {
            let mut fds = [
                PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            let asleep = Instant::now();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(MemoryError::Intake(PlaceError::Io(errno.into()))),
            }
            let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
            if fds[0].revents().is_some_and(|seen| seen.intersects(broken)) {
                return Ok(false);
            }
            if self.take(events)? {
                spin.woken(asleep.elapsed());
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_stopped(&self) -> bool {
        self.cancel.is_requested()
    }

    /// Takes the events that are there, and notes what has become of memory before
    /// anybody can install more. Says whether somebody waits for memory.
    fn take(&mut self, events: &mut EventBuffer) -> Result<bool, MemoryError> {
        let _alone = self.uffd.alone();
        if !self.uffd.read(events).map_err(|e| MemoryError::Intake(e.into()))? {
            return Ok(false);
        }
        let heard = Instant::now();
        for event in events.events() {
            match event {
                UffdEvent::Fault { address } => self.waiting.push_back((address, heard)),
                UffdEvent::Removed { start, end } | UffdEvent::Unmapped { start, end } => {
                    self.give_up(start, end);
                }
                UffdEvent::Other => {}
            }
        }
        Ok(!self.waiting.is_empty())
    }

    fn find(&self, address: u64) -> Option<(u64, BlockId)> {
        let behind = self.ranges.partition_point(|(start, ..)| *start <= address);
        let (start, end, block) = *self.ranges.get(behind.checked_sub(1)?)?;
        (address < end).then_some((start, block))
    }

    fn answer(&mut self, (address, heard): (u64, Instant)) -> Result<(), MemoryError> {
        let Some((start, block)) = self.find(address) else {
            // Not memory of the guest's: whoever waits there is told to look again, and
            // the owner of the userfaultfd hears of it next time.
            let page = address & !(PAGE_SIZE as u64 - 1);
            return self
                .uffd
                .wake(page, PAGE_SIZE as u64)
                .map_err(|e| MemoryError::Intake(e.into()));
        };
        let page_size = self.memory.block(block).page_size;
        let offset = (address - start) & !(page_size - 1);
        let len = page_size.min(self.memory.block(block).len - offset);
        self.server.serve(block, offset, len, heard)
    }

    /// Notes that memory was given back or unmapped: what is absent of it needn't be
    /// brought any more. Whoever asks for it nevertheless gets zeros ([`Place::wake`]).
    ///
    /// [`Place::wake`]: crate::transport::Place::wake
    fn give_up(&self, start: u64, end: u64) {
        for (from, to, block) in &self.ranges {
            let page_size = self.memory.block(*block).page_size;
            let first = (start.clamp(*from, *to) - from).next_multiple_of(page_size);
            let last = match end >= *to {
                true => to - from,
                false => (end.max(*from) - from) & !(page_size - 1),
            };
            if first < last {
                let count = (last - first) >> PAGE_SHIFT;
                self.memory.give_up(Run { block: *block, first: first >> PAGE_SHIFT, count });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_gets_short_for_faults_one_by_one_and_long_again_for_bursts() {
        let mut spin = Spin(SPIN_MAX);
        let far = Duration::from_millis(10);
        let spent: Duration = (0..100)
            .map(|_| {
                let spun = spin.0;
                spin.in_vain();
                spin.woken(far);
                spun
            })
            .sum();
        assert_eq!(spin, Spin(SPIN_MIN));
        assert!(spent < SPIN_MAX * 2 + SPIN_MIN * 100, "{spent:?}");
        // Faults that come right after it has gone to sleep, then while it spins.
        for _ in 0..20 {
            spin.woken(SPIN_MAX / 4);
        }
        assert_eq!(spin, Spin(SPIN_MAX));
        spin.in_vain();
        spin.caught();
        assert_eq!(spin, Spin(SPIN_MAX));
    }
}
