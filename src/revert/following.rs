//! A guest that is brought back from an image under way: what has not been captured is waited for,
//! or captured at once.

use std::io::{self, ErrorKind::*};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use tokio::task::spawn_blocking;

use super::error::RevertError;
use super::session::OpenImage;
use crate::cancel::Cancellation;
use crate::follow::{self, Followed};
use crate::image::{Image, ImageError};
use crate::kind::{Details, ErrorKind};
use crate::memory::captured::CapturedMemory;
use crate::memory::live::{Capture, LivePages};
use crate::page::{Page, PageSource, Run, SourceError};

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

/// The guest whose image is under way. Waits for its moment, unless that is cancelled.
///
/// # Errors
/// When nobody saves that image, or the save gives no guest.
pub(super) async fn open(image: &Path, cancel: &Cancellation) -> Result<OpenImage, RevertError> {
    let connection = Arc::new(connect(image)?);
    let (from, path) = (Arc::clone(&connection), image.to_owned());
    let guest = spawn_blocking(move || receive(&from, path));
    tokio::select! {
        guest = guest => {
            Ok(guest.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?)
        }
        () = cancel.requested() => {
            let _ = shutdown(connection.as_raw_fd(), Shutdown::Both);
            Err(RevertError::Interrupted("the guest has not been started"))
        }
    }
}

fn connect(image: &Path) -> Result<OwnedFd, FollowError> {
    let path = || image.to_owned();
    let failed = |source: io::Error| match source.kind() {
        ConnectionRefused => FollowError::NobodySaves { image: path() },
        _ => FollowError::Io { image: path(), source },
    };
    let connection = follow::connect(image).map_err(failed)?;
    match follow::peer_user(&connection).map_err(failed)? {
        user if follow::is_trusted(user) => Ok(connection),
        user => Err(FollowError::Stranger { image: path(), user }),
    }
}

/// Receives the guest.
fn receive(connection: &Arc<OwnedFd>, path: PathBuf) -> Result<OpenImage, FollowError> {
    let failed = |source: io::Error| match source.kind() {
        InvalidData => FollowError::OtherVersion { image: path.clone() },
        _ => FollowError::Io { image: path.clone(), source },
    };
    let Some(followed) = follow::receive_header(connection).map_err(failed)? else {
        return Err(FollowError::Ended { image: path });
    };
    let Followed { image, pages, states } = followed;
    let image =
        Image::open_file(image.into(), &path).map_err(|e| FollowError::Image(Box::new(e)))?;
    let blocks = image.blocks().to_vec();
    let memory = Arc::new(CapturedMemory::open(&blocks, pages, states).map_err(failed)?);
    let capture = Box::new(Wishes { connection: Arc::clone(connection) });
    let pages: Arc<dyn PageSource> = Arc::new(Arc::new(LivePages::new(memory, blocks, capture)));
    Ok(OpenImage { image, pages })
}

/// Has the save capture what is wished for.
struct Wishes {
    connection: Arc<OwnedFd>,
}

impl Capture for Wishes {
    fn capture(&self, run: Run) -> Result<(), SourceError> {
        // One that can't be sent changes nothing but the order: the save captures all.
        let _ = follow::send_wish(&*self.connection, Page { block: run.block, number: run.first });
        Ok(())
    }

    fn is_over(&self, _: Run) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        matches!(recv(self.connection.as_raw_fd(), &mut [0], flags), Ok(0))
    }
}
