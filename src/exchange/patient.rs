//! Reading what may never come: a pipe is waited for until the read is cancelled.

use std::io::{self, Read};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cancel::Cancellation;

/// How long a wait goes on without looking whether it is still wanted, in milliseconds.
const NAP_MS: u16 = 100;

/// Reads a file or a pipe. A read fails once cancellation is requested, be there something to
/// read or not.
pub(super) struct Patient<'a, R> {
    inner: R,
    cancel: &'a Cancellation,
}

impl<'a, R: Read + AsFd> Patient<'a, R> {
    pub fn new(inner: R, cancel: &'a Cancellation) -> Self {
        Patient { inner, cancel }
    }
}

impl<R: Read + AsFd> Read for Patient<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.cancel.is_requested() {
                return Err(io::Error::other("interrupted"));
            }
            // Files are ready at once, and so is what has ended (poll(2)).
            let mut ready = [PollFd::new(self.inner.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(NAP_MS)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return self.inner.read(buffer),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_silent_pipe_is_waited_for_until_nobody_wants_it() {
        let (input, mut feed) = io::pipe().unwrap();
        let cancel = Cancellation::new();
        std::thread::scope(|scope| {
            let mut input = Patient::new(input, &cancel);
            let (sender, came) = std::sync::mpsc::channel();
            let reading = scope.spawn(move || {
                let mut bytes = [0; 4];
                input.read_exact(&mut bytes).unwrap();
                sender.send(bytes).unwrap();
                input.read(&mut bytes).unwrap_err().to_string()
            });
            feed.write_all(b"QEVM").unwrap();
            assert_eq!(came.recv().unwrap(), *b"QEVM");
            cancel.request();
            assert_eq!(reading.join().unwrap(), "interrupted");
        });
        drop(feed);
    }
}
