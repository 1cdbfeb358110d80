//! Why a guest can't go back inside its QEMU.

use std::io;
use std::path::PathBuf;

use crate::host::uffd::UffdError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};
use crate::page::SourceError;
use crate::qmp::QmpError;

/// Why a guest can't be reset in place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// Something in the guest or its QEMU rules it out. Nothing was touched.
    #[error("the guest can't be reset inside its QEMU: {0}")]
    Obstacle(String),
    /// Writes of the guest can't be tracked. It runs on untracked.
    #[error("the guest's writes can't be tracked: {0}")]
    Tracking(#[from] UffdError),
    /// The guest's memory can't be read or written.
    #[error("the guest's memory at {address:#x} can't be {what}: {source}")]
    Memory {
        /// What was being done.
        what: &'static str,
        /// The address in QEMU's process.
        address: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Memory can't be read from the image.
    #[error("the memory at offset {offset:#x} of block `{block}` can't be had: {source}")]
    Source {
        /// The block's name.
        block: String,
        /// Offset in the block, in bytes.
        offset: u64,
        /// What the image said.
        source: SourceError,
    },
    /// The image can't be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image from which memory is mapped can't be read.
    #[error("the image from which memory is mapped can't be read: {0}")]
    Flat(io::Error),
    /// The file of the devices' state can't be made.
    #[error("the state of the guest's devices can't be handed to QEMU: {0}")]
    StateFile(io::Error),
    /// Nobody can ask for a reset.
    #[error("the socket by which a reset is asked for can't be made: {0}")]
    Requests(io::Error),
    /// QEMU does not answer, or refuses.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU could not load the state of the devices. The guest does not run.
    #[error("QEMU could not go back to the snapshot: {0}")]
    Load(String),
    /// A thread can't be started, or has ended.
    #[error("the thread that tracks the guest's writes is gone: {0}")]
    Thread(io::Error),
}

impl ResetError {
    /// Whether nothing was touched: the guest goes on as if nobody had asked.
    pub fn is_refusal(&self) -> bool {
        matches!(self, ResetError::Obstacle(_))
    }

    /// The same of one that came up before anything was touched.
    pub(super) fn into_refusal(self) -> ResetError {
        match self {
            refusal @ ResetError::Obstacle(_) => refusal,
            error => ResetError::Obstacle(error.to_string()),
        }
    }

    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ResetError::Obstacle(_) => ErrorKind::NotResettable,
            ResetError::Tracking(error) => error.kind(),
            ResetError::Memory { source, .. } => ErrorKind::of_io(source),
            ResetError::Source { .. } => ErrorKind::ImageDamaged,
            ResetError::Image(error) => error.kind(),
            ResetError::StateFile(error)
            | ResetError::Flat(error)
            | ResetError::Requests(error)
            | ResetError::Thread(error) => ErrorKind::of_io(error),
            ResetError::Qmp(error) => error.kind(),
            ResetError::Load(_) => ErrorKind::QemuFailed,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            ResetError::Image(error) => error.details(),
            ResetError::Qmp(error) => error.details(),
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}
