//! Who follows a save: guests that are brought back from an image under way.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};

use super::error::SaveError;
use super::forking::{AtMoment, Forking};
use crate::cancel::Cancellation;
use crate::failpoint::failpoint;
use crate::follow::{self, Followed};
use crate::image::Image;
use crate::memory::live::LivePages;

/// How long nobody is taken where the system refuses, mostly because it has no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes who follows the save of an image.
pub(super) struct Followers {
    task: JoinHandle<()>,
}

impl Followers {
    /// Begins to take who follows, and returns what the save has to be told. They get the guest once
    /// its moment has passed.
    ///
    /// # Errors
    /// When the same image is being saved.
    pub fn listen(image: &Path) -> Result<(Followers, Forking), SaveError> {
        let failed = |source| SaveError::Followers { image: image.to_owned(), source };
        let listener = follow::listen(image).map_err(failed)?;
        // SAFETY: the descriptor is owned by what is registered, which neither gives it away nor
        // replaces it: it is open as long as the registration.
        let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }
            .map_err(|error| failed(error.into()))?;
        let (sender, moment) = oneshot::channel();
        let clones_run = Cancellation::new();
        // Nobody tells when they do, or whether any come.
        clones_run.request();
        let forking = Forking { ahead: None, ready: None, at_moment: Some(sender), clones_run };
        let task = tokio::spawn(take_all(listener, moment, image.to_owned()));
        Ok((Followers { task }, forking))
    }

    /// Takes nobody any more. Those who follow see that nothing more is captured.
    pub async fn end(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Takes who follows for as long as it is polled.
async fn take_all(listener: AsyncFd<OwnedFd>, moment: oneshot::Receiver<AtMoment>, image: PathBuf) {
    let mut waiting = Vec::new();
    let guest = async { Guest::at(moment.await.ok()?, image).await };
    tokio::pin!(guest);
    let guest = loop {
        tokio::select! {
            guest = &mut guest => break guest,
            connection = next(&listener) => waiting.push(connection),
        }
    };
    // Without a guest, who waits sees the end of the connection.
    let Some(guest) = guest.map(Arc::new) else { return };
    let mut served: Vec<Served> =
        waiting.into_iter().filter_map(|connection| guest.serve(connection)).collect();
    loop {
        served.extend(guest.serve(next(&listener).await));
    }
}

/// The next who connects and may.
async fn next(listener: &AsyncFd<OwnedFd>) -> OwnedFd {
    loop {
        let accepted = listener.async_io(Interest::READABLE, |fd| follow::accept(fd)).await;
        match accepted.and_then(|fd| Ok((follow::peer_user(&fd)?, fd))) {
            Ok((user, connection)) if follow::is_trusted(user) => return connection,
            Ok((user, _)) => tracing::warn!("user {user} may not follow the save"),
            Err(error) => {
                tracing::warn!("nobody can follow the save for a moment: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// A guest that is followed.
struct Guest {
    image: Arc<Image>,
    pages: Arc<LivePages>,
}

impl Guest {
    async fn at(at_moment: AtMoment, path: PathBuf) -> Option<Guest> {
        let pages = Arc::clone(&at_moment.pages);
        let image = spawn_blocking(move || at_moment.image(&path)).await;
        match image.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())) {
            Ok(image) => Some(Guest { image, pages }),
            Err(error) => {
                tracing::warn!("the save can't be followed: {error}");
                None
            }
        }
    }

    /// Gives somebody the guest, and captures what they wish for, on a thread of its own.
    fn serve(self: &Arc<Guest>, connection: OwnedFd) -> Option<Served> {
        let guest = Arc::clone(self);
        let served = Served(connection.try_clone().ok()?);
        let thread = std::thread::Builder::new().name("follower".into());
        thread.spawn(move || guest.talk(&connection)).ok()?;
        Some(served)
    }

    fn talk(&self, connection: &OwnedFd) {
        let Some((_, image)) = self.image.files().next() else { return };
        let [pages, states] = self.pages.memory().descriptors();
        if follow::send_header(connection, Followed { image: image.as_fd(), pages, states })
            .is_err()
        {
            return;
        }
        failpoint("followed");
        while let Ok(Some(page)) = follow::receive_wish(connection) {
            self.pages.capture_now(page);
        }
    }
}

/// Somebody who is served. Dropped, the connection ends.
struct Served(OwnedFd);

impl Drop for Served {
    fn drop(&mut self) {
        // It fails where they have gone.
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}
