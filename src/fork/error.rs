//! Why a guest can't be forked.

use crate::guest::GuestError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};
use crate::save::SaveError;

/// Why a guest can't be forked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// The guest can't be saved.
    #[error(transparent)]
    Save(Box<SaveError>),
    /// What its clones are made of can't be put together.
    #[error(transparent)]
    Image(Box<ImageError>),
    /// Its disks can't be read.
    #[error(transparent)]
    Guest(Box<GuestError>),
    /// QEMU has not told the state of the guest's devices at the moment.
    #[error(
        "QEMU did not tell the state of the devices at the moment (`xen-save-devices-state`), \
         without which no clone can run: save the guest and revert the image instead"
    )]
    NoMoment,
}

impl ForkError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ForkError::Save(error) => error.kind(),
            ForkError::Image(error) => error.kind(),
            ForkError::Guest(error) => error.kind(),
            ForkError::NoMoment => ErrorKind::QemuFailed,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            ForkError::Save(error) => error.details(),
            ForkError::Image(error) => error.details(),
            ForkError::Guest(error) => error.details(),
            ForkError::NoMoment => {
                Details::new(&self.to_string(), None::<std::path::PathBuf>, None)
            }
        }
    }
}

macro_rules! from {
    ($($variant:ident($error:ty))*) => {
        $(impl From<$error> for ForkError {
            fn from(error: $error) -> ForkError {
                ForkError::$variant(Box::new(error))
            }
        })*
    };
}

from! { Save(SaveError) Image(ImageError) Guest(GuestError) }
