//! Messages on the wire: bounded, one JSON object each.

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// The most bytes one message may have. QEMU's largest answers (such as
/// `query-qmp-schema`) are below 1 MiB.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Why no further message can be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("reading failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("QEMU closed the connection")]
    Closed,
    #[error("the connection was closed in the middle of a message")]
    ClosedInside,
    #[error("a message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("a message is not JSON ({source}): {start:?}")]
    NotJson { source: serde_json::Error, start: String },
}

/// Splits a byte stream into messages.
pub(super) struct Messages<R> {
    stream: BufReader<R>,
    /// The message being read. Kept here, not in `next`, so that dropping the
    /// future of `next` (a timeout) loses nothing.
    message: Vec<u8>,
    /// Where in `message` the current line starts.
    line_start: usize,
    /// Whether the first line may lack its beginning.
    continued: bool,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    pub(super) fn new(stream: R) -> Self {
        let (message, line_start, continued) = (Vec::new(), 0, false);
        Messages { stream: BufReader::new(stream), message, line_start, continued }
    }

    /// The messages of a stream of which somebody else has read a part: a first line that is
    /// no message is dropped.
    pub(super) fn continued(stream: R) -> Self {
        Messages { continued: true, ..Messages::new(stream) }
    }

    /// The next message. Safe to cancel.
    pub(super) async fn next(&mut self) -> Result<Value, ReadError> {
        loop {
            let available = self.stream.fill_buf().await?;
            if available.is_empty() {
                let inside = self.message.iter().any(|byte| !byte.is_ascii_whitespace());
                return Err(if inside { ReadError::ClosedInside } else { ReadError::Closed });
            }
            let newline = available.iter().position(|&byte| byte == b'\n');
            let taken = newline.map_or(available.len(), |at| at + 1);
            if self.message.len() + taken > MAX_MESSAGE {
                return Err(ReadError::TooLong);
            }
            self.message.extend_from_slice(&available[..taken]);
            self.stream.consume(taken);
            if newline.is_some() && self.is_complete() {
                let parsed = serde_json::from_slice(&self.message)
                    .map_err(|source| ReadError::NotJson { source, start: self.start() });
                self.message.clear();
                self.line_start = 0;
                if std::mem::take(&mut self.continued) && parsed.is_err() {
                    continue;
                }
                return parsed;
            }
        }
    }

    /// The beginning of an unfinished message, for an error message.
    pub(super) fn start(&self) -> String {
        String::from_utf8_lossy(&self.message[..self.message.len().min(80)]).trim().to_owned()
    }

    /// Whether the line just ended also ends the message. QEMU writes a message
    /// in one line, except on a `-qmp-pretty` socket: there the first line is a
    /// lone `{` and the last one a lone `}`, which inner lines never are because
    /// they are indented.
    fn is_complete(&mut self) -> bool {
        let first_line = self.line_start == 0;
        let line = self.message[self.line_start..].trim_ascii_end();
        let complete = match line {
            b"" if first_line => {
                self.message.clear();
                return false;
            }
            b"{" => false,
            _ if first_line => true,
            line => line == b"}",
        };
        self.line_start = self.message.len();
        complete
    }
}
