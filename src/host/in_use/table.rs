//! A table of /proc, read as a whole.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};

/// Something of /proc could not be read.
#[derive(Debug, thiserror::Error)]
#[error("can't read {path}: {source}", path = path.display())]
pub struct ReadError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl ReadError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::of_io(&self.source)
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), Some(&self.path), None)
    }
}

/// A file of /proc as text.
pub(super) fn read(path: &str) -> Result<String, ReadError> {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .map_err(|source| ReadError { path: path.into(), source })
}
