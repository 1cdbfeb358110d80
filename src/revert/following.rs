//! A guest that is brought back from an image under way: what has not been captured is waited for,
//! or captured at once.

use std::io::{self, ErrorKind::*};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use tokio::task::spawn_blocking;

use super::error::RevertError;
use super::follow_error::FollowError;
use super::session::OpenImage;
use crate::cancel::Cancellation;
use crate::follow::{self, Followed};
use crate::image::Image;
use crate::memory::captured::CapturedMemory;
use crate::memory::live::{Capture, LivePages};
use crate::page::{Page, PageSource, Run, SourceError};

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
