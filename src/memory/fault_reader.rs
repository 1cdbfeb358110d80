//! Waits for faults of a userfaultfd, and reads them.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::spin::Spin;
use crate::cancel::Cancellation;
use crate::host::uffd::{FAULTS_AT_ONCE, Fault, FaultBuffer, Uffd};
use crate::transport::TransportError;

/// Reads the faults of a userfaultfd, of which others may be readers as well.
///
/// They come in bursts: it spins for a while after each before it sleeps ([`Spin`]).
pub struct FaultReader {
    uffd: Arc<Uffd>,
    cancel: Cancellation,
    /// Becomes readable by cancelling, to end its sleep.
    wake: Arc<EventFd>,
    spin: Spin,
    buffer: FaultBuffer,
    /// What the last read told of. Room for it is made ahead, so that taking faults allocates
    /// nothing.
    faults: Vec<Fault>,
}

impl FaultReader {
    /// A reader that waits until it is cancelled.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(uffd: Arc<Uffd>, cancel: &Cancellation) -> Result<FaultReader, TransportError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| TransportError::Io(errno.into()))?;
        let wake = Arc::new(wake);
        cancel.on_request({
            let wake = Arc::clone(&wake);
            // It fails only when the counter is full, and then it is readable as well.
            move || _ = wake.write(1)
        });
        Ok(FaultReader {
            uffd,
            cancel: cancel.clone(),
            wake,
            spin: Spin::default(),
            buffer: FaultBuffer::default(),
            faults: Vec::with_capacity(FAULTS_AT_ONCE),
        })
    }

    /// Waits for faults, spinning `most` so long, and returns when they were read; nothing once it
    /// is cancelled, or their process has ended.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn wait(&mut self, most: Duration) -> Result<Option<Instant>, TransportError> {
        let start = Instant::now();
        while start.elapsed() < most.min(self.spin.time()) && !self.is_stopped() {
            if let Some(heard) = self.take()? {
                self.spin.caught();
                return Ok(Some(heard));
            }
            std::hint::spin_loop();
        }
        self.spin.in_vain();
        while !self.is_stopped() {
            let mut fds = [
                PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            let asleep = Instant::now();
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(TransportError::Io(errno.into())),
            }
            let broken = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
            if fds[0].revents().is_some_and(|seen| seen.intersects(broken)) {
                return Ok(None);
            }
            if let Some(heard) = self.take()? {
                self.spin.woken(asleep.elapsed());
                return Ok(Some(heard));
            }
        }
        Ok(None)
    }

    /// The faults that were read last.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    fn is_stopped(&self) -> bool {
        self.cancel.is_requested()
    }

    /// Reads the faults that are there, and returns when; nothing when there are none.
    fn take(&mut self) -> Result<Option<Instant>, TransportError> {
        let faults = self.uffd.read_faults(&mut self.buffer)?;
        self.faults.clear();
        self.faults.extend(faults);
        Ok((!self.faults.is_empty()).then(Instant::now))
    }
}
