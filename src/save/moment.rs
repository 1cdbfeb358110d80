//! When a snapshot's moment was, and what it cost the guest.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use super::event::{OnEvent, PauseParts, SaveEvent};
use crate::qmp::Event;

/// When the snapshot was taken, and what it cost the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    /// By the host's clock, in microseconds since 1970.
    pub unix_us: u64,
    /// How long the guest stood still, if it ran.
    pub pause: Option<Duration>,
    /// That in parts, if we stopped it.
    parts: Option<PauseParts>,
}

/// Finds out the moment from QEMU's events, its stream and our own commands. The first
/// page comes only after write protection is on, so it proves that the moment has passed.
pub(super) struct PauseClock {
    /// Whether the guest ran before.
    running: bool,
    /// When the snapshot was asked for, in microseconds since 1970.
    asked: u64,
    /// The first page has come.
    passed: bool,
    stopped: Option<u64>,
    resumed: Option<u64>,
    /// We have stopped the guest to switch its disks.
    held: bool,
    /// If we stopped the guest: when the parts of the pause began, and when the last ended.
    steps: Vec<Instant>,
    moment: Option<Moment>,
}

impl PauseClock {
    pub fn new(running: bool) -> PauseClock {
        PauseClock {
            running,
            asked: unix_us(),
            passed: false,
            stopped: None,
            resumed: None,
            held: false,
            steps: Vec::new(),
            moment: None,
        }
    }

    /// Takes note of an event of QEMU's.
    pub fn hear(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" => self.stopped = Some(event.timestamp),
            "RESUME" => self.resumed = Some(event.timestamp),
            _ => {}
        }
    }

    /// We are about to stop the guest.
    pub fn hold(&mut self) {
        self.held = true;
        self.step();
    }

    /// A part of our pause has ended.
    pub fn step(&mut self) {
        self.steps.push(Instant::now());
    }

    /// Whether we hold the guest.
    pub fn held(&self) -> bool {
        self.held
    }

    /// Whether the guest ran before.
    pub fn running(&self) -> bool {
        self.running
    }

    /// The guest that we held goes on.
    pub fn released(&mut self) {
        self.held = false;
        self.step();
    }

    /// The first page has come.
    pub fn pass(&mut self) {
        self.passed = true;
    }

    /// The moment, once it has been told.
    pub fn moment(&self) -> Option<Moment> {
        self.moment
    }

    /// The moment, at the end of a save that went well: told now if it was not told before,
    /// since it has passed whatever events were missed.
    pub fn settle(&mut self, on_event: OnEvent<'_>) -> Moment {
        self.tell(on_event);
        match self.moment {
            Some(moment) => moment,
            None => {
                let unix_us = self.stopped.unwrap_or(self.asked);
                let moment = Moment { unix_us, pause: None, parts: None };
                self.set(moment, on_event);
                moment
            }
        }
    }

    /// Tells the moment, once, as soon as it is known. Whether it was told now.
    pub fn tell(&mut self, on_event: OnEvent<'_>) -> bool {
        if self.moment.is_some() || !self.passed || self.held {
            return false;
        }
        let moment = match (self.running, self.parts(), self.stopped, self.resumed) {
            (false, ..) => Some(Moment { unix_us: self.asked, pause: None, parts: None }),
            (true, Some((pause, parts)), stopped, _) => Some(Moment {
                unix_us: stopped.unwrap_or(self.asked),
                pause: Some(pause),
                parts: Some(parts),
            }),
            (true, None, Some(stopped), Some(resumed)) => Some(Moment {
                unix_us: stopped,
                pause: Some(Duration::from_micros(resumed.saturating_sub(stopped))),
                parts: None,
            }),
            _ => None,
        };
        if let Some(moment) = moment {
            self.set(moment, on_event);
        }
        moment.is_some()
    }

    fn set(&mut self, moment: Moment, on_event: OnEvent<'_>) {
        let Moment { unix_us, pause, parts } = moment;
        self.moment = Some(moment);
        on_event(SaveEvent::Moment {
            pause_ms: pause.map(millis),
            pause_parts: parts,
            unix_us,
            monotonic_us: monotonic_us(unix_us),
        });
    }

    /// The parts of a pause of ours, and their sum.
    fn parts(&self) -> Option<(Duration, PauseParts)> {
        let [hold, stopped, asked, switched, described, walked, resumed] = self.steps[..] else {
            return None;
        };
        let part = |from: Instant, to: Instant| millis(to.duration_since(from));
        let parts = PauseParts {
            stop_ms: part(hold, stopped),
            changed_ms: part(stopped, asked),
            disks_ms: part(asked, switched),
            devices_ms: part(switched, described),
            walk_ms: part(described, walked),
            resume_ms: part(walked, resumed),
        };
        Some((resumed.duration_since(hold), parts))
    }
}

fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// A time by the host's clock, not long ago, by CLOCK_MONOTONIC.
fn monotonic_us(unix: u64) -> u64 {
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    let now = u64::try_from(Duration::from(now).as_micros()).unwrap_or(u64::MAX);
    now.saturating_sub(unix_us().saturating_sub(unix))
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_told_once_whatever_was_missed() {
        let event = |name: &str, timestamp| Event {
            name: name.into(),
            data: serde_json::Value::Null,
            timestamp,
        };
        for missed in [false, true] {
            let mut told = Vec::new();
            let mut clock = PauseClock::new(true);
            clock.hear(&event("STOP", 1_000));
            if !missed {
                clock.hear(&event("RESUME", 3_500));
            }
            assert!(!clock.tell(&mut |event| told.push(event)));
            clock.pass();
            assert_eq!(clock.tell(&mut |event| told.push(event)), !missed);
            let moment = clock.settle(&mut |event| told.push(event));
            clock.settle(&mut |event| told.push(event));
            let pause = (!missed).then_some(Duration::from_micros(2_500));
            assert_eq!((moment.unix_us, moment.pause, told.len()), (1_000, pause, 1));
        }
    }
}
