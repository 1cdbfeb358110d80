//! Who waits, who runs and who stands in the queue of one pool. No task, no I/O.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use super::config::PoolSettings;
use super::event::{PoolState, PoolView, Problem};
use super::handle::Handle;

/// The book of one pool.
pub(super) struct Book {
    pub settings: PoolSettings,
    /// Armed guests, the one that waits longest first.
    ready: VecDeque<Arc<Handle>>,
    /// How many are being armed.
    arming: usize,
    taken: HashMap<String, Arc<Handle>>,
    /// Requests for which there was no guest, in their order.
    queue: VecDeque<Waiter>,
    next_waiter: u64,
    /// Names that guests are about to have.
    reserved: HashSet<String>,
    pub problem: Option<Problem>,
    pub closed: bool,
    pub takes: u64,
}

struct Waiter {
    number: u64,
    tell: oneshot::Sender<Arc<Handle>>,
}

/// What comes of a request for a guest.
pub(super) enum Asked {
    /// There is one.
    Given(Arc<Handle>),
    /// It stands in the queue, under this number.
    Queued(u64, oneshot::Receiver<Arc<Handle>>),
}

impl Book {
    pub fn new(settings: PoolSettings) -> Book {
        Book {
            settings,
            ready: VecDeque::new(),
            arming: 0,
            taken: HashMap::new(),
            queue: VecDeque::new(),
            next_waiter: 0,
            reserved: HashSet::new(),
            problem: None,
            closed: false,
            takes: 0,
        }
    }

    /// Whether one more guest is to be armed: some are missing of those that are to wait, or
    /// somebody waits who may have one.
    pub fn wants_one(&self) -> bool {
        let free = (self.settings.max as usize).saturating_sub(self.taken.len());
        let wanted = (self.settings.armed as usize).max(self.queue.len().min(free));
        !self.closed && self.ready.len() + self.arming < wanted
    }

    /// One more is being armed.
    pub fn begin_arming(&mut self) {
        self.arming += 1;
    }

    /// One less is being armed.
    pub fn end_arming(&mut self) {
        self.arming -= 1;
    }

    /// A guest has been armed, and waits from now on. Returns whether the pool was closed
    /// meanwhile, and does not want it.
    pub fn end_arming_of(&mut self, guest: &Arc<Handle>) -> bool {
        self.end_arming();
        if !self.closed {
            self.problem = None;
            self.ready.push_back(Arc::clone(guest));
            self.serve();
        }
        self.closed
    }

    /// A guest that was taken by a daemon before this one.
    pub fn adopt(&mut self, guest: Arc<Handle>) {
        self.taken.insert(guest.place.id.clone(), guest);
    }

    /// Asks for a guest. Whoever asks later gets none earlier.
    pub fn ask(&mut self) -> Asked {
        let (tell, told) = oneshot::channel();
        let number = self.next_waiter;
        self.next_waiter += 1;
        self.queue.push_back(Waiter { number, tell });
        self.serve();
        let mut told = told;
        match told.try_recv() {
            Ok(guest) => Asked::Given(guest),
            Err(_) => Asked::Queued(number, told),
        }
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

    /// Takes a request out of the queue.
    pub fn give_up(&mut self, number: u64) {
        self.queue.retain(|waiter| waiter.number != number);
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
        while self.taken.len() < self.settings.max as usize {
            let Some(waiter) = self.queue.pop_front() else { return };
            // Who has hung up wants none.
            if waiter.tell.is_closed() {
                continue;
            }
            let Some(guest) = self.ready.pop_front() else {
                self.queue.push_front(waiter);
                return;
            };
            match waiter.tell.send(Arc::clone(&guest)) {
                Ok(()) => _ = self.taken.insert(guest.place.id.clone(), guest),
                Err(guest) => self.ready.push_front(guest),
            }
        }
    }

    /// A guest is no more.
    pub fn remove(&mut self, id: &str) {
        self.ready.retain(|guest| guest.place.id != id);
        self.taken.remove(id);
        self.serve();
    }

    /// Changes how many are to wait and may be taken. Returns those that are to wait no more.
    pub fn change(&mut self, armed: Option<u32>, max: Option<u32>) -> Vec<Arc<Handle>> {
        self.settings.armed = armed.unwrap_or(self.settings.armed);
        self.settings.max = max.unwrap_or(self.settings.max);
        self.serve();
        let keep = (self.settings.armed as usize).min(self.ready.len());
        self.ready.split_off(keep).into()
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
            resettable: self.settings.resettable && !self.settings.share,
            share: self.settings.share,
            cache: None,
        }
    }
}
