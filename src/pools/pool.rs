//! One pool: its book, and what keeps it filled.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, broadcast, oneshot};

use super::book::Book;
use super::config::{Change, PoolSettings, check_name};
use super::error::PoolError;
use super::event::{CacheView, GuestView, PoolEvent, PoolView, Problem, ResetView};
use super::figures::{Counted, Figures};
use super::guest::{Common, Guest};
use super::handle::Handle;
use super::images::Images;
use super::saved::{Numbers, SavedGuest, StateDirectory};
use super::template::{Place, Template};
use crate::host::procfs::own_memory;
use crate::keeper::Successor;
use crate::revert::ResetWay;
use crate::runs::{self, OfPool};

/// How long it takes until arming is tried again that has failed: each time twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Why a guest is no more.
const ASKED: &str = "asked";
const LIFETIME: &str = "lifetime";
const REMOVED: &str = "pool_removed";
const UNCLAIMED: &str = "unclaimed";

/// What all pools have in common.
#[derive(Clone)]
pub(super) struct Shared {
    pub state: Arc<StateDirectory>,
    pub keeper: Option<Successor>,
    pub address: Option<PathBuf>,
    pub images: Arc<Images>,
    /// As many guests are armed at a time, of all pools.
    pub arming: Arc<Semaphore>,
    pub events: broadcast::Sender<PoolEvent>,
    pub numbers: Arc<Numbers>,
}

/// One pool.
pub(super) struct Pool {
    pub name: String,
    book: Mutex<Book>,
    /// Wakes what keeps it filled.
    changed: Notify,
    /// Held while a guest is being armed.
    arming: tokio::sync::Mutex<()>,
    counted: Arc<Counted>,
    template: Arc<Template>,
    shared: Shared,
}

impl Pool {
    /// A pool that fills from now on. Its image is opened when that can be done.
    pub fn start(name: &str, settings: PoolSettings, shared: Shared) -> Arc<Pool> {
        let Shared { state, images, keeper, address, .. } = shared.clone();
        let of_pool = OfPool::of_this_process(name.to_owned(), address.unwrap_or_default());
        let template = Template::new(of_pool, &settings, images, state, keeper);
        let pool = Arc::new(Pool {
            name: name.to_owned(),
            book: Mutex::new(Book::new(settings)),
            changed: Notify::new(),
            arming: tokio::sync::Mutex::default(),
            counted: Arc::default(),
            template: Arc::new(template),
            shared,
        });
        tokio::spawn(Arc::clone(&pool).keep_filled());
        pool
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool as it is now.
    pub fn view(&self) -> PoolView {
        let cache = self.template.cache();
        PoolView { cache: cache.map(CacheView::from), ..self.book().view(&self.name) }
    }

    /// The same with what its QEMUs use.
    pub fn measured(&self) -> PoolView {
        let processes = self.book().processes();
        let used = processes.into_iter().map(own_memory).sum();
        PoolView { used_bytes: Some(used), ..self.view() }
    }

    /// What it is made of.
    pub fn settings(&self) -> PoolSettings {
        self.book().settings.clone()
    }

    /// What has been counted.
    pub fn figures(&self) -> Figures {
        self.counted.now()
    }

    fn tell(&self) {
        // Nobody may listen.
        let _ = self.shared.events.send(PoolEvent::Pool(self.view()));
    }

    /// Changes what can be changed of it.
    pub async fn change(&self, change: &Change) -> Result<(), PoolError> {
        let spare = {
            let mut book = self.book();
            let changed = change.of(book.settings.clone());
            changed.check()?;
            book.change(changed)
        };
        for guest in spare {
            guest.release(ASKED).await;
        }
        self.changed.notify_one();
        self.tell();
        Ok(())
    }

    /// Ends the pool and all its guests.
    pub async fn remove(&self) {
        self.close(REMOVED).await;
        for guest in self.taken() {
            guest.release(REMOVED).await;
        }
        // It is not empty where a guest could not be removed, which has been told.
        let _ = std::fs::remove_dir(self.shared.state.of_pool(&self.name));
        let _ = self.shared.events.send(PoolEvent::Removed { pool: self.name.clone() });
    }

    /// Ends the guests that wait, and arms no more: what a daemon does that ends.
    pub async fn end_waiting(&self) {
        self.close(ASKED).await;
    }

    async fn close(&self, why: &'static str) {
        let waiting = self.book().close();
        self.changed.notify_one();
        for guest in waiting {
            guest.release(why).await;
        }
        // One that is being armed is ended as soon as it can be.
        drop(self.arming.lock().await);
    }

    /// Takes a guest, which runs when this returns. `began` is when it was asked for.
    pub async fn take(
        self: &Arc<Self>,
        began: Instant,
        name: Option<String>,
        patience: Duration,
    ) -> Result<GuestView, PoolError> {
        let _reserved = name.as_ref().map(|name| self.reserve(name)).transpose()?;
        loop {
            let guest = self.next_guest(began, patience).await?;
            let given = Given { guest: Arc::clone(&guest), claimed: false };
            let id = guest.place.id.clone();
            match guest.take(began, name.clone()).await {
                Some(Ok(())) => {
                    self.book().takes += 1;
                    self.limit_lifetime(&guest);
                    let view = self.view_of(&guest);
                    let _ = self.shared.events.send(PoolEvent::Taken(view.clone()));
                    self.tell();
                    self.changed.notify_one();
                    given.claimed();
                    return Ok(view);
                }
                Some(Err(source)) => {
                    self.book().remove(&id);
                    self.counted.failure(source.kind().code());
                    let source = source.into();
                    return Err(PoolError::Revert { pool: self.name.clone(), source });
                }
                // It has ended while it waited: there may be another.
                None => self.book().remove(&id),
            }
        }
    }

    /// Reserves a name for a guest that is about to be taken.
    fn reserve<'a>(&'a self, name: &'a str) -> Result<Reserved<'a>, PoolError> {
        check_name(name)?;
        match self.book().reserve(name) {
            true => Ok(Reserved { pool: self, name }),
            false => Err(PoolError::Exists { what: "a guest", name: name.to_owned() }),
        }
    }

    /// The next guest that waits, once it is this request's turn.
    async fn next_guest(
        &self,
        began: Instant,
        patience: Duration,
    ) -> Result<Arc<Handle>, PoolError> {
        let told = {
            let mut book = self.book();
            if book.closed {
                return Err(PoolError::Removed { pool: self.name.clone() });
            }
            book.ask()
        };
        let mut turn = Turn { pool: self, told };
        if turn.told.is_empty() {
            self.changed.notify_one();
            self.tell();
        }
        match tokio::time::timeout_at((began + patience).into(), &mut turn.told).await {
            Ok(Ok(guest)) => Ok(guest),
            Ok(Err(_)) => Err(PoolError::Removed { pool: self.name.clone() }),
            Err(_) => Err(self.none_to_be_had(patience)),
        }
    }

    fn none_to_be_had(&self, waited: Duration) -> PoolError {
        let book = self.book();
        let (taken, armed) = book.counts();
        let pool = self.name.clone();
        match &book.problem {
            Some(problem) if taken < book.settings.max as usize => {
                PoolError::Degraded { pool, problem: problem.clone() }
            }
            _ => {
                let max = book.settings.max;
                let raise = match taken < max as usize && !book.has_memory_for_one() {
                    true => "memory_mib",
                    false => "max",
                };
                PoolError::Exhausted { pool, taken, max, armed, waited, raise }
            }
        }
    }

    /// Ends a guest, and returns once it is gone: another may be taken in its place.
    pub async fn release(&self, guest: &Handle) {
        guest.release(ASKED).await;
        self.book().remove(&guest.place.id);
    }

    /// The guests that are taken.
    pub fn taken(&self) -> Vec<Arc<Handle>> {
        self.book().taken()
    }

    /// A guest that is taken, as it is now.
    pub fn view_of(&self, guest: &Handle) -> GuestView {
        guest.view(&self.template)
    }

    /// Has a guest go back to its image.
    pub async fn reset(&self, guest: &Handle) -> Result<ResetView, PoolError> {
        let gone = || PoolError::NoSuchGuest { id: guest.place.id.clone() };
        let done = guest.reset().await.ok_or_else(gone)?;
        let done = done.map_err(|source| {
            self.counted.failure(source.kind().code());
            PoolError::Revert { pool: self.name.clone(), source: source.into() }
        })?;
        let ms = done.took.as_secs_f64() * 1e3;
        let (id, pool) = (guest.place.id.clone(), self.name.clone());
        let _ = self.shared.events.send(PoolEvent::Reset { id, pool, how: done.how, ms });
        if done.how == ResetWay::NewProcess {
            self.changed.notify_one();
        }
        let guest = self.view_of(guest);
        Ok(ResetView { how: done.how, pages: done.pages, ms, why: done.why, guest })
    }

    fn limit_lifetime(&self, guest: &Arc<Handle>) {
        let Some(lifetime) = self.settings().lifetime() else { return };
        let guest = Arc::downgrade(guest);
        tokio::spawn(async move {
            tokio::time::sleep(lifetime).await;
            if let Some(guest) = guest.upgrade() {
                guest.release(LIFETIME).await;
            }
        });
    }

    /// Takes a guest up that a daemon before this one has handed out, where it lives. Else what is
    /// left of it is to be removed.
    pub fn adopt(self: &Arc<Self>, saved: &SavedGuest) {
        let Some((guest, adopted)) = Guest::adopt(saved, self.common()) else { return };
        let handle = Arc::clone(&guest.handle);
        self.live_on(&handle, guest.live(adopted));
    }

    /// Takes a guest up that a daemon before this one was taking back to its image. Its QEMU has
    /// ended.
    pub fn adopt_resetting(self: &Arc<Self>, saved: &SavedGuest) {
        let Some(guest) = Guest::known(saved, self.common()) else { return };
        let handle = Arc::clone(&guest.handle);
        self.live_on(&handle, guest.live_again());
    }

    fn live_on(
        self: &Arc<Self>,
        handle: &Arc<Handle>,
        life: impl Future<Output = &'static str> + Send + 'static,
    ) {
        self.book().adopt(Arc::clone(handle));
        self.limit_lifetime(handle);
        let (pool, id) = (Arc::clone(self), handle.place.id.clone());
        tokio::spawn(async move {
            let why = life.await;
            pool.ended(&id, why, true);
        });
    }

    /// Whether this guest is one of its own.
    pub fn has(&self, id: &str) -> bool {
        self.book().is_taken(id)
    }

    fn ended(&self, id: &str, why: &'static str, taken: bool) {
        self.book().remove(id);
        self.changed.notify_one();
        if taken {
            let (id, pool, why) = (id.to_owned(), self.name.clone(), why.to_owned());
            let _ = self.shared.events.send(PoolEvent::Released { id, pool, why });
        }
        self.tell();
    }

    /// Arms guests whenever some are missing, until the pool is removed.
    async fn keep_filled(self: Arc<Self>) {
        let mut retry = FIRST_RETRY;
        loop {
            if self.book().closed {
                return;
            }
            if !self.book().wants_one() {
                self.changed.notified().await;
                continue;
            }
            let Ok(permit) = self.shared.arming.acquire().await else { return };
            let arming = self.arming.lock().await;
            if !self.book().wants_one() {
                continue;
            }
            let armed = match self.learn_size().await {
                // Known only now, it may not be wanted.
                Ok(()) if !self.book().wants_one() => continue,
                Ok(()) => self.arm_one().await,
                Err(error) => Err(error),
            };
            drop(arming);
            match armed {
                Ok(()) => retry = FIRST_RETRY,
                Err(error) => {
                    self.degrade(&error);
                    drop(permit);
                    tokio::time::sleep(retry).await;
                    retry = (retry * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// Sees to it that it is known what a guest is counted with.
    async fn learn_size(&self) -> Result<(), PoolError> {
        if self.book().memory.guest().is_none() {
            let ram = self.template.ram().await.map_err(|error| PoolError::Revert {
                pool: self.name.clone(),
                source: Box::new(error.into()),
            })?;
            self.book().memory.learn_ram(ram);
        }
        let book = self.book();
        let mib = |bytes: Option<u64>| bytes.unwrap_or_default() >> 20;
        match book.memory.holds_one() {
            true => Ok(()),
            false => Err(PoolError::Invalid(format!(
                "memory_mib: {} MiB hold no guest, which is counted with {} MiB: raise it, or say \
                 by guest_memory_mib what a guest is counted with",
                mib(book.memory.limit()),
                mib(book.memory.guest())
            ))),
        }
    }

    fn degrade(&self, error: &PoolError) {
        let problem = Problem::new(error.kind(), error.to_string());
        self.counted.failure(&problem.code);
        let Problem { code, message } = problem.clone();
        let is_new = self.book().problem.replace(problem.clone()) != Some(problem);
        if is_new {
            tracing::warn!("the pool {:?} can't start guests: {message}", self.name);
            let pool = self.name.clone();
            let _ = self.shared.events.send(PoolEvent::Degraded { pool, code, message });
            self.tell();
        }
    }

    /// Arms one guest more.
    async fn arm_one(self: &Arc<Self>) -> Result<(), PoolError> {
        let base = self.shared.state.of_pool(&self.name);
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&base);
        made.map_err(|source| PoolError::State { doing: "making", path: base, source })?;
        let number = self.shared.numbers.take(&self.name);
        let place = Place {
            id: runs::new_id(),
            identity: self.template.identity(number),
            ports: Default::default(),
        };
        let (guest, waiting) = Guest::arm(&self.name, place, self.common()).await?;
        let handle = Arc::clone(&guest.handle);
        let is_unwanted = !self.book().add(&handle);
        let (pool, of_task) = (Arc::clone(self), Arc::clone(&handle));
        tokio::spawn(async move {
            let why = guest.wait(waiting).await;
            pool.ended(&of_task.place.id, why, of_task.taken().is_some());
        });
        if is_unwanted {
            // Its task ends it as soon as it hears of it.
            handle.release(REMOVED).await;
        }
        self.tell();
        Ok(())
    }

    fn common(&self) -> Common {
        Common {
            template: Arc::clone(&self.template),
            state: Arc::clone(&self.shared.state),
            counted: Arc::clone(&self.counted),
            events: self.shared.events.clone(),
        }
    }
}

/// A guest that was given to a request. Where whoever asked has hung up, it ends.
struct Given {
    guest: Arc<Handle>,
    claimed: bool,
}

impl Given {
    /// Whoever asked has it.
    fn claimed(mut self) {
        self.claimed = true;
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        if !self.claimed {
            let guest = Arc::clone(&self.guest);
            tokio::spawn(async move { guest.release(UNCLAIMED).await });
        }
    }
}

/// A place in the queue. Left, it is given up, and a guest that had just been given waits again.
struct Turn<'a> {
    pool: &'a Pool,
    told: oneshot::Receiver<Arc<Handle>>,
}

/// A name that a guest is about to have. Once it has, it is taken by the guest.
struct Reserved<'a> {
    pool: &'a Pool,
    name: &'a str,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.pool.book().unreserve(self.name);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut book = self.pool.book();
        self.told.close();
        book.forget_gone();
        if let Some(guest) = self.told.try_recv().ok().and_then(|guest| book.put_back(guest)) {
            // The pool was closed: it ends.
            drop(Given { guest, claimed: false });
        }
    }
}
