//! Taking the snapshot: the guest's file systems are frozen, the guest is paused, the stream
//! is received, and the guest goes on as soon as the moment has passed.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use super::devices::DeviceState;
use super::error::SaveError;
use super::event::SaveEvent;
use super::migration;
use super::moment::{Moment, PauseClock};
use super::receive::{Received, Receiving, Stores};
use super::release::{unprotect_memory, while_releasing};
use super::saving::Saving;
use crate::failpoint::{failpoint, fault};
use crate::qmp::{Event, Events, QmpError};
use crate::wire::WireError;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How long a guest that we stopped may wait for QEMU's walk over its memory, which usually
/// takes three milliseconds a GiB.
const HOLD_LIMIT: Duration = Duration::from_secs(30);

impl Saving<'_> {
    /// Takes the snapshot and receives all of it. If that fails, the guest goes on, the
    /// migration has been ended and nothing is left of the image.
    pub async fn take(&mut self) -> Result<(Received, Moment), SaveError> {
        let stream = migration::open_stream(&self.access.qmp).await?;
        self.keep(stream.as_fd());
        let mut receiving = {
            let clones_run = self.forking.as_ref().map(|forking| forking.clones_run.clone());
            let stores = Stores { image: !self.options.without_image, memory: clones_run };
            let (places, unchanged) = (self.places.take(), Arc::clone(&self.unchanged));
            Receiving::start(stream, self.options, &self.checked, places, unchanged, stores)?
        };
        let mut events = self.access.qmp.events();
        let frozen = self.freeze().await;
        let mut clock = PauseClock::new(self.checked.machine.running);
        let cancel = self.cancel.clone();
        let outcome = async {
            frozen?;
            failpoint("ready");
            // Can't be cancelled halfway: what has been done to the guest must be known.
            self.pause(&mut clock).await?;
            tokio::select! {
                outcome = self.follow(&mut receiving, &mut events, &mut clock) => outcome,
                () = cancel.requested() => Err(SaveError::Interrupted),
            }
        };
        match outcome.await {
            Ok(taken) => Ok(taken),
            Err(error) => {
                let pid = self.left_protected(receiving.has_ended());
                let giving_up = self.give_up(error, receiving, &clock);
                Err(while_releasing(pid, giving_up).await.unwrap_or_else(SaveError::Protected))
            }
        }
    }

    /// The process of a QEMU that leaves the guest's memory write-protected when its stream
    /// breaks, if that `has_ended`.
    fn left_protected(&self, has_ended: bool) -> Option<i32> {
        (self.checked.must_drain && has_ended).then_some(self.checked.pid)
    }

    /// Freezes the guest's file systems, if that is asked for.
    async fn freeze(&mut self) -> Result<(), SaveError> {
        let Some(quiesce) = &self.options.quiesce else { return Ok(()) };
        let filesystems = self.undo.freeze(quiesce, &self.access, &self.cancel).await?;
        self.tell(SaveEvent::Frozen { filesystems });
        Ok(())
    }

    /// Follows a migration that has begun to its end.
    async fn follow(
        &mut self,
        receiving: &mut Receiving,
        events: &mut Events,
        clock: &mut PauseClock,
    ) -> Result<(Received, Moment), SaveError> {
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        let limit = tokio::time::Instant::now() + HOLD_LIMIT;
        let received = loop {
            let devices = self.devices.as_ref().map(DeviceState::is_taken);
            let can_end = devices.unwrap_or(self.checked.must_drain) && !clock.held();
            let can_end = can_end && !fault("whole stream");
            let Receiving { first_page, captured, done, counters, .. } = receiving;
            tokio::select! {
                // What lets the guest go comes before all else.
                biased;
                first = &mut *first_page, if !first_page.is_terminated() => if first.is_ok() {
                    clock.pass();
                    failpoint("first page");
                    self.release(clock).await?;
                    let ends_early = !self.checked.must_drain
                        && self.devices.as_ref().is_some_and(DeviceState::is_taken);
                    receiving.read_directly(!ends_early);
                    failpoint("released");
                },
                event = events.next() => hear(clock, event)?,
                all = &mut *captured, if can_end && !captured.is_terminated() => if all.is_ok() {
                    failpoint("captured");
                    self.end_early().await?;
                },
                received = &mut *done => break received,
                () = tokio::time::sleep_until(limit), if clock.held() => {
                    return Err(SaveError::Held(HOLD_LIMIT));
                }
                _ = tick.tick(), if clock.moment().is_some() => self.tell(counters.progress()),
            }
            if clock.tell(&mut self.on_event) {
                self.begin_clones(receiving, clock);
                self.go_on().await;
                failpoint("moment");
            }
        };
        let died = || SaveError::Thread(std::io::Error::other("the receiving thread died"));
        match received.unwrap_or_else(|_| Err(died())) {
            Ok(mut received) => {
                // A tiny machine's stream may end before we have looked for its first page.
                clock.pass();
                self.release(clock).await?;
                match self.devices.take() {
                    Some(devices) => {
                        migration::wait_over(&self.access.qmp).await?;
                        if let Some(state) = devices.into_sections(&self.access.qmp).await {
                            received.complete(state);
                        }
                    }
                    None => migration::wait_end(&self.access.qmp).await?,
                }
                failpoint("received");
                // Its events may still be waiting too: QEMU sent them before its last answer.
                while let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next()).await
                    && hear(clock, event).is_ok()
                {}
                let told = clock.moment().is_some();
                let moment = clock.settle(&mut self.on_event);
                if !told {
                    self.go_on().await;
                }
                Ok((received, moment))
            }
            // QEMU's own reason, where it has one, says more than the end of its stream.
            Err(error @ SaveError::Wire(WireError::Ended { .. })) => {
                let end = migration::wait_end(&self.access.qmp);
                let pid = self.left_protected(true);
                while_releasing(pid, end).await.map_err(SaveError::Protected)??;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// All memory is captured: takes the write protection off, and with it what the save costs the
    /// guest. QEMU is told to end its stream.
    async fn end_early(&self) -> Result<(), SaveError> {
        if !self.checked.must_drain {
            self.access.qmp.migrate_cancel().await?;
            return migration::wait_over(&self.access.qmp).await;
        }
        // This QEMU keeps its userfaultfd for ever if it can't send all. What it sends now is
        // thrown away, but for the devices.
        if let Err(error) = unprotect_memory(self.checked.pid) {
            tracing::debug!("memory stays write-protected until QEMU has sent it: {error}");
        }
        Ok(())
    }

    /// The guest goes on: its file systems are thawed.
    async fn go_on(&mut self) {
        if self.undo.guest_goes_on(&self.access).await {
            self.tell(SaveEvent::Thawed);
        }
    }

    /// Lets the guest go, thaws it, and ends the migration. Returns the error that led here,
    /// or a worse one.
    async fn give_up(
        &mut self,
        error: SaveError,
        mut receiving: Receiving,
        clock: &PauseClock,
    ) -> SaveError {
        // The guest comes first.
        if !clock.held() || self.access.cont().await.is_ok() {
            self.undo.let_go();
        }
        let must_drain = self.checked.must_drain;
        let received_all = receiving.give_up();
        if must_drain && !received_all {
            self.tell(SaveEvent::Draining);
        }
        let (begun, drained) = (self.begun, must_drain.then_some(self.checked.pid));
        let Saving { access, undo, cancel, .. } = self;
        let thaw = async {
            tokio::select! {
                thawed = undo.thaw(access) => thawed,
                () = cancel.requested_times(2) => false,
            }
        };
        let end = async {
            tokio::select! {
                () = migration::end(&access.qmp, receiving, drained, begun) => error,
                () = cancel.requested_times(2) => SaveError::InterruptedTwice,
            }
        };
        // Both at once: a guest can answer only if its memory is received, and one whose agent
        // has died still has to get its memory back.
        let (thawed, error) = tokio::join!(thaw, end);
        if thawed {
            self.tell(SaveEvent::Thawed);
        }
        error
    }
}

/// Takes note of an event. If events were lost, only the times of the moment are missing.
fn hear(clock: &mut PauseClock, event: Result<Event, QmpError>) -> Result<(), QmpError> {
    match event {
        Ok(event) => clock.hear(&event),
        Err(QmpError::EventsLost(lost)) => tracing::debug!("{lost} events of QEMU were lost"),
        Err(error) => return Err(error),
    }
    Ok(())
}
