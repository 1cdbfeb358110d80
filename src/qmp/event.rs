//! Events that QEMU sends by itself.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use super::ending::Ending;
use super::error::QmpError;

/// How many events a receiver may leave unfetched before the oldest are lost
/// (which [`Events::next`] then reports).
pub const EVENT_QUEUE: usize = 4096;

/// An event that QEMU sends, such as `STOP` or `MIGRATION`.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The event's name, in capitals.
    pub name: String,
    /// Its data; an empty object if it has none.
    pub data: Value,
    /// When it happened by QEMU's clock, in microseconds since the epoch; 0 when
    /// QEMU does not know it.
    pub timestamp: u64,
}

impl Event {
    /// Reads a QMP message as an event, if it is one.
    pub(super) fn from_message(message: &mut Value) -> Option<Event> {
        let name = message.get("event")?.as_str()?.to_owned();
        let part = |key| message.get("timestamp").and_then(|at| at.get(key)?.as_u64());
        let timestamp = match (part("seconds"), part("microseconds")) {
            (Some(seconds), Some(micros)) => {
                seconds.saturating_mul(1_000_000).saturating_add(micros)
            }
            _ => 0,
        };
        let data = match message.get_mut("data") {
            Some(data) => data.take(),
            None => Value::Object(serde_json::Map::new()),
        };
        Some(Event { name, data, timestamp })
    }
}

/// Receives the events that come after it was made; see
/// [`Qmp::events`](super::Qmp::events).
#[derive(Debug)]
pub struct Events {
    pub(super) queue: broadcast::Receiver<Event>,
    pub(super) ending: Ending,
}

impl Events {
    /// The next event. Safe to cancel.
    ///
    /// # Errors
    /// [`QmpError::EventsLost`] when more than [`EVENT_QUEUE`] events came since
    /// the last call: the oldest are gone, the next call goes on behind the gap.
    /// [`QmpError::Gone`] when the connection has ended and all its events have
    /// been fetched.
    pub async fn next(&mut self) -> Result<Event, QmpError> {
        match self.queue.recv().await {
            Ok(event) => Ok(event),
            Err(RecvError::Lagged(lost)) => Err(QmpError::EventsLost(lost)),
            Err(RecvError::Closed) => Err(self.ending.gone()),
        }
    }

    /// Waits for the first event that `wanted` accepts; those before it are
    /// dropped. Make the receiver *before* the command that causes the event,
    /// or it may come unseen.
    ///
    /// # Errors
    /// [`QmpError::EventTimeout`] when it does not come in time, and as
    /// [`Events::next`].
    pub async fn wait(
        &mut self,
        mut wanted: impl FnMut(&Event) -> bool,
        timeout: Duration,
    ) -> Result<Event, QmpError> {
        let search = async {
            loop {
                let event = self.next().await?;
                if wanted(&event) {
                    return Ok(event);
                }
            }
        };
        match tokio::time::timeout(timeout, search).await {
            Ok(found) => found,
            Err(_) => Err(QmpError::EventTimeout { after: timeout }),
        }
    }
}
