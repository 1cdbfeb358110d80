//! What can go wrong with a repository.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::guest::GuestError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};

/// Why a store did not do what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreFailure {
    /// The object is not there.
    NotFound,
    /// The object is there already, or has changed.
    Exists,
    /// The credentials are missing, wrong, expired, or don't suffice.
    Denied,
    /// The store asked for fewer requests (429, 503), until time ran out.
    Throttled,
    /// The store could not be reached, or failed (5xx), until time ran out.
    Unreachable,
    /// The store has no room.
    Full,
    /// The store refused the request for another reason.
    Refused,
    /// We were told to stop.
    Interrupted,
}

/// A store did not do what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{doing} `{object}` of the repository {repository} failed: {problem}{}", self.tried())]
pub struct StoreError {
    /// Why.
    pub failure: StoreFailure,
    /// As in "reading".
    pub doing: &'static str,
    /// The object's key.
    pub object: String,
    /// The repository's address, without credentials.
    pub repository: String,
    /// What was answered, without credentials.
    pub problem: String,
    /// How often it was tried, and for how long, if more than once.
    pub tries: Option<(u32, Duration)>,
}

impl StoreError {
    fn tried(&self) -> String {
        match (self.tries, self.failure) {
            (Some((tries, time)), _) => {
                format!(" (given up after {tries} tries in {:.1} s)", time.as_secs_f64())
            }
            (None, StoreFailure::Denied) => {
                "; credentials come from the environment (AWS_…, AZURE_…, GOOGLE_…), for S3 from \
                 the file that its own tools read, for WebDAV from `~/.netrc`, or from this \
                 machine's role"
                    .into()
            }
            (None, _) => String::new(),
        }
    }
}

/// Why something could not be done with a repository.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepositoryError {
    /// A store did not do what it was asked for.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An address can't be used.
    #[error("`{address}` is no address of a repository: {problem}")]
    Address {
        /// The address, without credentials.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is a repository already.
    #[error("there is a repository at {0} already")]
    Exists(String),
    /// There is no repository.
    #[error("there is no repository at {0}: `init()` makes one")]
    NoRepository(String),
    /// A repository of a later version.
    #[error("the repository at {0} has version {1}, of a later snapback")]
    TooNew(String, u32),
    /// An object is not what it should be.
    #[error("the repository {repository} is damaged: `{object}`: {problem}")]
    Damaged {
        /// The repository's address.
        repository: String,
        /// The object's key.
        object: String,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no such snapshot.
    #[error("there is no snapshot `{name}` in the repository {repository}{hint}")]
    NoSuchSnapshot {
        /// What was asked for.
        name: String,
        /// The repository's address.
        repository: String,
        /// What there is instead.
        hint: String,
    },
    /// A name could mean several snapshots.
    #[error("`{name}` could mean several snapshots: {}", .candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// What it could mean.
        candidates: Vec<String>,
    },
    /// The repository is encrypted, and no key opens it.
    #[error("the repository {repository} is encrypted: {problem}")]
    Key {
        /// The repository's address.
        repository: String,
        /// Why there is no key.
        problem: String,
    },
    /// It may be another repository in the place of the one that is meant.
    #[error("the repository {repository} is not trusted: {problem}")]
    Untrusted {
        /// The repository's address.
        repository: String,
        /// Why it is not.
        problem: String,
    },
    /// A snapshot is not signed with a key that is trusted.
    #[error("the snapshot `{snapshot}` of the repository {repository} is not trusted: {problem}")]
    SnapshotUntrusted {
        /// The repository's address.
        repository: String,
        /// The key of its manifest.
        snapshot: String,
        /// Why it is not.
        problem: &'static str,
    },
    /// A key can't be used to encrypt, decrypt, sign or verify with.
    #[error("{0}")]
    KeyInvalid(String),
    /// Options contradict each other.
    #[error("{0}")]
    Options(String),
    /// A disk has changed since the snapshot.
    #[error(transparent)]
    Disk(Box<GuestError>),
    /// An image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The system.
    #[error("{doing} `{}` failed: {error}", .path.display())]
    Io {
        /// As in "reading".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A packed file is not what it should be.
    #[error("`{}` is no packed snapshot: {problem}", .path.display())]
    Packed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A snapshot is not whole, though the repository is otherwise.
    #[error("{damages} damages were found in the repository {repository}")]
    CheckFailed {
        /// The repository's address.
        repository: String,
        /// How many.
        damages: u64,
    },
    /// Cancelled.
    #[error("interrupted")]
    Interrupted,
}

impl RepositoryError {
    /// An error of the system's.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>, error: io::Error) -> Self {
        RepositoryError::Io { doing, path: path.into(), error }
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            RepositoryError::Store(error) => match error.failure {
                StoreFailure::NotFound => ErrorKind::RepositoryDamaged,
                StoreFailure::Exists | StoreFailure::Refused => ErrorKind::StoreRefused,
                StoreFailure::Denied => ErrorKind::StoreDenied,
                StoreFailure::Throttled => ErrorKind::StoreThrottled,
                StoreFailure::Unreachable => ErrorKind::StoreUnreachable,
                StoreFailure::Full => ErrorKind::NoSpace,
                StoreFailure::Interrupted => ErrorKind::Interrupted,
            },
            RepositoryError::Address { .. } | RepositoryError::Options(_) => {
                ErrorKind::OptionsInvalid
            }
            RepositoryError::Ambiguous { .. } => ErrorKind::OptionsInvalid,
            RepositoryError::Exists(_) => ErrorKind::RepositoryExists,
            RepositoryError::NoRepository(_) => ErrorKind::NoRepository,
            RepositoryError::TooNew(..) => ErrorKind::RepositoryTooNew,
            RepositoryError::Damaged { .. } | RepositoryError::CheckFailed { .. } => {
                ErrorKind::RepositoryDamaged
            }
            RepositoryError::NoSuchSnapshot { .. } => ErrorKind::NoSuchSnapshot,
            RepositoryError::Key { .. } | RepositoryError::KeyInvalid(_) => ErrorKind::KeyInvalid,
            RepositoryError::Untrusted { .. } => ErrorKind::RepositoryUntrusted,
            RepositoryError::SnapshotUntrusted { .. } => ErrorKind::SnapshotUntrusted,
            RepositoryError::Disk(error) => error.kind(),
            RepositoryError::Image(error) => error.kind(),
            RepositoryError::Io { error, .. } => ErrorKind::of_io(error),
            RepositoryError::Packed { .. } => ErrorKind::InputInvalid,
            RepositoryError::Interrupted => ErrorKind::Interrupted,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            RepositoryError::Disk(error) => return error.details(),
            RepositoryError::Image(error) => return error.details(),
            RepositoryError::Io { path, .. } | RepositoryError::Packed { path, .. } => Some(path),
            _ => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}
