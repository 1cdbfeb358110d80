//! The return path: what a migration's destination sends to its source.

use std::io::Read;

use super::WireError;
use super::input::Input;

/// The value of a RESUME_ACK (`MIGRATION_RESUME_ACK_VALUE`).
const RESUME_ACK: u32 = 1;

/// What follows a bitmap (`RAMBLOCK_RECV_BITMAP_ENDING`).
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// The most bytes of a bitmap: for a block of 4 TiB.
const LONGEST_BITMAP: u64 = 128 << 20;

/// Bytes of a bitmap that are read at once.
const BITMAP_PIECE: u64 = 64 << 10;

/// One message of the return path (`enum mig_rp_message_type` in QEMU's
/// `migration/migration.h`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReturnPathMessage {
    /// The destination is done; 0 means that all went well.
    Shut(u32),
    /// The answer to a PING with the same value.
    Pong(u32),
    /// The guest waits for these bytes of a block.
    RequestPages {
        /// The block's name, or `None` for the block of the last request.
        block: Option<String>,
        /// Offset in the block, in bytes; a multiple of the host page size.
        offset: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Which pages of a block a destination has received whose postcopy was interrupted: bit 0
    /// of the first byte is the block's first page.
    Received {
        /// The block's name.
        block: String,
        /// One bit a page.
        pages: Vec<u8>,
    },
    /// The destination goes on with an interrupted postcopy.
    Resumed,
    /// A message that a postcopy source can ignore, by its type.
    Other(u16),
}

/// Reads the messages of a return path.
pub struct ReturnPath<R> {
    input: Input<R>,
}

impl<R: Read> ReturnPath<R> {
    /// A reader of the messages that `input` gives.
    pub fn new(input: R) -> ReturnPath<R> {
        ReturnPath { input: Input::new(input) }
    }

    /// Bytes of the messages that were read so far.
    pub fn at(&self) -> u64 {
        self.input.at()
    }

    /// Where the messages are read from, which may be ahead of [`at`](ReturnPath::at).
    pub fn input_mut(&mut self) -> &mut R {
        self.input.inner_mut()
    }

    /// The next message, or `None` when the destination has closed the path.
    ///
    /// # Errors
    /// When reading fails, when the path ends inside a message, or when a message
    /// has another length than its type allows.
    pub fn next_message(&mut self) -> Result<Option<ReturnPathMessage>, WireError> {
        let inside = "a return path message";
        if self.input.at_end()? {
            return Ok(None);
        }
        let at = self.input.at();
        let kind = self.input.u16(inside)?;
        let len = usize::from(self.input.u16(inside)?);
        let body = self.input.take(len, inside)?;
        let message = match (kind, body) {
            (1, &[a, b, c, d]) => ReturnPathMessage::Shut(u32::from_be_bytes([a, b, c, d])),
            (2, &[a, b, c, d]) => ReturnPathMessage::Pong(u32::from_be_bytes([a, b, c, d])),
            (3 | 4, body) => return request(kind, body, at).map(Some),
            (5, body) => {
                let name =
                    body.split_first().filter(|(len, name)| usize::from(**len) == name.len());
                let name = name.and_then(|(_, name)| String::from_utf8(name.to_vec()).ok());
                let malformed = "a bitmap of received pages without a block's name";
                let block =
                    name.ok_or_else(|| WireError::Malformed { at, what: malformed.into() })?;
                return self.received(block).map(Some);
            }
            (6, &[a, b, c, d]) if u32::from_be_bytes([a, b, c, d]) == RESUME_ACK => {
                ReturnPathMessage::Resumed
            }
            (1 | 2, _) => {
                let what = format!("a return path message of type {kind} with {len} bytes");
                return Err(WireError::Malformed { at, what });
            }
            (kind, _) => ReturnPathMessage::Other(kind),
        };
        Ok(Some(message))
    }

    /// The bitmap behind the message that announces it, outside of its length.
    fn received(&mut self, block: String) -> Result<ReturnPathMessage, WireError> {
        let inside = "a bitmap of received pages";
        let at = self.input.at();
        let malformed = |what: String| WireError::Malformed { at, what };
        let len = self.input.u64(inside)?;
        if len > LONGEST_BITMAP {
            return Err(malformed(format!("{inside} with {len} bytes")));
        }
        let mut pages = Vec::new();
        while (pages.len() as u64) < len {
            let piece = (len - pages.len() as u64).min(BITMAP_PIECE);
            pages.extend_from_slice(self.input.take(piece as usize, inside)?);
        }
        match self.input.u64(inside)? {
            BITMAP_END => Ok(ReturnPathMessage::Received { block, pages }),
            _ => Err(malformed(format!("{inside} without its end"))),
        }
    }
}

/// REQ_PAGES_ID (3: with a counted block name) or REQ_PAGES (4: without).
fn request(kind: u16, body: &[u8], at: u64) -> Result<ReturnPathMessage, WireError> {
    let malformed = |what: &str| WireError::Malformed { at, what: what.to_string() };
    let Some((range, name)) = body.split_first_chunk::<12>() else {
        return Err(malformed("a page request that is too short"));
    };
    let [o0, o1, o2, o3, o4, o5, o6, o7, l0, l1, l2, l3] = *range;
    let block = match (kind, name.split_first()) {
        (4, None) => None,
        (3, Some((&len, name))) if usize::from(len) == name.len() => Some(
            String::from_utf8(name.to_vec())
                .map_err(|_| malformed("a page request for a block whose name is not text"))?,
        ),
        _ => return Err(malformed("a page request whose length does not fit its type")),
    };
    Ok(ReturnPathMessage::RequestPages {
        block,
        offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
        len: u32::from_be_bytes([l0, l1, l2, l3]),
    })
}
