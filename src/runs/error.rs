//! What can go wrong with what is recorded of reverts.

use std::io;
use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};

/// Why reverts can't be listed, stopped or cleaned up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunsError {
    /// The user's directory can't be used.
    #[error("the directory `{}` can't be used: {source}", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No revert has this id.
    #[error("no revert whose id begins with `{id}` is under way")]
    NoSuchRun {
        /// The id, or its beginning.
        id: String,
    },
    /// Several reverts have an id that begins so.
    #[error("`{id}` is the beginning of several ids ({}): give more of it", .ids.join(", "))]
    Ambiguous {
        /// The beginning.
        id: String,
        /// The ids.
        ids: Vec<String>,
    },
    /// The output of a revert goes to no file.
    #[error("revert `{id}` has no log: it runs in the foreground, and writes to its terminal")]
    NoLog {
        /// The id.
        id: String,
    },
    /// Nobody tracks what the guest writes.
    #[error(
        "nobody tracks what the guest of revert `{id}` writes: `RevertOptions::resettable` has that \
         done, from when all memory is in place"
    )]
    NotTracked {
        /// The id.
        id: String,
    },
    /// The server of a revert did not answer.
    #[error("the server of revert `{id}` does not answer: {source}")]
    Asking {
        /// The id.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// A log can't be read.
    #[error("the log `{}` can't be read: {source}", .path.display())]
    Log {
        /// The log.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A process can't be ended.
    #[error("process {pid} ({what}) can't be ended: {source}")]
    Process {
        /// What it is.
        what: &'static str,
        /// Its number.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// Something can't be removed.
    #[error("`{}` can't be removed: {source}", .path.display())]
    Remove {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl RunsError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use RunsError::*;
        match self {
            NoSuchRun { .. } | NoLog { .. } => ErrorKind::NotFound,
            Ambiguous { .. } => ErrorKind::OptionsInvalid,
            NotTracked { .. } => ErrorKind::NotResettable,
            Asking { .. } => ErrorKind::ServerLost,
            Directory { source, .. }
            | Log { source, .. }
            | Process { source, .. }
            | Remove { source, .. } => ErrorKind::of_io(source),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use RunsError::*;
        let (path, pid) = match self {
            Directory { path, .. } | Log { path, .. } | Remove { path, .. } => (Some(path), None),
            Process { pid, .. } => (None, Some(*pid)),
            _ => (None, None),
        };
        Details::new(&self.to_string(), path, pid)
    }
}
