//! What can go wrong with a backup.

use std::io;
use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};
use crate::repository::RepositoryError;
use crate::save::SaveError;

/// Why a guest is not in the repository, or a backup can't be made at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// A file can't be read or written.
    #[error("{doing} `{}` failed: {source}", .path.display())]
    Io {
        /// As in "reading".
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration can't be understood.
    #[error("`{}`: {source}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where, and why.
        source: Box<toml::de::Error>,
    },
    /// The configuration says what can't be.
    #[error("`{}`: {problem}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The save.
    #[error(transparent)]
    Save(Box<SaveError>),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The snapshot is whole on this host, and not in the repository.
    #[error(
        "the snapshot of {machine} is whole in `{}`, but could not be pushed: {source}",
        .image.display()
    )]
    NotPushed {
        /// The machine.
        machine: String,
        /// The image in the spool.
        image: PathBuf,
        /// Why.
        source: Box<RepositoryError>,
    },
}

impl From<SaveError> for BackupError {
    fn from(error: SaveError) -> BackupError {
        BackupError::Save(Box::new(error))
    }
}

impl BackupError {
    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            BackupError::Io { source, .. } => ErrorKind::of_io(source),
            BackupError::Parse { .. } | BackupError::Config { .. } => ErrorKind::OptionsInvalid,
            BackupError::Save(error) => error.kind(),
            BackupError::Repository(error) => error.kind(),
            BackupError::NotPushed { source, .. } => source.kind(),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            BackupError::Save(error) => error.details(),
            BackupError::Repository(error) => error.details(),
            BackupError::Io { path, .. }
            | BackupError::Parse { path, .. }
            | BackupError::Config { path, .. }
            | BackupError::NotPushed { image: path, .. } => {
                Details::new(&self.to_string(), Some(path), None)
            }
        }
    }
}
