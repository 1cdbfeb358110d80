//! Resettable: the guest can be taken back to its image inside its QEMU.

use std::sync::Arc;
use std::time::Instant;

use super::contents::set_clock;
use super::resident::Resident;
use crate::image::Sections;
use crate::qmp::{Events, Qmp};
use crate::reset::{Answer, Machine, Request, Requests, ResetError, StateFile, Tracker, rewind};
use crate::revert::error::RevertError;
use crate::revert::event::{ResetWay, RevertEvent};
use crate::revert::outcome::Outcome;

/// A guest that has all its memory, and whose writes are tracked. It depends on nobody: when this
/// process is killed, the guest runs on, and can't be reset inside its QEMU any more.
///
/// Dropping it ends a QEMU of ours: take it out with [`Resettable::let_go`] to let it live on.
pub struct Resettable {
    // Dropped first: the guest must not wait for whoever is told to end.
    tracker: Arc<Tracker>,
    resident: Resident,
    qmp: Qmp,
    machine: Machine,
    state: StateFile,
    sections: Sections,
    requests: Option<Requests>,
    resets: u64,
}

/// What a reset has done.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Reset {
    /// Host pages that were written back.
    pub pages: u64,
    /// How long it took until the guest ran again, in milliseconds.
    pub took_ms: f64,
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
        let tracked = match (resident.reset.take(), resident.qemu.qmp().cloned()) {
            (Some(reset), Some(qmp)) => reset.map(|reset| (reset, qmp)),
            _ => Err(ResetError::Obstacle(
                "its memory did not come by userfaultfd, or its QEMU is not one that this process \
                 has started"
                    .into(),
            )),
        };
        let begun = tracked
            .and_then(|((installed, preparation), qmp)| Ok((installed.track(preparation)?, qmp)));
        let ((tracker, state, sections, requests), qmp) = match begun {
            Ok(begun) => begun,
            Err(error) => return Err(Box::new(NotResettable { resident, error })),
        };
        let machine = match tracker.ready().await {
            Ok(()) => Machine::look(&qmp).await.map_err(ResetError::from),
            Err(error) => Err(error),
        };
        match machine {
            Ok(machine) => Ok(Resettable {
                tracker: Arc::new(tracker),
                resident,
                qmp,
                machine,
                state,
                sections,
                requests,
                resets: 0,
            }),
            Err(error) => Err(Box::new(NotResettable { resident, error })),
        }
    }

    /// How many host pages the guest has written since the last reset.
    pub fn written(&self) -> u64 {
        self.tracker.written()
    }

    /// Takes the guest back to its image: memory, devices and disks. What it has written since is
    /// gone. It runs then, if it did at the moment of the image.
    ///
    /// # Errors
    /// [`RevertError::Reset`]. Where its [`is_refusal`](ResetError::is_refusal), the guest goes
    /// on untouched; else its QEMU has been ended.
    pub async fn reset(&mut self) -> Result<Reset, RevertError> {
        let began = Instant::now();
        let Resettable { resident, qmp, machine, tracker, state, sections, .. } = self;
        let manifest = resident.image.manifest();
        let sections = set_clock(sections.clone(), manifest, resident.rtc)?;
        let runs = manifest.machine.running;
        match rewind(qmp, machine, tracker, (state, &sections), runs).await {
            Ok(pages) => {
                self.resets += 1;
                Ok(Reset { pages, took_ms: began.elapsed().as_secs_f64() * 1e3 })
            }
            Err(error) if error.is_refusal() => Err(error.into()),
            Err(error) => {
                // A mixture of two moments must not run.
                self.resident.qemu.kill().await;
                Err(error.into())
            }
        }
    }

    /// Resets the guest whenever it is asked for by [`runs`](crate::runs), until its QEMU ends, the
    /// session's cancellation is requested, or somebody else wants to track its memory.
    ///
    /// # Errors
    /// When a reset has failed half-way: QEMU has been ended then.
    pub async fn serve(
        &mut self,
        on_event: &mut impl FnMut(RevertEvent),
    ) -> Result<(), RevertError> {
        let Some(requests) = self.requests.take() else { return Ok(()) };
        let cancelled = self.resident.cancel.requested();
        tokio::pin!(cancelled);
        let mut events = self.qmp.events();
        let tracker = Arc::clone(&self.tracker);
        loop {
            let asked = tokio::select! {
                asked = requests.next() => asked,
                () = &mut cancelled => return Ok(()),
                () = gone(&mut events) => return Ok(()),
                () = tracker.ended() => return Ok(()),
            };
            if asked.request == Request::LetGo {
                asked.answer(&Answer::Done { pages: 0, took_ms: 0.0 }).await;
                return Ok(());
            }
            let reset = self.reset().await;
            let answer = match &reset {
                Ok(Reset { pages, took_ms }) => Answer::Done { pages: *pages, took_ms: *took_ms },
                Err(error) if error.is_refusal() => Answer::Refused { why: error.to_string() },
                Err(error) => Answer::Failed { why: error.to_string() },
            };
            let is_failure = matches!(answer, Answer::Failed { .. });
            asked.answer(&answer).await;
            match reset {
                Ok(Reset { pages, took_ms }) => {
                    let how = ResetWay::InPlace;
                    on_event(RevertEvent::Reset { how, pages: Some(pages), took_ms });
                }
                Err(error) if is_failure => return Err(error),
                Err(error) => on_event(RevertEvent::Note {
                    what: "the guest was not reset".to_owned(),
                    why: error.to_string(),
                }),
            }
        }
    }

    /// Lets the guest run on untracked; returns the process id of its QEMU, and how its memory
    /// came.
    pub fn let_go(self) -> (Option<i32>, Outcome) {
        let Resettable { tracker, resident, .. } = self;
        drop(tracker);
        resident.let_go()
    }
}

/// Waits until QEMU is gone.
async fn gone(events: &mut Events) {
    loop {
        match events.next().await {
            Ok(_) | Err(crate::qmp::QmpError::EventsLost(_)) => {}
            Err(_) => return,
        }
    }
}
