//! Where an export is written: a file that gets its name once it is complete, or a pipe.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ExchangeError;
use crate::image::{ImageError, Target};

/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// An export under way. Dropped before [`Output::commit`], its file is removed.
pub(super) struct Output {
    writer: BufWriter<File>,
    /// Bytes written in order.
    written: u64,
    /// The file, if it is one.
    target: Option<Target>,
}

impl Output {
    /// A file of this name, mode 0600; it may replace one with `force`.
    pub fn file(path: &Path, force: bool) -> Result<Output, ExchangeError> {
        let target = Target::create(path, force)?;
        let file = target.file().try_clone().map_err(ExchangeError::io("write", path))?;
        Ok(Output::over(file, Some(target)))
    }

    /// Standard output.
    pub fn stdout() -> Result<Output, ExchangeError> {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            let problem = "it is a terminal, and guest memory is no text";
            return Err(ExchangeError::Output(problem.into()));
        }
        let copy = stdout.as_fd().try_clone_to_owned();
        let copy = copy.map_err(|e| ExchangeError::Output(e.to_string()))?;
        Ok(Output::over(copy.into(), None))
    }

    fn over(file: File, target: Option<Target>) -> Output {
        Output { writer: BufWriter::with_capacity(BUFFER_BYTES, file), written: 0, target }
    }

    /// Writes in order.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), ExchangeError> {
        self.written += bytes.len() as u64;
        self.writer.write_all(bytes).map_err(|e| self.failed(e))
    }

    /// Writes at an offset of a file. Ranges that are never written are holes and read as zeros.
    pub fn put_at(&self, bytes: &[u8], offset: u64) -> Result<(), ExchangeError> {
        self.writer.get_ref().write_all_at(bytes, offset).map_err(|e| self.failed(e))
    }

    /// Makes a file this long, by a hole at its end.
    pub fn set_len(&self, len: u64) -> Result<(), ExchangeError> {
        self.writer.get_ref().set_len(len).map_err(|e| self.failed(e))
    }

    /// Makes it durable and gives it its name. Returns its length in bytes.
    pub fn commit(mut self) -> Result<u64, ExchangeError> {
        self.writer.flush().map_err(|e| self.failed(e))?;
        let Some(target) = self.target else { return Ok(self.written) };
        let len = target.file().metadata().map_err(ExchangeError::io("look at", target.path()))?;
        target.commit()?;
        Ok(len.len())
    }

    fn failed(&self, error: io::Error) -> ExchangeError {
        match &self.target {
            Some(target) => ImageError::io("write", target.path(), error).into(),
            None => ExchangeError::Output(error.to_string()),
        }
    }
}
