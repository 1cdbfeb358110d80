//! The same for a QEMU that somebody else started and made wait for a migration.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    Delivery, Feed, FeedError, FeedEvent, Heard, Outcome, RevertError, RevertEvent, Rtc, Way,
};
use super::{abandon, delivery, feed_error, prepare};
use crate::cancel::Cancellation;
use crate::guest::VmError;
use crate::host::check_page_size;
use crate::image::Image;

/// Which image to serve to whom.
#[derive(Debug, Clone, Default)]
pub struct ServeOptions {
    /// The image.
    pub image: PathBuf,
    /// The unix socket on which QEMU waits (`-incoming unix:PATH`, or
    /// `migrate-incoming`), with its `postcopy-ram` capability on.
    pub to: PathBuf,
    /// How its memory is brought.
    pub delivery: Delivery,
    /// What the machine's battery-backed clock shows.
    pub rtc: Rtc,
}

/// Brings a guest back in a QEMU that somebody else started with the same machine,
/// `-incoming defer` and the capability `postcopy-ram`. Returns once all its memory
/// is in place.
///
/// # Errors
/// When the image or the way to QEMU fails. QEMU is then left to whoever started it:
/// it pauses the migration, and its guest waits rather than run on wrong memory.
pub async fn serve(
    options: &ServeOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent),
) -> Result<Outcome, RevertError> {
    check_page_size()?;
    if options.delivery.way == Way::Map {
        let problem = "a QEMU that was started already has its memory".to_owned();
        return Err(VmError::NotMapped { problem }.into());
    }
    let image = Image::open(&options.image)?;
    let ready = options.delivery.prepare(&image, prepare(&image, options.rtc)?);
    let socket = UnixStream::connect(&options.to).map_err(|source| RevertError::Socket {
        what: format!(
            "connecting to `{}` failed (QEMU must wait there: `-incoming unix:…`)",
            options.to.display()
        ),
        source,
    })?;
    let pid = peer_pid(&socket);
    let (feed, mut steps) = options.delivery.start(ready, &image, socket, pid, false)?;
    let every = options.delivery.progress_every;
    match bring(&feed, &mut steps, every, &cancel, &mut on_event).await {
        Ok(outcome) => {
            options.delivery.remember(&image, &outcome);
            on_event(outcome.resident());
            Ok(outcome)
        }
        Err(error) => {
            abandon(Some(feed));
            Err(error)
        }
    }
}

/// Follows a feed to its end.
async fn bring(
    feed: &Feed,
    steps: &mut UnboundedReceiver<FeedEvent>,
    every: Duration,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(RevertEvent),
) -> Result<Outcome, RevertError> {
    let mut heard = Heard::default();
    let loaded = loop {
        tokio::select! {
            step = steps.recv() => match step {
                Some(FeedEvent::Placing { way, reason }) => {
                    heard.way = Some(way);
                    on_event(RevertEvent::Placing { way, reason });
                }
                Some(FeedEvent::Preloaded) => {}
                step => break step,
            },
            () = cancel.requested() => {
                return Err(RevertError::Interrupted("the guest did not run yet"));
            }
        }
    };
    match loaded {
        Some(FeedEvent::Loaded) => on_event(RevertEvent::Running { pid: None }),
        Some(FeedEvent::Failed(FeedError::HungUp | FeedError::Opening(_))) => {
            let what = "QEMU refused the migration: it must be the machine that was saved, with \
                        the capability `postcopy-ram` on; its standard error says more";
            let source = std::io::ErrorKind::ConnectionAborted.into();
            return Err(RevertError::Socket { what: what.into(), source });
        }
        Some(FeedEvent::Failed(error)) => return Err(feed_error(error)),
        Some(_) | None => {
            return Err(feed_error(FeedError::HungUp));
        }
    }
    delivery::follow(feed, steps, heard, every, cancel, on_event).await
}

/// The process that listens at the other end (`SO_PEERCRED`, unix(7)).
fn peer_pid(socket: &UnixStream) -> Option<i32> {
    let credentials = getsockopt(socket, PeerCredentials).ok()?;
    Some(credentials.pid()).filter(|pid| *pid > 0)
}
