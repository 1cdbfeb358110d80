//! A guest, as others see it: what it is now, and how it is told what to do.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};

use super::event::{GuestView, SetupView};
use super::saved::SavedGuest;
use super::template::{Place, Template};
use crate::revert::{Progress, ResetWay, RevertError};
use crate::runs::ProcessId;

/// What a guest is told.
pub(super) enum Command {
    /// To run, for whoever asked at `began`.
    Take { began: Instant, name: Option<String>, reply: oneshot::Sender<Result<(), RevertError>> },
    /// To go back to its image.
    Reset { reply: oneshot::Sender<Result<ResetDone, RevertError>> },
    /// To end.
    Release { why: &'static str, reply: oneshot::Sender<()> },
}

/// What a reset has done.
pub(super) struct ResetDone {
    pub how: ResetWay,
    pub pages: Option<u64>,
    pub took: Duration,
    pub why: Option<String>,
}

/// A guest, as others see it.
pub(super) struct Handle {
    pub place: Place,
    pub pool: String,
    /// What its QEMU had of its own when it began to wait, in bytes.
    pub waits_with: u64,
    now: Mutex<Now>,
    commands: mpsc::UnboundedSender<Command>,
}

/// What changes of a guest.
pub(super) struct Now {
    pub name: String,
    pub qemu: i32,
    pub ports: BTreeMap<u16, u16>,
    /// When it was taken, if it was.
    pub taken: Option<SystemTime>,
    pub ms: Option<f64>,
    pub resettable: bool,
    pub resets: u64,
    pub progress: Option<Progress>,
    /// How what is done for it as soon as it runs has come on, where something is.
    pub setup: Option<SetupView>,
}

impl Handle {
    pub fn new(
        pool: &str,
        place: Place,
        waits_with: u64,
        now: Now,
    ) -> (Arc<Handle>, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (pool, now) = (pool.to_owned(), Mutex::new(now));
        let handle = Handle { place, pool, waits_with, now, commands };
        (Arc::new(handle), receiver)
    }

    pub fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.now().name.clone()
    }

    /// When it was taken.
    pub fn taken(&self) -> Option<SystemTime> {
        self.now().taken
    }

    /// As it is now.
    pub fn view(&self, template: &Template) -> GuestView {
        let now = self.now();
        let age = now.taken.and_then(|taken| taken.elapsed().ok()).unwrap_or_default();
        let share = |progress: Progress| progress.pages as f64 / progress.total.max(1) as f64;
        GuestView {
            id: self.place.id.clone(),
            pool: self.pool.clone(),
            name: now.name.clone(),
            qemu_pid: now.qemu,
            qmp: Some(template.qmp(&self.place.identity)),
            dir: self.place.identity.directory.clone(),
            ports: now.ports.iter().map(|(old, new)| (old.to_string(), *new)).collect(),
            ms: now.ms,
            age_s: age.as_secs_f64(),
            resettable: now.resettable,
            resets: now.resets,
            present: now.progress.map(share),
            setup: now.setup.clone(),
        }
    }

    /// Has it run; returns once QEMU says that it does. Nothing where it has ended.
    pub async fn take(
        &self,
        began: Instant,
        name: Option<String>,
    ) -> Option<Result<(), RevertError>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Take { began, name, reply }).ok()?;
        answer.await.ok()
    }

    /// Has it go back to its image. Nothing where it has ended.
    pub async fn reset(&self) -> Option<Result<ResetDone, RevertError>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Reset { reply }).ok()?;
        answer.await.ok()
    }

    /// Has it end, and returns once it has.
    pub async fn release(&self, why: &'static str) {
        let (reply, answer) = oneshot::channel();
        // One that has ended already hears nothing.
        if self.commands.send(Command::Release { why, reply }).is_ok() {
            let _ = answer.await;
        }
    }

    /// As it is written down.
    pub fn saved(&self, template: &Template) -> SavedGuest {
        let now = self.now();
        let taken = now.taken.and_then(|taken| taken.duration_since(UNIX_EPOCH).ok());
        SavedGuest {
            name: now.name.clone(),
            ports: now.ports.clone(),
            qemu: ProcessId::of(now.qemu),
            taken: now.taken.is_some(),
            taken_unix_ms: taken.unwrap_or_default().as_millis() as u64,
            resets: now.resets,
            setup: now.setup.clone(),
            ..SavedGuest::planned(&self.pool, &self.place, template)
        }
    }
}

impl SavedGuest {
    /// One whose QEMU is about to be started.
    pub fn planned(pool: &str, place: &Place, template: &Template) -> SavedGuest {
        SavedGuest {
            id: place.id.clone(),
            pool: pool.to_owned(),
            number: place.identity.number,
            name: place.identity.name.clone(),
            directory: place.identity.directory.clone(),
            qmp: template.qmp(&place.identity),
            ports: place.ports.clone(),
            qemu: None,
            taken: false,
            taken_unix_ms: 0,
            resets: 0,
            setup: None,
            resetting: false,
        }
    }
}
