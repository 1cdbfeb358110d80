//! The return path, read without being taken out of its socket: what was not dealt with is
//! still there for a successor.
//!
//! As long as nobody could succeed us, what was read is taken out as soon as more is wanted: QEMU
//! may send more than the socket holds.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Reads a socket by peeking (MSG_PEEK with SO_PEEK_OFF, socket(7)). What has been read leaves
/// the socket only by [`consume`](Unread::consume).
pub(super) struct Unread {
    socket: UnixStream,
    /// Bytes that have been read.
    read: u64,
    /// Bytes that have left the socket.
    consumed: u64,
    /// Whether a successor reads again what has not been consumed.
    kept: bool,
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
            0 => Ok(Unread { socket, read: 0, consumed: 0, kept: true }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The same for a socket that no successor reads until [`keep`](Unread::keep) is called.
    pub fn for_us_alone(self) -> Unread {
        Unread { kept: false, ..self }
    }

    /// From now on a successor may read what has not been consumed.
    pub fn keep(&mut self) {
        self.kept = true;
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
        if !self.kept {
            self.consume(self.read)?;
        }
        // SAFETY: the buffer is as long as is said, and outlives the call.
        let count = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_PEEK,
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.read += count as u64;
        Ok(count)
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

    #[test]
    fn more_is_read_than_the_socket_holds_where_nobody_succeeds_us() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut unread = Unread::new(ours).unwrap().for_us_alone();
        let sender = std::thread::spawn(move || theirs.write_all(&vec![7; 4 << 20]));
        let mut bytes = vec![0; 4 << 20];
        unread.read_exact(&mut bytes).unwrap();
        sender.join().unwrap().unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
    }
}
