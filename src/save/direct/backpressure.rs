//! Holding QEMU's stream back while memory is read from outside.
//!
//! What QEMU sends meanwhile is what we read as well, and sending it takes a processor, and splits the huge
//! pages of what was sent. So the stream is not read, and QEMU's thread stops in its write(2), until a write
//! of the guest's waits for it: that thread, which is also the one that lets the guest write, then has to go
//! on at once. We see that as QEMU would, by a copy of its userfaultfd.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cancel::Cancellation;
use crate::host::uffd::Uffd;
use crate::save::merge::Merge;

/// How long the stream flows once the guest has had to wait: who has written writes again.
const FLOWS: Duration = Duration::from_micros(500);

/// How long goes by between two looks at what poll(2) does not tell: a write that QEMU knows of, and can't
/// let be since its page does not fit into the socket; a page that a clone wants; the end of reading. In
/// milliseconds.
const LOOK: u8 = 1;

/// A stream that is held back.
pub(in crate::save) struct Backpressure {
    /// Copies of QEMU's own.
    userfaultfds: Vec<Uffd>,
    merge: Arc<Merge>,
    /// Requested once nothing more is read from outside, or nobody wants it.
    over: [Cancellation; 2],
    flows_until: Instant,
}

impl Backpressure {
    /// Holds back the stream of process `pid`, until one of `over` is requested. None if it can't be seen
    /// when its guest waits.
    pub fn new(pid: i32, merge: &Arc<Merge>, over: [Cancellation; 2]) -> Option<Backpressure> {
        let userfaultfds = Uffd::all_of(pid)
            .inspect_err(|error| tracing::debug!("QEMU's stream is not held back: {error}"))
            .ok()
            .filter(|found| !found.is_empty())?;
        Some(Backpressure {
            userfaultfds,
            merge: Arc::clone(merge),
            over,
            flows_until: Instant::now(),
        })
    }

    /// Waits until the stream is to be read, and tells whether somebody waits for it that did not before.
    /// `meanwhile` is called every millisecond or so.
    pub fn wait(&mut self, meanwhile: impl Fn(&Merge)) -> bool {
        loop {
            if self.over.iter().any(Cancellation::is_requested) || Instant::now() < self.flows_until
            {
                return false;
            }
            if self.is_wanted() {
                self.flows_until = Instant::now() + FLOWS;
                return true;
            }
            meanwhile(&self.merge);
        }
    }

    /// Whether somebody waits for the stream within a millisecond.
    fn is_wanted(&self) -> bool {
        if self.merge.takes_want() {
            return true;
        }
        let mut waiting: Vec<PollFd<'_>> =
            self.userfaultfds.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        // What can't be told counts as somebody who waits.
        poll(&mut waiting, PollTimeout::from(LOOK)) != Ok(0)
            || self.userfaultfds.iter().any(|fd| fd.waiting().is_none_or(|count| count > 0))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use memmap2::MmapMut;
    use tokio::sync::oneshot;

    use super::*;
    use crate::host::uffd::FaultBuffer;
    use crate::page::PAGE_SIZE;

    #[test]
    fn a_stream_is_wanted_by_who_waits_and_behind_the_end() {
        // This process, as if it were QEMU.
        let uffd = Uffd::create().unwrap();
        let mut memory = MmapMut::map_anon(PAGE_SIZE).unwrap();
        let address = memory.as_ptr() as u64;
        // SAFETY: a mapping of ours, which nobody reads before it is filled.
        unsafe { uffd.register(address, PAGE_SIZE as u64) }.unwrap();
        let merge = Arc::new(Merge::new(None, None, &[], oneshot::channel().0));
        let over = [Cancellation::new(), Cancellation::new()];
        let mut held = Backpressure::new(std::process::id() as i32, &merge, over.clone()).unwrap();
        // Other tests have some, too.
        held.userfaultfds = vec![uffd];
        let anew = |held: &mut Backpressure| held.flows_until = Instant::now();
        thread::scope(|scope| {
            let written = scope.spawn(move || memory[0] = 1);
            assert!(held.wait(|_| ()));
            // It flows for a moment, and then as long as it is not let go who waits.
            let mut faults = FaultBuffer::default();
            assert_eq!(held.userfaultfds[0].read_faults(&mut faults).unwrap().count(), 1);
            anew(&mut held);
            assert!(held.wait(|_| ()));
            // SAFETY: memory of ours.
            unsafe { held.userfaultfds[0].zero(address, PAGE_SIZE as u64, 4096) }.unwrap();
            written.join().unwrap();
        });
        anew(&mut held);
        merge.want();
        assert!(held.wait(|_| ()));
        anew(&mut held);
        let looked = std::cell::Cell::new(0);
        assert!(!held.wait(|_| {
            looked.set(looked.get() + 1);
            if looked.get() == 3 {
                over[1].request();
            }
        }));
        assert_eq!(looked.get(), 3);
    }
}
