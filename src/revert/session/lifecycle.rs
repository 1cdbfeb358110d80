//! What QEMU and the postcopy source report, turned into what a session does next.
//!
//! A pure state machine: [`Lifecycle::hear`] takes in what was reported, [`Lifecycle::next`]
//! says what follows from all that has been heard so far. The order of reports from two
//! sources is anybody's guess (QEMU may tell of RESUME after the source has finished), so
//! facts are kept, and each step is taken when all that it needs has become true.

use std::collections::VecDeque;

use crate::memory::{FaultReport, Unreadable};
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::options::{Placement, Preload};
use crate::revert::source::PostcopyEvent;

/// When the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// QEMU runs it as soon as its device state is in.
    ByItself,
    /// We have QEMU run it, once this is in place.
    Continued { preload: Preload },
    /// When its owner says so: it counts as running when it could.
    LeftToOwner,
}

/// Something that was reported.
#[derive(Debug)]
pub(super) enum Told {
    /// By QEMU: the guest runs.
    Resumed,
    /// By QEMU, asked: how the migration of a mapped guest stands.
    Migration(String),
    /// By QEMU, asked: its run state, and whether the guest has run before.
    Status { status: String, has_run: bool },
    /// By the postcopy source; nothing when it has ended without a word.
    Source(Option<PostcopyEvent>),
    /// By whoever holds the guest in standby: it may go on.
    Released,
    /// By the user: the session is to end as soon as the guest needs it no more.
    Interrupted,
}

/// What a session does next.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Tell by which transport memory goes.
    Placing { placement: Placement, reason: String },
    /// It is armed.
    Armed,
    /// Have QEMU run the guest.
    Continue,
    /// Ask QEMU for its run state.
    AskStatus,
    /// The guest runs, or could.
    Running,
    /// All memory is in place.
    Resident,
    /// Tell that this process has taken the place of another.
    TakenOver,
    /// QEMU goes on by a new stream: from now on another can succeed us.
    Reconnected,
    /// Deal with what was reported of memory that can't be read
    /// ([`Lifecycle::take_unreadable`]).
    Unreadable,
    /// End: nothing is left to do but to wait for memory that can't be read, and the user does
    /// not want to wait.
    GiveUp,
}

/// The state that a session is in, as far as this machine tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Launched,
    Armed,
    Running,
    Resident,
}

/// All that a session has heard.
#[derive(Debug)]
pub(super) struct Lifecycle {
    start: Start,
    stage: Stage,
    /// Whether memory is a mapping: it is whole once QEMU has loaded the device state.
    mapped: bool,
    /// Whether the guest may leave [`Stage::Armed`].
    released: bool,
    loaded: bool,
    preloaded: bool,
    resumed: bool,
    /// Whether this process takes over, and the source has not reported that it serves.
    taking_over: bool,
    /// Whether this process has taken over, and that has not been told.
    taken_over: bool,
    /// Whether QEMU has taken up an interrupted postcopy, and that has not been told.
    reconnected: bool,
    placing: Option<(Placement, String)>,
    placement: Placement,
    /// What was reported of memory that can't be read, and has not been told.
    unreadable: VecDeque<Unreadable>,
    /// Whether the guest waits for some of it.
    stopped: bool,
    /// Whether all is in place but memory that can't be read.
    filled: bool,
    interrupted: bool,
    /// What was seen of faults that came from userfaultfd.
    direct_faults: Option<FaultReport>,
    /// What was seen of requests; there once all memory is in place.
    finished: Option<FaultReport>,
}

impl Lifecycle {
    /// A session that has been launched. In `standby` it waits to be released.
    pub fn new(start: Start, standby: bool) -> Lifecycle {
        Lifecycle {
            start,
            stage: Stage::Launched,
            mapped: false,
            released: !standby,
            loaded: false,
            preloaded: false,
            resumed: false,
            taking_over: false,
            taken_over: false,
            reconnected: false,
            placing: None,
            placement: Placement::Socket,
            unreadable: VecDeque::new(),
            stopped: false,
            filled: false,
            interrupted: false,
            direct_faults: None,
            finished: None,
        }
    }

    /// A session whose guest runs, taken over from another process.
    pub fn taken_over() -> Lifecycle {
        let (stage, taking_over) = (Stage::Running, true);
        let (loaded, resumed) = (true, true);
        let new = Lifecycle::new(Start::ByItself, false);
        Lifecycle { stage, taking_over, loaded, resumed, ..new }
    }

    /// The same for a guest whose memory QEMU maps.
    pub fn mapped(self) -> Lifecycle {
        let reason = "the image is flat: nothing is left to serve".to_owned();
        let placing = Some((Placement::Map, reason));
        Lifecycle { mapped: true, placement: Placement::Map, placing, ..self }
    }

    /// Takes in a report.
    pub fn hear(&mut self, told: Told) -> Result<(), RevertError> {
        match told {
            Told::Resumed => self.resumes(),
            Told::Migration(status) => match status.as_str() {
                "completed" => self.is_whole(),
                "failed" => return Err(RevertError::not_run(status)),
                _ => {}
            },
            Told::Status { status, has_run } => match has_run || status == "running" {
                true => self.resumes(),
                false => return Err(RevertError::not_run(status)),
            },
            Told::Released => self.released = true,
            Told::Interrupted => self.interrupted = true,
            Told::Source(None) => return Err(PostcopyError::HungUp.into()),
            Told::Source(Some(event)) => match event {
                PostcopyEvent::Placing { placement, reason } => {
                    self.placement = placement;
                    self.placing = Some((placement, reason));
                }
                PostcopyEvent::TakenOver => (self.taking_over, self.taken_over) = (false, true),
                PostcopyEvent::Reconnected => self.reconnected = true,
                PostcopyEvent::Loaded => self.loaded = true,
                PostcopyEvent::Preloaded => self.preloaded = true,
                // Nobody has seen this guest run.
                PostcopyEvent::Unreadable(Unreadable::Awaited(error)) if !self.has_run() => {
                    return Err(PostcopyError::Memory(error).into());
                }
                PostcopyEvent::Unreadable(what) => {
                    self.stopped = match what {
                        Unreadable::Awaited(_) => true,
                        Unreadable::Over => false,
                        Unreadable::PassedOver(_) => self.stopped,
                    };
                    self.unreadable.push_back(what);
                }
                PostcopyEvent::Filled => self.filled = true,
                PostcopyEvent::Faults(report) => self.direct_faults = report,
                PostcopyEvent::Finished(report) => self.finished = Some(report),
                PostcopyEvent::Failed(error) => return Err(error.into()),
            },
        }
        Ok(())
    }

    fn resumes(&mut self) {
        self.resumed = true;
        if self.mapped {
            // QEMU runs it behind the end of the stream.
            self.is_whole();
        }
    }

    /// QEMU has loaded a guest whose memory it maps.
    fn is_whole(&mut self) {
        (self.loaded, self.preloaded) = (true, true);
        self.finished.get_or_insert_with(FaultReport::none);
    }

    /// What follows from all that has been heard; nothing until more is.
    pub fn next(&mut self) -> Option<Next> {
        if std::mem::take(&mut self.taken_over) {
            return Some(Next::TakenOver);
        }
        // Another thread of the source may have reported already what its predecessor's guest
        // waits for. Nothing is told ahead of the takeover.
        if self.taking_over && self.finished.is_none() {
            return None;
        }
        if std::mem::take(&mut self.reconnected) {
            return Some(Next::Reconnected);
        }
        if let Some((placement, reason)) = self.placing.take() {
            return Some(Next::Placing { placement, reason });
        }
        if !self.unreadable.is_empty() {
            return Some(Next::Unreadable);
        }
        let next = match self.stage {
            Stage::Launched if self.released || (self.loaded && self.is_preloaded()) => Next::Armed,
            Stage::Armed if self.released => self.behind_armed()?,
            Stage::Running if self.finished.is_some() => Next::Resident,
            Stage::Running if self.interrupted && (self.stopped || self.filled) => Next::GiveUp,
            _ => return None,
        };
        self.stage = match next {
            Next::Armed => Stage::Armed,
            Next::Running => Stage::Running,
            Next::Resident => Stage::Resident,
            _ => self.stage,
        };
        Some(next)
    }

    /// Takes the next of what was reported of memory that can't be read.
    pub fn take_unreadable(&mut self) -> Option<Unreadable> {
        self.unreadable.pop_front()
    }

    /// Whether the guest waits for memory that can't be read.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether the guest has run, for all that is known.
    fn has_run(&self) -> bool {
        self.resumed || matches!(self.stage, Stage::Running | Stage::Resident)
    }

    fn behind_armed(&self) -> Option<Next> {
        match self.start {
            _ if self.resumed => Some(Next::Running),
            Start::LeftToOwner if self.loaded => Some(Next::Running),
            // QEMU answers once it has finished loading, RUN included.
            Start::Continued { .. } if self.loaded && self.is_preloaded() => Some(Next::Continue),
            // All is over, and QEMU has not said that the guest runs: does it?
            Start::ByItself if self.finished.is_some() => Some(Next::AskStatus),
            _ => None,
        }
    }

    /// Whether the guest is in standby: it is, or will be, held in Armed.
    pub fn is_held(&self) -> bool {
        !self.released
    }

    /// What is in place ahead of the guest's first instruction.
    pub fn preload(&self) -> Preload {
        match self.start {
            Start::Continued { preload } => preload,
            Start::ByItself | Start::LeftToOwner => Preload::Nothing,
        }
    }

    fn is_preloaded(&self) -> bool {
        self.preloaded || self.preload() == Preload::Nothing
    }

    /// Whether QEMU's reports still matter: once the guest runs, those of the source do.
    pub fn awaits_qemu(&self) -> bool {
        matches!(self.stage, Stage::Launched | Stage::Armed)
    }

    /// Whether the device state is in.
    pub fn has_loaded(&self) -> bool {
        self.loaded
    }

    /// Whether the guest runs, and all of its memory is not in place yet.
    pub fn is_running(&self) -> bool {
        self.stage == Stage::Running
    }

    /// Whether all memory is in place.
    pub fn is_finished(&self) -> bool {
        self.finished.is_some()
    }

    /// By which transport memory came, and what was seen of faults.
    pub fn into_result(self) -> (Placement, FaultReport) {
        let faults = self.finished.unwrap_or_else(FaultReport::none);
        let faults = match self.direct_faults {
            Some(direct) => faults.merged(direct),
            None => faults,
        };
        (self.placement, faults)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryError;

    fn source(event: PostcopyEvent) -> Told {
        Told::Source(Some(event))
    }

    fn loaded() -> Told {
        source(PostcopyEvent::Loaded)
    }

    fn finished() -> Told {
        source(PostcopyEvent::Finished(FaultReport::none()))
    }

    /// What follows from these reports, one after the other.
    fn steps(mut session: Lifecycle, reports: Vec<Told>) -> Vec<Next> {
        let mut steps: Vec<_> = std::iter::from_fn(|| session.next()).collect();
        for told in reports {
            session.hear(told).unwrap();
            // Asked again, it would say the same until the answer is heard.
            match session.next() {
                Some(step @ (Next::Continue | Next::AskStatus)) => steps.push(step),
                Some(step) => {
                    steps.push(step);
                    steps.extend(std::iter::from_fn(|| session.next()));
                }
                None => {}
            }
        }
        steps
    }

    #[test]
    fn a_guest_runs_when_qemu_says_so_and_is_resident_when_the_source_does() {
        let orders = [
            vec![loaded(), Told::Resumed, finished()],
            // QEMU's event may come before the source's.
            vec![Told::Resumed, loaded(), finished()],
        ];
        for reports in orders {
            let steps = steps(Lifecycle::new(Start::ByItself, false), reports);
            assert_eq!(steps, [Next::Armed, Next::Running, Next::Resident]);
        }
    }

    #[test]
    fn a_guest_whose_memory_is_complete_before_qemu_said_that_it_runs_is_asked_for() {
        let reports = || vec![loaded(), finished()];
        let told = |status: &str, has_run| Told::Status { status: status.into(), has_run };
        for answer in [told("running", false), told("paused", true)] {
            let reports = reports().into_iter().chain([answer]).collect();
            let steps = steps(Lifecycle::new(Start::ByItself, false), reports);
            assert_eq!(steps, [Next::Armed, Next::AskStatus, Next::Running, Next::Resident]);
        }
        let mut session = Lifecycle::new(Start::ByItself, false);
        let error = session.hear(told("prelaunch", false)).unwrap_err();
        assert!(matches!(&error, RevertError::NotRun { status, .. } if status == "prelaunch"));
    }

    #[test]
    fn a_preloaded_guest_is_continued_and_one_left_to_its_owner_is_not() {
        let preloaded = || source(PostcopyEvent::Preloaded);
        let reports = vec![preloaded(), loaded(), Told::Resumed];
        let steps_of = |start, reports| steps(Lifecycle::new(start, false), reports);
        let steps = steps_of(Start::Continued { preload: Preload::WorkingSet }, reports);
        assert_eq!(steps, [Next::Armed, Next::Continue, Next::Running]);
        assert_eq!(steps_of(Start::LeftToOwner, vec![loaded()]), [Next::Armed, Next::Running]);
    }

    #[test]
    fn a_guest_in_standby_waits_until_it_is_released() {
        let continued = |preload| (Start::Continued { preload }, Next::Continue);
        let left = (Start::LeftToOwner, Next::Running);
        for (start, last) in [continued(Preload::WorkingSet), continued(Preload::Nothing), left] {
            let reports = vec![loaded(), source(PostcopyEvent::Preloaded), Told::Released];
            assert_eq!(steps(Lifecycle::new(start, true), reports), [Next::Armed, last]);
        }
        let mut waiting = Lifecycle::new(Start::LeftToOwner, true);
        assert_eq!(waiting.next(), None, "the device state is not in");
        waiting.hear(loaded()).unwrap();
        assert_eq!((waiting.next(), waiting.next()), (Some(Next::Armed), None));
    }

    #[test]
    fn a_mapped_guest_is_whole_as_soon_as_it_is_loaded() {
        let mapped = |start| Lifecycle::new(start, false).mapped();
        let completed = || Told::Migration("completed".into());
        let names = |steps: Vec<Next>| steps.into_iter().skip(1).collect::<Vec<_>>();
        assert_eq!(
            names(steps(mapped(Start::ByItself), vec![Told::Resumed])),
            [Next::Armed, Next::Running, Next::Resident]
        );
        assert_eq!(
            names(steps(mapped(Start::LeftToOwner), vec![completed()])),
            [Next::Armed, Next::Running, Next::Resident]
        );
        assert_eq!(
            names(steps(mapped(Start::ByItself), vec![completed()])),
            [Next::Armed, Next::AskStatus]
        );
        let failed = mapped(Start::ByItself).hear(Told::Migration("failed".into()));
        assert!(matches!(failed, Err(RevertError::NotRun { .. })));
    }

    #[test]
    fn unreadable_memory_ends_a_session_only_before_the_guest_runs_or_when_interrupted() {
        let unreadable = || MemoryError::Source {
            block: "pc.ram".into(),
            offset: 4096,
            source: "as the test wants".into(),
        };
        let awaited = || source(PostcopyEvent::Unreadable(Unreadable::Awaited(unreadable())));
        let mut session = Lifecycle::new(Start::ByItself, false);
        session.hear(loaded()).unwrap();
        assert!(session.hear(awaited()).is_err());

        let taken_over = || source(PostcopyEvent::TakenOver);
        let mut session = Lifecycle::taken_over();
        session.hear(awaited()).unwrap();
        assert_eq!(session.next(), None, "the takeover is told first");
        session.hear(taken_over()).unwrap();
        assert_eq!(session.next(), Some(Next::TakenOver));
        assert_eq!(session.next(), Some(Next::Unreadable));
        assert!(matches!(session.take_unreadable(), Some(Unreadable::Awaited(_))));
        assert_eq!(session.next(), None);
        session.hear(Told::Interrupted).unwrap();
        assert_eq!(session.next(), Some(Next::GiveUp));

        // What nobody waits for doesn't keep the rest from being brought.
        let mut session = Lifecycle::taken_over();
        session.hear(taken_over()).unwrap();
        assert_eq!(session.next(), Some(Next::TakenOver));
        let passed_over = Unreadable::PassedOver(unreadable());
        session.hear(source(PostcopyEvent::Unreadable(passed_over))).unwrap();
        assert!(session.take_unreadable().is_some());
        session.hear(Told::Interrupted).unwrap();
        assert_eq!(session.next(), None);
        session.hear(source(PostcopyEvent::Filled)).unwrap();
        assert_eq!(session.next(), Some(Next::GiveUp));
        session.hear(finished()).unwrap();
        assert_eq!(session.next(), Some(Next::Resident));
    }

    #[test]
    fn a_source_that_ends_without_a_word_is_an_error() {
        let ended = Lifecycle::new(Start::ByItself, false).hear(Told::Source(None));
        let hung_up =
            matches!(ended, Err(RevertError::Postcopy { error: PostcopyError::HungUp, .. }));
        assert!(hung_up);
    }
}
