//! Why something that was asked of a pool was not done.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::event::Problem;
use crate::kind::{Details, ErrorKind};
use crate::revert::RevertError;

/// Why something that was asked of a pool was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// There is no pool of that name.
    #[error("there is no pool {name:?}; `snapback pool list` shows all")]
    NoSuchPool {
        /// The name.
        name: String,
    },
    /// There is no guest of that id or name.
    #[error("no guest {id:?} is taken: it was released, or has ended by itself")]
    NoSuchGuest {
        /// What was asked for.
        id: String,
    },
    /// There is a pool, or a guest, of that name.
    #[error("there is {what} {name:?} already; choose another name")]
    Exists {
        /// What: `a pool`, `a guest`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// All guests that may be taken are.
    #[error(
        "no guest of the pool {pool:?} was to be had within {waited:?}: {taken} of {max} are \
         taken, and {armed} wait; release some, or raise {raise}"
    )]
    Exhausted {
        /// The pool.
        pool: String,
        /// How many are taken.
        taken: usize,
        /// How many may be.
        max: u32,
        /// How many wait, armed.
        armed: usize,
        /// How long it was waited for.
        waited: Duration,
        /// The setting that would allow more: `max` or `memory_mib`.
        raise: &'static str,
    },
    /// The pool can't start guests.
    #[error("the pool {pool:?} has no guests, and can't start any: {}", problem.message)]
    Degraded {
        /// The pool.
        pool: String,
        /// Why.
        problem: Problem,
    },
    /// The pool was removed meanwhile.
    #[error("the pool {pool:?} was removed")]
    Removed {
        /// The pool.
        pool: String,
    },
    /// What was asked for can't be.
    #[error("{0}")]
    Invalid(String),
    /// A guest of the pool could not be brought to run.
    #[error("a guest of the pool {pool:?}: {}", by_settings(&source.to_string()))]
    Revert {
        /// The pool.
        pool: String,
        /// Why.
        source: Box<RevertError>,
    },
    /// The daemon's own files can't be used.
    #[error("{doing} `{}` failed: {source}", path.display())]
    State {
        /// What was done, as in `writing`.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon uses the directory.
    #[error("another daemon keeps its state in `{}`; end it, or choose another `PoolsOptions::state`", path.display())]
    DaemonRunning {
        /// The directory.
        path: PathBuf,
    },
}

/// The options of a revert that messages name, and the settings of a pool that stand for them; all
/// others have the names of their options.
const SETTINGS: [(&str, &str); 5] = [
    ("RewriteOptions::own", "dir"),
    ("RewriteOptions::extra", "arguments"),
    ("AgentOptions::socket", "agent"),
    ("RewriteOptions::", ""),
    ("AgentOptions::", ""),
];

/// A message of a revert's, with a pool's settings in the place of the options.
fn by_settings(message: &str) -> String {
    let replace = |text: String, (option, setting): &(&str, &str)| text.replace(option, setting);
    SETTINGS.iter().fold(message.to_owned(), replace)
}

impl PoolError {
    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            PoolError::NoSuchPool { .. } => ErrorKind::NoSuchPool,
            PoolError::NoSuchGuest { .. } => ErrorKind::NoSuchGuest,
            PoolError::Exists { .. } => ErrorKind::PoolExists,
            PoolError::Exhausted { .. } => ErrorKind::PoolExhausted,
            PoolError::Degraded { .. } => ErrorKind::PoolDegraded,
            PoolError::Removed { .. } => ErrorKind::NoSuchPool,
            PoolError::Invalid(_) => ErrorKind::RequestInvalid,
            PoolError::Revert { source, .. } => source.kind(),
            PoolError::State { source, .. } => ErrorKind::of_io(source),
            PoolError::DaemonRunning { .. } => ErrorKind::DaemonRunning,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            PoolError::Revert { source, .. } => source.details(),
            PoolError::State { path, .. } | PoolError::DaemonRunning { path } => {
                Details::new(&self.to_string(), Some(path), None)
            }
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}
