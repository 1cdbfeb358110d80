//! The return path, read without being taken out of its socket: what was not dealt with is
//! still there for a successor.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Reads a socket by peeking (MSG_PEEK with SO_PEEK_OFF, socket(7)). What has been read leaves
/// the socket only by [`consume`](Unread::consume).
pub(super) struct Unread {
    socket: UnixStream,
    /// Bytes that have left the socket.
    consumed: u64,
}

impl Unread {
    /// Reads what the socket holds from its first byte on, whoever has peeked at it before.
    ///
    /// # Errors
    /// When the socket can't be read that way.
    pub fn new(socket: UnixStream) -> io::Result<Unread> {
        let from: libc::c_int = 0;
        // SAFETY: the option's value is an int, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEEK_OFF,
                (&raw const from).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        match set {
            0 => Ok(Unread { socket, consumed: 0 }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Takes all bytes ahead of this position out of the socket. They have been read, so it
    /// doesn't wait; and a process that is killed meanwhile has taken all or none of them.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn consume(&mut self, position: u64) -> io::Result<()> {
        let mut taken = [0; 512];
        while self.consumed < position {
            let len = taken.len().min((position - self.consumed) as usize);
            match self.socket.read(&mut taken[..len]) {
                Ok(0) => break,
                Ok(count) => self.consumed += count as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Read for Unread {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the buffer is as long as is said, and outlives the call.
        let count = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_PEEK,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_not_consumed_is_read_again() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let again = ours.try_clone().unwrap();
        let mut unread = Unread::new(ours).unwrap();
        let mut bytes = [0; 16];
        for part in [&b"one"[..], b"two"] {
            theirs.write_all(part).unwrap();
            assert_eq!(unread.read(&mut bytes).unwrap(), 3);
            assert_eq!(&bytes[..3], part);
        }
        unread.consume(2).unwrap();
        theirs.write_all(b"!").unwrap();
        assert_eq!((unread.read(&mut bytes).unwrap(), bytes[0]), (1, b'!'));
        drop(theirs);
        assert_eq!(unread.read(&mut bytes).unwrap(), 0);
        // Its successor begins at the first byte that is left.
        let mut all = Vec::new();
        let mut successor = Unread::new(again).unwrap();
        successor.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"etwo!");
    }
}
