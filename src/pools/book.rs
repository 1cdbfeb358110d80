//! Who waits, who runs and who stands in the queue of one pool. No task, no I/O.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::config::PoolSettings;
use super::event::{MemoryView, PoolState, PoolView, Problem};
use super::handle::Handle;
use super::memory::MemoryLimit;

/// The book of one pool.
pub(super) struct Book {
    pub settings: PoolSettings,
    /// Armed guests, the one that waits longest first.
    ready: VecDeque<Arc<Handle>>,
    taken: HashMap<String, Arc<Handle>>,
    /// Requests for which there was no guest, in their order.
    queue: VecDeque<oneshot::Sender<Arc<Handle>>>,
    /// Names that guests are about to have.
    reserved: HashSet<String>,
    pub problem: Option<Problem>,
    pub closed: bool,
    pub takes: u64,
    pub memory: MemoryLimit,
}

impl Book {
    pub fn new(settings: PoolSettings) -> Book {
        Book {
            memory: MemoryLimit::of(&settings),
            settings,
            ready: VecDeque::new(),
            taken: HashMap::new(),
            queue: VecDeque::new(),
            reserved: HashSet::new(),
            problem: None,
            closed: false,
            takes: 0,
        }
    }

    /// Whether one more guest is to be armed, while none is: some are missing of those that are to
    /// wait, or somebody waits who may have one.
    pub fn wants_one(&self) -> bool {
        let free = (self.settings.max as usize).saturating_sub(self.taken.len());
        let wanted = (self.settings.armed as usize).max(self.queue.len().min(free));
        let may = self.memory.may_arm(self.taken.len(), self.waiting_bytes());
        !self.closed && self.ready.len() < wanted && may
    }

    /// What the guests that wait have together, in bytes.
    fn waiting_bytes(&self) -> u64 {
        self.ready.iter().map(|guest| guest.waits_with).sum()
    }

    /// A guest has been armed, and waits from now on. Returns whether the pool wants it: it may have
    /// been closed meanwhile.
    pub fn add(&mut self, guest: &Arc<Handle>) -> bool {
        self.memory.learn_waiting(guest.waits_with);
        if !self.closed {
            self.problem = None;
            self.ready.push_back(Arc::clone(guest));
            self.serve();
        }
        !self.closed
    }

    /// A guest that was taken by a daemon before this one.
    pub fn adopt(&mut self, guest: Arc<Handle>) {
        self.taken.insert(guest.place.id.clone(), guest);
    }

    /// Asks for a guest, which is told at once if there is one. Whoever asks later gets none earlier.
    pub fn ask(&mut self) -> oneshot::Receiver<Arc<Handle>> {
        let (tell, told) = oneshot::channel();
        self.queue.push_back(tell);
        self.serve();
        told
    }

    /// Reserves a name that no guest has and nobody else has reserved.
    pub fn reserve(&mut self, name: &str) -> bool {
        let is_taken = self.taken.values().any(|guest| guest.name() == name);
        !is_taken && self.reserved.insert(name.to_owned())
    }

    /// Gives a name up that was reserved.
    pub fn unreserve(&mut self, name: &str) {
        self.reserved.remove(name);
    }

    /// Takes those out of the queue who have hung up.
    pub fn forget_gone(&mut self) {
        self.queue.retain(|waiter| !waiter.is_closed());
    }

    /// A guest that was given to somebody who has gone waits again. It is returned where the pool
    /// was closed meanwhile.
    pub fn put_back(&mut self, guest: Arc<Handle>) -> Option<Arc<Handle>> {
        self.taken.remove(&guest.place.id);
        if self.closed {
            return Some(guest);
        }
        self.ready.push_front(guest);
        self.serve();
        None
    }

    /// Gives guests that wait to those who ask for them.
    fn serve(&mut self) {
        while self.may_take() {
            let Some(waiter) = self.queue.pop_front() else { return };
            let Some(guest) = self.ready.pop_front() else {
                self.queue.push_front(waiter);
                return;
            };
            match waiter.send(Arc::clone(&guest)) {
                Ok(()) => _ = self.taken.insert(guest.place.id.clone(), guest),
                // Who has hung up wants none.
                Err(guest) => self.ready.push_front(guest),
            }
        }
    }

    /// Whether one more may be taken, as far as the pool's limits go.
    fn may_take(&self) -> bool {
        self.taken.len() < self.settings.max as usize && self.has_memory_for_one()
    }

    /// Whether one of those that wait may be taken, as far as memory goes.
    pub fn has_memory_for_one(&self) -> bool {
        let own = self.ready.front().map_or(0, |guest| guest.waits_with);
        self.memory.may_take(self.taken.len(), self.waiting_bytes(), own)
    }

    /// A guest is no more.
    pub fn remove(&mut self, id: &str) {
        self.ready.retain(|guest| guest.place.id != id);
        self.taken.remove(id);
        self.serve();
    }

    /// Changes what can be changed. Returns those that are to wait no more.
    pub fn change(&mut self, settings: PoolSettings) -> Vec<Arc<Handle>> {
        self.memory.set(&settings);
        self.settings = settings;
        self.serve();
        let keep = (self.settings.armed as usize).min(self.ready.len());
        let mut spare: Vec<_> = self.ready.split_off(keep).into();
        // Those behind were armed last, and are beyond the limit first.
        while let Some(last) = self.ready.pop_back() {
            if self.memory.may_arm(self.taken.len(), self.waiting_bytes()) {
                self.ready.push_back(last);
                break;
            }
            spare.push(last);
        }
        spare
    }

    /// Closes the pool: nobody gets a guest from now on. Returns those that wait.
    pub fn close(&mut self) -> Vec<Arc<Handle>> {
        self.closed = true;
        self.queue.clear();
        self.ready.drain(..).collect()
    }

    /// The guests that are taken, in the order in which they were.
    pub fn taken(&self) -> Vec<Arc<Handle>> {
        let mut guests: Vec<_> = self.taken.values().cloned().collect();
        guests.sort_by_key(|guest| guest.taken());
        guests
    }

    /// The QEMUs of all guests.
    pub fn processes(&self) -> Vec<i32> {
        self.ready.iter().chain(self.taken.values()).map(|guest| guest.now().qemu).collect()
    }

    /// Whether this one is taken.
    pub fn is_taken(&self, id: &str) -> bool {
        self.taken.contains_key(id)
    }

    /// How many are taken, and how many wait.
    pub fn counts(&self) -> (usize, usize) {
        (self.taken.len(), self.ready.len())
    }

    /// The pool as it is now.
    pub fn view(&self, name: &str) -> PoolView {
        let state = match &self.problem {
            Some(_) => PoolState::Degraded,
            None if self.ready.len() < self.settings.armed as usize => PoolState::Filling,
            None => PoolState::Ready,
        };
        PoolView {
            name: name.to_owned(),
            image: self.settings.image.clone(),
            state,
            problem: self.problem.clone(),
            armed: self.settings.armed,
            ready: self.ready.len() as u32,
            max: self.settings.max,
            running: self.taken.len() as u32,
            waiting: self.queue.len() as u32,
            takes: self.takes,
            preload: self.settings.preload,
            resettable: self.settings.resettable,
            share: self.settings.share,
            memory: self.memory.limit().map(|limit| MemoryView {
                limit,
                counted: self.memory.counted(self.taken.len(), self.waiting_bytes()),
                guest: self.memory.guest(),
            }),
            used_bytes: None,
            cache: None,
        }
    }
}
