//! Armed: the device state is given, faults are served, nothing is filled but what was asked for.

use super::connection::Connection;
use super::running::Running;
use crate::guest::Reach;
use crate::revert::cards::Unplugged;
use crate::revert::error::RevertError;
use crate::revert::event::{OnEvent, Progress, RevertEvent};

/// A guest that can run. In standby it stands still with its device state in, its faults
/// are served and nothing is filled but what was to be preloaded, for as long as its owner likes;
/// that its QEMU has died meanwhile is an error of [`run`](Armed::run). Without standby it runs as soon as its
/// device state is in. Dropping it ends a QEMU of ours.
pub struct Armed {
    pub(super) connection: Connection,
}

impl Armed {
    /// QEMU's process id, where it is known.
    pub fn pid(&self) -> Option<i32> {
        self.connection.qemu.pid()
    }

    /// QEMU's control socket, if we speak to it.
    #[cfg(feature = "internals")]
    #[doc(hidden)]
    pub fn qmp(&self) -> Option<&crate::qmp::Qmp> {
        self.connection.qemu.qmp()
    }

    /// Unplugs the cables of all network cards of a guest in standby. None where we don't speak to
    /// QEMU.
    pub(crate) async fn unplug(self) -> Result<(Armed, Option<Unplugged>), RevertError> {
        let Some(qmp) = self.connection.qemu.qmp().cloned() else { return Ok((self, None)) };
        match Unplugged::all(&qmp).await {
            Ok(unplugged) => Ok((self, Some(unplugged))),
            Err(error) => Err(self.connection.fail(error).await),
        }
    }

    /// Waits until its QEMU has ended, where that is one that we have started. Safe to cancel.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        self.connection.qemu.ended()
    }

    /// How others reach a QEMU that we have started.
    pub(crate) fn reach(&self) -> Reach {
        self.connection.qemu.reach()
    }

    /// How much of its memory is in place.
    pub fn progress(&self) -> Progress {
        self.connection.progress()
    }

    /// Lets the guest run, or waits until it does, and has its memory filled from then on.
    /// A guest that was saved paused, or that only its owner can tell to run, stays paused.
    ///
    /// # Errors
    /// When QEMU does not run the guest, or the session is cancelled.
    pub async fn run(self, on_event: OnEvent<'_>) -> Result<Running, RevertError> {
        let Armed { mut connection } = self;
        let cancelled = connection.cancel.requested();
        let starting = async {
            connection.release()?;
            connection.advance(on_event).await
        };
        let started = tokio::select! {
            // A guest in standby may have been cancelled long ago.
            biased;
            () = cancelled => Err(connection.cancelled()),
            started = starting => started,
        };
        if let Err(error) = started {
            return Err(connection.fail(error).await);
        }
        connection.qemu.keep_overlays();
        connection.note_running();
        let pid = connection.qemu.pid().filter(|_| connection.qemu.is_ours());
        let Reach { ports, qmp, .. } = connection.qemu.reach();
        on_event(RevertEvent::Running { pid, ports, qmp });
        if let Err(error) = connection.qemu.define().await {
            on_event(RevertEvent::Note {
                what: "the saved definition was not made the domain's persistent one".to_owned(),
                why: error.to_string(),
            });
        }
        Ok(Running { connection })
    }

    /// Ends the session without the guest having run. A QEMU of ours ends with it.
    pub async fn end(mut self) {
        self.connection.end().await;
    }
}
