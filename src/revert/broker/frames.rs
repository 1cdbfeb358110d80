//! What goes between a server and its broker: frames of one byte that says what it is, the
//! length of its body (u32, little-endian) and its body.

use std::io::{self, Read, Write};

use crate::memory::working_set;

/// The most bytes of a body.
const MOST: usize = working_set::MAX_BYTES;

/// A request, or the answer to one.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Asked: read the working set.
    Read,
    /// Asked: write this working set.
    Write(Vec<u8>),
    /// Asked: collapse memory, told as JSON.
    Collapse(Vec<u8>),
    /// Asked: collapse no more.
    Stop,
    /// Answered: what was asked for.
    Done(Vec<u8>),
    /// Answered: there is no working set.
    Nothing,
    /// Answered: why it can't be done.
    Failed(String),
}

impl Frame {
    fn parts(&self) -> (u8, &[u8]) {
        match self {
            Frame::Read => (1, &[]),
            Frame::Write(bytes) => (2, bytes),
            Frame::Collapse(bytes) => (3, bytes),
            Frame::Stop => (4, &[]),
            Frame::Done(bytes) => (5, bytes),
            Frame::Nothing => (6, &[]),
            Frame::Failed(why) => (7, why.as_bytes()),
        }
    }

    /// Sends it.
    pub fn send(&self, mut to: impl Write) -> io::Result<()> {
        let (kind, body) = self.parts();
        let mut bytes = Vec::with_capacity(5 + body.len());
        bytes.push(kind);
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(body);
        to.write_all(&bytes)
    }

    /// Receives the next one; nothing at the end of the connection.
    ///
    /// # Errors
    /// When what comes is no frame.
    pub fn receive(mut from: impl Read) -> io::Result<Option<Frame>> {
        let mut kind = [0];
        if from.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MOST {
            return Err(invalid());
        }
        let mut body = Vec::new();
        from.take(len as u64).read_to_end(&mut body)?;
        if body.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let frame = match kind[0] {
            1 => Frame::Read,
            2 => Frame::Write(body),
            3 => Frame::Collapse(body),
            4 => Frame::Stop,
            5 => Frame::Done(body),
            6 => Frame::Nothing,
            7 => Frame::Failed(String::from_utf8_lossy(&body).into_owned()),
            _ => return Err(invalid()),
        };
        Ok(Some(frame))
    }
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "this is no frame of a server or its broker")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_are_read_as_they_were_sent() {
        let frames = [
            Frame::Read,
            Frame::Write(vec![1, 2, 3]),
            Frame::Collapse(b"{}".to_vec()),
            Frame::Stop,
            Frame::Done(vec![7; 300]),
            Frame::Nothing,
            Frame::Failed("no".into()),
        ];
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.send(&mut bytes).unwrap());
        let mut rest = &bytes[..];
        for frame in frames {
            assert_eq!(Frame::receive(&mut rest).unwrap(), Some(frame));
        }
        assert_eq!(Frame::receive(&mut rest).unwrap(), None);
    }

    proptest! {
        #[test]
        fn anything_may_be_received(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut rest = &bytes[..];
            while let Ok(Some(_)) = Frame::receive(&mut rest) {}
        }
    }
}
