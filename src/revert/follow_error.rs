//! Why an image under way can't be followed.

use std::io;
use std::path::PathBuf;

use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};

/// Why an image under way can't be followed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FollowError {
    /// Nobody saves that image, or not so.
    #[error(
        "nobody saves {} such that it can be followed: begin that save with \
         `SaveOptions::followable`, or leave out `RevertOptions::follow` if the image is whole",
        .image.display()
    )]
    NobodySaves {
        /// The image.
        image: PathBuf,
    },
    /// The save has ended, or QEMU has not told it the state of the devices at the moment.
    #[error(
        "the save of {} gave no guest to follow: it was ended, or QEMU did not tell it the state of \
         the devices at the moment; if it says `saved`, leave out `RevertOptions::follow`",
        .image.display()
    )]
    Ended {
        /// The image.
        image: PathBuf,
    },
    /// Somebody else holds the name by which the save is found.
    #[error(
        "the save of {} is a process of user {user}, whom we do not follow: be that user, or root's \
         save", .image.display()
    )]
    Stranger {
        /// The image.
        image: PathBuf,
        /// The user's number.
        user: u32,
    },
    /// The save is another version of this program.
    #[error(
        "the save of {} is another version of snapback: revert by the same version, or leave out \
         `RevertOptions::follow` once the image is whole", .image.display()
    )]
    OtherVersion {
        /// The image.
        image: PathBuf,
    },
    /// The system refused something.
    #[error("following the save of {} failed: {source}", .image.display())]
    Io {
        /// The image.
        image: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// What the save gave is not an image.
    #[error(transparent)]
    Image(Box<ImageError>),
}

impl FollowError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            FollowError::NobodySaves { .. }
            | FollowError::Ended { .. }
            | FollowError::OtherVersion { .. } => ErrorKind::NotFollowed,
            FollowError::Stranger { .. } => ErrorKind::PermissionDenied,
            FollowError::Io { source, .. } => ErrorKind::of_io(source),
            FollowError::Image(error) => error.kind(),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            FollowError::NobodySaves { image }
            | FollowError::Ended { image }
            | FollowError::Stranger { image, .. }
            | FollowError::OtherVersion { image }
            | FollowError::Io { image, .. } => Details::new(&self.to_string(), Some(image), None),
            FollowError::Image(error) => error.details(),
        }
    }
}
