//! Resettable: the guest can be taken back to its image inside its QEMU.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use super::contents::set_clock;
use super::resident::{Held, Resident};
use crate::image::Sections;
use crate::qmp::{Events, QmpError};
use crate::reset::{Asked, Requests, Reset, ResetError, ResetOutcome, ResetWay, Rewinder};
use crate::revert::cards::Unplugged;
use crate::revert::error::RevertError;
use crate::revert::event::{OnEvent, RevertEvent};
use crate::revert::outcome::Outcome;
use crate::revert::rtc::Rtc;

/// A guest that has all its memory, and whose writes are tracked. It depends on nobody: when this
/// process is killed, the guest runs on, and can't be reset inside its QEMU any more.
///
/// Dropping it ends a QEMU of ours: take it out with [`Resettable::let_go`] to let it live on.
pub struct Resettable {
    // Dropped first: the guest must not wait for whoever is told to end.
    rewinder: Rewinder,
    resident: Resident,
    sections: Sections,
    requests: Option<Requests>,
}

/// Why a guest is not resettable.
pub struct NotResettable {
    /// The guest, which goes on as it was.
    pub resident: Resident,
    /// Why.
    pub error: ResetError,
}

impl Resettable {
    /// Begins to track the writes of a guest, and waits until it is known what it has written so
    /// far.
    ///
    /// # Errors
    /// When its memory did not come by userfaultfd, or can't be write-protected.
    pub async fn track(mut resident: Resident) -> Result<Resettable, Box<NotResettable>> {
        match begin(&mut resident).await {
            Ok((rewinder, sections, requests)) => {
                Ok(Resettable { rewinder, resident, sections, requests })
            }
            Err(error) => Err(Box::new(NotResettable { resident, error })),
        }
    }

    /// QEMU's process id, where it is known.
    pub fn pid(&self) -> Option<i32> {
        self.resident.qemu.pid()
    }

    /// The guest, as one that has all its memory.
    pub fn resident(&self) -> &Resident {
        &self.resident
    }

    /// How many host pages the guest has written since the last reset.
    pub fn written(&self) -> u64 {
        self.rewinder.memory().written()
    }

    /// Takes the guest back to its image: memory, devices and disks. What it has written since is
    /// gone. It runs then, if it did at the moment of the image.
    ///
    /// # Errors
    /// [`RevertError::Reset`]. Where its [`is_refusal`](ResetError::is_refusal), the guest goes
    /// on untouched; else its QEMU has been ended.
    pub async fn reset(&mut self) -> Result<Reset, RevertError> {
        let (reset, _) = self.rewind(false).await?;
        self.prepare().await;
        Ok(reset)
    }

    /// As [`reset`](Resettable::reset), but does not make ready for the next one. With `unplug` the
    /// cables of all network cards are unplugged ahead of the guest's first instruction.
    pub(crate) async fn rewind(
        &mut self,
        unplug: bool,
    ) -> Result<(Reset, Option<Unplugged>), RevertError> {
        let began = Instant::now();
        let sections = self.sections()?;
        match self.go_back(&sections, unplug).await {
            Ok((pages, unplugged)) => {
                let reset = Reset { pages, took_ms: began.elapsed().as_secs_f64() * 1e3 };
                Ok((reset, unplugged))
            }
            Err(error) if error.is_refusal() => Err(error),
            Err(error) => {
                // A mixture of two moments must not run.
                self.resident.qemu.kill().await;
                Err(error)
            }
        }
    }

    async fn go_back(
        &mut self,
        sections: &Sections,
        unplug: bool,
    ) -> Result<(u64, Option<Unplugged>), RevertError> {
        let qmp = self.resident.qemu.qmp().ok_or_else(not_ours)?;
        let pages = self.rewinder.rewind(qmp, sections).await?;
        let unplugged = match unplug {
            true => Some(Unplugged::all(qmp).await?),
            false => None,
        };
        self.rewinder.run(qmp).await?;
        Ok((pages, unplugged))
    }

    /// Makes ready for the next reset, while the guest runs.
    pub(crate) async fn prepare(&mut self) {
        let Some(qmp) = self.resident.qemu.qmp() else { return };
        let sections = known_ahead(&self.sections, self.resident.rtc);
        if let Err(error) = self.rewinder.prepare(qmp, sections).await {
            tracing::warn!("the next reset will have to wait for QEMU: {error}");
        }
    }

    /// What a guest is given that goes back now.
    fn sections(&self) -> Result<Sections, RevertError> {
        set_clock(self.sections.clone(), self.resident.image.manifest(), self.resident.rtc)
    }

    /// Resets the guest whenever it is asked for by [`runs`](crate::runs), until its QEMU ends, the
    /// session's cancellation is requested, or somebody else wants to track its memory.
    ///
    /// # Errors
    /// When a reset has failed half-way: QEMU has been ended then.
    pub async fn serve(&mut self, on_event: OnEvent<'_>) -> Result<(), RevertError> {
        if self.requests.is_none() {
            return Ok(());
        }
        let cancelled = self.resident.cancel.requested();
        tokio::pin!(cancelled);
        let mut events = self.resident.qemu.qmp().map(|qmp| qmp.events());
        let memory = Arc::clone(self.rewinder.memory());
        loop {
            let asked = tokio::select! {
                asked = self.asked() => asked,
                () = &mut cancelled => return Ok(()),
                () = gone(&mut events) => return Ok(()),
                () = memory.ended() => return Ok(()),
            };
            if !self.answer(asked, on_event).await? {
                return Ok(());
            }
        }
    }

    /// Waits until somebody asks for something by [`runs`](crate::runs). Safe to cancel.
    pub(crate) async fn asked(&self) -> Asked {
        match &self.requests {
            Some(requests) => requests.next().await,
            None => std::future::pending().await,
        }
    }

    /// Does what somebody asks for. Returns whether the guest's writes are still tracked.
    ///
    /// # Errors
    /// As [`serve`](Resettable::serve).
    pub(crate) async fn answer(
        &mut self,
        asked: Asked,
        on_event: OnEvent<'_>,
    ) -> Result<bool, RevertError> {
        let asked = match self.rewinder.memory().answer(asked).await {
            ControlFlow::Continue(asked) => asked,
            ControlFlow::Break(is_tracked) => return Ok(is_tracked),
        };
        let reset = self.rewind(false).await.map(|(reset, _)| reset);
        asked.answer(&outcome(&reset)).await;
        match reset {
            Ok(Reset { pages, took_ms }) => {
                let how = ResetWay::InPlace;
                on_event(RevertEvent::Reset { how, pages: Some(pages), took_ms });
                self.prepare().await;
            }
            Err(error) if error.is_refusal() => on_event(RevertEvent::Note {
                what: "the guest was not reset".to_owned(),
                why: error.to_string(),
            }),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// The QEMU that we have started for it. Its guest's writes are tracked no more.
    pub(crate) fn into_held(self) -> Option<Held> {
        self.rewinder.memory().end();
        self.resident.into_held()
    }

    /// The guest as one whose writes are tracked no more.
    pub(crate) fn into_resident(self) -> Resident {
        self.rewinder.memory().end();
        self.resident
    }

    /// Lets the guest run on untracked; returns the process id of its QEMU, and how its memory
    /// came.
    pub fn let_go(self) -> (Option<i32>, Outcome) {
        self.rewinder.memory().end();
        self.resident.let_go()
    }
}

/// Begins to track the writes of a guest.
async fn begin(
    resident: &mut Resident,
) -> Result<(Rewinder, Sections, Option<Requests>), ResetError> {
    let prepared = resident.reset.take().transpose()?;
    let ((placed, preparation), qmp) = prepared.zip(resident.qemu.qmp()).ok_or_else(not_ours)?;
    let sections = resident.image.sections()?;
    let (memory, state, requests) = placed.undo(Arc::clone(&resident.image), preparation)?;
    memory.ready().await?;
    let manifest = resident.image.manifest();
    let mut rewinder =
        Rewinder::new(qmp, Arc::new(memory), state, manifest.machine.running).await?;
    rewinder.prepare(qmp, known_ahead(&sections, resident.rtc)).await?;
    Ok((rewinder, sections, requests))
}

fn not_ours() -> ResetError {
    ResetError::Obstacle(
        "its memory did not come by userfaultfd, or its QEMU is not one that this process has \
         started"
            .into(),
    )
}

/// The parts of the image that a guest is given at its next reset, unless that has to set its
/// clock.
fn known_ahead(sections: &Sections, rtc: Rtc) -> Option<&Sections> {
    (rtc != Rtc::Keep).then_some(sections)
}

fn outcome(reset: &Result<Reset, RevertError>) -> ResetOutcome {
    match reset {
        Ok(reset) => ResetOutcome::from(*reset),
        Err(error) if error.is_refusal() => ResetOutcome::Refused { why: error.to_string() },
        Err(error) => ResetOutcome::Failed { why: error.to_string() },
    }
}

/// Waits until QEMU is gone.
async fn gone(events: &mut Option<Events>) {
    let Some(events) = events else { return std::future::pending().await };
    loop {
        match events.next().await {
            Ok(_) | Err(QmpError::EventsLost(_)) => {}
            Err(_) => return,
        }
    }
}
