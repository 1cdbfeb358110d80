//! What a guest is, from where it waits to where it can be reset.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;

use super::template::{Place, Template};
use crate::cancel::Cancellation;
use crate::host::pidfd::Pidfd;
use crate::reset::Asked;
use crate::revert::session::{Armed, Planned, Reset, Resettable, Resident, Running};
use crate::revert::{Progress, RevertError, RevertEvent, Unplugged};
use crate::runs;

/// How long a QEMU that was killed may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// What a guest is, once it was taken.
pub(super) enum Stage {
    Resident(Box<Resident>),
    Resettable(Box<Resettable>),
    /// One that a daemon before this one has taken: it is served by the successor of that, or has
    /// all its memory.
    Adopted(Adopted),
}

/// The QEMU of a guest that a daemon before this one has handed out. Dropping it ends it, with
/// whoever serves it, and removes its record.
pub(super) struct Adopted {
    pub id: String,
    pub qemu: Arc<Pidfd>,
}

impl Drop for Adopted {
    fn drop(&mut self) {
        // Its record may be gone with its last server.
        let stopped = runs::find(&self.id).and_then(|run| run.stop());
        if let Err(error) = stopped {
            tracing::debug!("guest {}: {error}", self.id);
        }
        let _ = self.qemu.kill();
        if !self.qemu.wait_end(END_TIMEOUT) {
            tracing::warn!("the QEMU of guest {} was killed, but does not end", self.id);
        }
    }
}

impl Stage {
    /// Waits until its QEMU has ended.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let (ours, adopted) = match self {
            Stage::Resident(resident) => (Some(resident.ended()), None),
            Stage::Resettable(resettable) => (Some(resettable.resident().ended()), None),
            Stage::Adopted(adopted) => (None, Some(Arc::clone(&adopted.qemu))),
        };
        async move {
            match (ours, adopted) {
                (Some(ended), _) => ended.await,
                (None, Some(process)) => process.ended().await,
                (None, None) => std::future::pending().await,
            }
        }
    }

    /// Waits until another process asks for something. Safe to cancel.
    pub async fn asked(&self) -> Asked {
        match self {
            Stage::Resettable(resettable) => resettable.asked().await,
            Stage::Resident(_) | Stage::Adopted(_) => std::future::pending().await,
        }
    }

    /// One whose writes are tracked no more.
    pub fn untracked(self) -> Stage {
        match self {
            Stage::Resettable(resettable) => Stage::Resident(resettable.into_resident().into()),
            other => other,
        }
    }

    /// Takes the guest back inside its QEMU: returns what that has done, and its network cards where
    /// they are to get `new_macs`. Else why that can't be.
    pub async fn reset(&mut self, new_macs: bool) -> Result<(Reset, Option<Unplugged>), String> {
        match self {
            Stage::Resettable(resettable) => {
                resettable.rewind(new_macs).await.map_err(|error| error.to_string())
            }
            Stage::Resident(_) => Err("its writes are not tracked".to_owned()),
            Stage::Adopted(_) => Err("the daemon that tracked its writes was ended".to_owned()),
        }
    }

    /// Makes ready for the next reset, while the guest runs.
    pub async fn prepare(&mut self) {
        if let Stage::Resettable(resettable) = self {
            resettable.prepare().await;
        }
    }
}

/// Ends the QEMU of what is dropped. That waits for processes and threads, which a thread of the
/// runtime should not.
pub(super) async fn end<T: Send + 'static>(session: T) {
    let _ = spawn_blocking(move || drop(session)).await;
}

/// A guest that waits to run, and by what its agent is told something once it does.
pub(super) struct Waiting {
    pub armed: Armed,
    pub agent: AgentWay,
}

/// By what a guest's agent is told something.
#[derive(Default)]
pub(super) struct AgentWay {
    /// The socket of its channel; none where there is nothing to tell.
    pub socket: Option<PathBuf>,
    /// The guest's network cards, where they are to get other addresses.
    pub unplugged: Option<Unplugged>,
}

/// Brings a guest to where it waits to run.
pub(super) async fn launch(template: &Template, place: &Place) -> Result<Waiting, RevertError> {
    let options = template.options(place);
    let tell = &mut |event| match event {
        RevertEvent::Note { what, why } => tracing::debug!("guest {}: {what}: {why}", place.id),
        RevertEvent::Warning { says } => tracing::debug!("guest {}: {says}", place.id),
        _ => {}
    };
    let image = template.image().await?.open();
    let planned = Planned::of(image, &options, Cancellation::new(), tell).await?;
    let socket = planned.agent().map(Path::to_owned);
    let armed = planned.launch(tell).await?.arm(tell).await?;
    let (armed, unplugged) = match options.agent.new_macs {
        true => armed.unplug().await?,
        false => (armed, None),
    };
    Ok(Waiting { armed, agent: AgentWay { socket, unplugged } })
}

/// Brings all memory of a guest, and begins to track its writes where it is to be resettable.
pub(super) async fn to_the_end(
    running: Running,
    resettable: bool,
    mut on_event: impl FnMut(RevertEvent) + Send + 'static,
) -> Result<(Stage, Progress), RevertError> {
    let resident = running.fill(&mut on_event).await?;
    let progress = resident.outcome().progress;
    if !resettable {
        return Ok((Stage::Resident(resident.into()), progress));
    }
    Ok(match Resettable::track(resident).await {
        Ok(resettable) => (Stage::Resettable(resettable.into()), progress),
        Err(not) => {
            tracing::debug!("a guest can't be reset inside its QEMU: {}", not.error);
            (Stage::Resident(not.resident.into()), progress)
        }
    })
}
