//! What goes between a server and its broker: a packet for each question, and one for its answer.
//! All numbers are little-endian.
//!
//! ```text
//! question   id u64, kind u8, then by kind: a path; the next bytes; nothing; the first address u64
//!            and the one behind the last u64
//! answer     id u64, errno i32 or 0, number u64; with the file that was asked for
//! ```

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::host::packets;

/// Bytes of a piece at most; and a path is no longer.
pub(super) const PIECE: usize = 32 << 10;

/// Bytes of the longest question.
const MOST: usize = 9 + PIECE;

const OPEN: u8 = 1;
const TAKE: u8 = 2;
const STORE: u8 = 3;
const COLLAPSE: u8 = 4;

/// What a server asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Question {
    /// Open this file for reading.
    Open(PathBuf),
    /// Take the next piece of a working set.
    Take(Vec<u8>),
    /// Replace the working set by what was taken.
    Store,
    /// Collapse this memory.
    Collapse(Range<u64>),
}

/// What became of it.
#[derive(Debug)]
pub(super) struct Answer {
    /// Zero, or why it was not done (errno(3)).
    pub errno: i32,
    /// Bytes that are in huge pages now.
    pub number: u64,
    /// The file that was asked for.
    pub file: Option<OwnedFd>,
}

impl Question {
    /// The question as a packet. The id tells its answer from those to other questions, which a
    /// predecessor may have asked.
    pub fn encode(&self, id: u64) -> Vec<u8> {
        let mut bytes = id.to_le_bytes().to_vec();
        match self {
            Question::Open(path) => {
                bytes.push(OPEN);
                bytes.extend_from_slice(path.as_os_str().as_bytes());
            }
            Question::Take(piece) => {
                bytes.push(TAKE);
                bytes.extend_from_slice(piece);
            }
            Question::Store => bytes.push(STORE),
            Question::Collapse(range) => {
                bytes.push(COLLAPSE);
                bytes.extend_from_slice(&range.start.to_le_bytes());
                bytes.extend_from_slice(&range.end.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads a packet; nothing where it is no question.
    pub fn decode(bytes: &[u8]) -> Option<(u64, Question)> {
        let (id, rest) = bytes.split_first_chunk()?;
        let (kind, body) = rest.split_first()?;
        let question = match (*kind, body) {
            (OPEN, path) => Question::Open(Path::new(OsStr::from_bytes(path)).to_owned()),
            (TAKE, piece) => Question::Take(piece.to_vec()),
            (STORE, []) => Question::Store,
            (COLLAPSE, body) => {
                let (start, end) = body.split_first_chunk()?;
                let end = end.try_into().ok()?;
                Question::Collapse(u64::from_le_bytes(*start)..u64::from_le_bytes(end))
            }
            _ => return None,
        };
        Some((u64::from_le_bytes(*id), question))
    }

    /// Receives the next one; nothing at the end of the connection, or where what comes is no
    /// question.
    pub fn receive(from: impl AsFd) -> io::Result<Option<(u64, Question)>> {
        let mut bytes = [0; MOST];
        let (len, _) = packets::receive(from, &mut bytes)?;
        Ok(Question::decode(&bytes[..len]))
    }
}

impl Answer {
    const BYTES: usize = 20;

    /// That it was done.
    pub fn done(number: u64, file: Option<OwnedFd>) -> Answer {
        Answer { errno: 0, number, file }
    }

    /// That it was not.
    pub fn failed(error: &io::Error) -> Answer {
        Answer { errno: error.raw_os_error().unwrap_or(libc::EIO), number: 0, file: None }
    }

    /// Sends it, as the answer to the question of that id.
    pub fn send(&self, id: u64, to: impl AsFd) -> io::Result<()> {
        let mut bytes = [0; Answer::BYTES];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.errno.to_le_bytes());
        bytes[12..].copy_from_slice(&self.number.to_le_bytes());
        packets::send(to.as_fd(), &bytes, self.file.as_ref().map(AsFd::as_fd))
    }

    /// Receives the next one, with the id of its question; waits for it. Nothing at the end of the
    /// connection, or where what comes is no answer.
    pub fn receive(from: impl AsFd) -> io::Result<Option<(u64, Answer)>> {
        let mut bytes = [0; Answer::BYTES + 1];
        let (len, file) = packets::receive(from, &mut bytes)?;
        let Some((id, rest)) = bytes[..len].split_first_chunk() else { return Ok(None) };
        let Some((errno, rest)) = rest.split_first_chunk() else { return Ok(None) };
        let Ok(number) = rest.try_into() else { return Ok(None) };
        let (errno, number) = (i32::from_le_bytes(*errno), u64::from_le_bytes(number));
        Ok(Some((u64::from_le_bytes(*id), Answer { errno, number, file })))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn questions_are_read_as_they_were_asked() {
        for question in [
            Question::Open("/a b.snap".into()),
            Question::Take(vec![1, 2, 3]),
            Question::Store,
            Question::Collapse(1 << 40..(1 << 40) + (2 << 20)),
        ] {
            assert_eq!(Question::decode(&question.encode(7)), Some((7, question)));
        }
    }

    #[test]
    fn an_answer_arrives_with_its_file() {
        let (ours, theirs) = packets::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        Answer::done(5, Some(file.into())).send(9, &ours).unwrap();
        let (id, answer) = Answer::receive(&theirs).unwrap().unwrap();
        assert_eq!((id, answer.errno, answer.number, answer.file.is_some()), (9, 0, 5, true));
        drop(ours);
        assert!(Answer::receive(&theirs).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn anything_may_be_received(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some((id, question)) = Question::decode(&bytes) {
                prop_assert_eq!(question.encode(id), bytes);
            }
        }
    }
}
