//! A buffered reader that counts, for formats without a length in front.

use std::io::{ErrorKind, Read};

use super::WireError;

/// The most bytes read from the peer in one call: enough that a page costs a small part of a
/// system call.
const BUFFER_BYTES: usize = 1 << 20;

/// Passes over so many bytes of what is read.
pub(super) type Skip<R> = fn(&mut R, i64) -> std::io::Result<()>;

/// Reads a stream piece by piece; a read never waits for more than is needed.
pub(super) struct Input<R> {
    inner: R,
    skip: Skip<R>,
    buffer: Box<[u8]>,
    /// What was read and not yet taken is `buffer[start..end]`.
    start: usize,
    end: usize,
    /// Offset in the stream of `buffer[start]`.
    at: u64,
}

impl<R: Read> Input<R> {
    pub fn new(inner: R) -> Input<R> {
        let skip: Skip<R> = |_, _| {
            let what = "a mapped-ram file can't be read from a pipe: name the file";
            Err(std::io::Error::other(what))
        };
        Input::skipping(inner, skip)
    }

    /// The same for what can be passed over.
    pub fn skipping(inner: R, skip: Skip<R>) -> Input<R> {
        Input { inner, skip, buffer: vec![0; BUFFER_BYTES].into(), start: 0, end: 0, at: 0 }
    }

    /// The same with its first byte at this offset.
    pub fn counting_from(self, at: u64) -> Input<R> {
        Input { at, ..self }
    }

    /// Continues at `offset` of the stream, which is not before the current position.
    pub fn skip_to(&mut self, offset: u64, inside: &'static str) -> Result<(), WireError> {
        let at = self.at;
        let Some(count) = offset.checked_sub(at) else {
            let what = format!("{inside} goes on at byte {offset}, which lies before it");
            return Err(WireError::Malformed { at, what });
        };
        let buffered = (self.end - self.start) as u64;
        if count <= buffered {
            self.start += count as usize;
        } else {
            let ahead = i64::try_from(count - buffered).map_err(|_| WireError::Malformed {
                at,
                what: format!("{inside} goes on at byte {offset}, where no file reaches"),
            })?;
            (self.skip)(&mut self.inner, ahead).map_err(|source| WireError::Io { at, source })?;
            (self.start, self.end) = (0, 0);
        }
        self.at = offset;
        Ok(())
    }

    /// Where it reads from, which may be ahead of [`at`](Input::at).
    pub fn inner_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// Bytes taken so far.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Reads once from the peer; false at its end.
    fn refill(&mut self) -> Result<bool, WireError> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        loop {
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(n) => {
                    self.end += n;
                    return Ok(n > 0);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(WireError::Io { at: self.at + self.end as u64, source });
                }
            }
        }
    }

    /// Whether the peer has ended and everything is taken.
    pub fn at_end(&mut self) -> Result<bool, WireError> {
        Ok(self.start == self.end && !self.refill()?)
    }

    /// Takes the next `n` bytes, at most [`BUFFER_BYTES`].
    pub fn take(&mut self, n: usize, inside: &'static str) -> Result<&[u8], WireError> {
        debug_assert!(n <= BUFFER_BYTES);
        while self.end - self.start < n {
            if !self.refill()? {
                let at = self.at + (self.end - self.start) as u64;
                return Err(WireError::Ended { at, inside });
            }
        }
        let taken = self.start..self.start + n;
        self.start += n;
        self.at += n as u64;
        Ok(&self.buffer[taken])
    }

    /// Takes the bytes that are available, and waits only if there are none; empty at the end.
    pub fn take_some(&mut self) -> Result<&[u8], WireError> {
        if self.start == self.end {
            self.refill()?;
        }
        let taken = self.start..self.end;
        self.start = self.end;
        self.at += taken.len() as u64;
        Ok(&self.buffer[taken])
    }

    fn array<const N: usize>(&mut self, inside: &'static str) -> Result<[u8; N], WireError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, inside)?);
        Ok(bytes)
    }

    pub fn u8(&mut self, inside: &'static str) -> Result<u8, WireError> {
        self.array::<1>(inside).map(|[b]| b)
    }

    pub fn u16(&mut self, inside: &'static str) -> Result<u16, WireError> {
        self.array(inside).map(u16::from_be_bytes)
    }

    pub fn u32(&mut self, inside: &'static str) -> Result<u32, WireError> {
        self.array(inside).map(u32::from_be_bytes)
    }

    pub fn u64(&mut self, inside: &'static str) -> Result<u64, WireError> {
        self.array(inside).map(u64::from_be_bytes)
    }

    /// A counted string: one byte of length, then the bytes, which QEMU keeps to
    /// printable ASCII.
    pub fn counted_string(&mut self, inside: &'static str) -> Result<String, WireError> {
        let len = usize::from(self.u8(inside)?);
        let at = self.at;
        let bytes = self.take(len, inside)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| WireError::Malformed {
            at,
            what: format!("{inside} holds a name that is not text"),
        })
    }
}
