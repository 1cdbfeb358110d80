//! What comes from QEMU: answers to those that wait for them, events to all that listen.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::{broadcast, oneshot};

use super::ending::Ending;
use super::error::QmpError;
use super::event::{EVENT_QUEUE, Event, Events};

/// QEMU's whole answer to a command, an object with `return` or with `error`; or why there is none.
pub type Answer = Result<Value, String>;

/// Where a [`Transport`](super::Transport) delivers what QEMU sends.
#[derive(Debug)]
pub struct Inbox {
    ending: Ending,
    live: Mutex<Live>,
}

#[derive(Debug)]
struct Live {
    /// The callers that wait, by the id of their command.
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    /// `None` once the connection has ended, so that receivers see the end.
    events: Option<broadcast::Sender<Event>>,
}

impl Default for Inbox {
    fn default() -> Inbox {
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let live = Live { waiting: HashMap::new(), events: Some(events) };
        Inbox { ending: Ending::default(), live: Mutex::new(live) }
    }
}

impl Inbox {
    fn live(&self) -> MutexGuard<'_, Live> {
        // Nothing under this lock can leave it half changed.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers a message, as it comes over QEMU's own socket: an event, or an answer with its id.
    pub fn deliver(&self, mut message: Value) {
        if let Some(event) = Event::from_message(&mut message) {
            return self.event(event);
        }
        match message.get("id").and_then(Value::as_u64) {
            Some(id) => self.answer(id, Ok(message)),
            None => tracing::debug!("a QMP answer without a number of ours"),
        }
    }

    /// Delivers an event to all that listen.
    pub fn event(&self, event: Event) {
        if let Some(events) = &self.live().events {
            // Fails when there is no receiver, which is no error.
            let _ = events.send(event);
        }
    }

    /// Delivers the answer to the command `id`.
    pub fn answer(&self, id: u64, answer: Answer) {
        match self.live().waiting.remove(&id) {
            // Fails when the caller has stopped waiting.
            Some(waiting) => drop(waiting.send(answer)),
            None => tracing::debug!("a QMP answer that nobody waits for"),
        }
    }

    /// Ends the connection for all callers. The first reason stays.
    pub fn end(&self, reason: String) {
        self.ending.set(reason);
        let mut live = self.live();
        live.waiting.clear();
        live.events = None;
    }

    /// Why the connection has ended, or `None` while it stands.
    pub fn ended(&self) -> Option<&str> {
        self.ending.reason()
    }

    pub(super) fn gone(&self) -> QmpError {
        self.ending.gone()
    }

    /// Has the answer to the command `id` come by the channel that is returned, for as long as
    /// the [`Waiter`] lives.
    pub(super) fn wait_for(
        &self,
        id: u64,
    ) -> Result<(Waiter<'_>, oneshot::Receiver<Answer>), QmpError> {
        let (sender, answer) = oneshot::channel();
        let mut live = self.live();
        if live.events.is_none() {
            return Err(self.gone());
        }
        live.waiting.insert(id, sender);
        Ok((Waiter { inbox: self, id }, answer))
    }

    pub(super) fn events(&self) -> Events {
        let queue = match &self.live().events {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        };
        Events { queue, ending: self.ending.clone() }
    }
}

/// Removes a caller's entry when it stops waiting, so that entries don't pile up.
pub(super) struct Waiter<'a> {
    inbox: &'a Inbox,
    id: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.inbox.live().waiting.remove(&self.id);
    }
}
