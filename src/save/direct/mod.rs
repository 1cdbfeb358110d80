//! Reading a guest's memory from outside, while QEMU sends it.
//!
//! A background snapshot leaves all memory write-protected, and QEMU takes the protection off a
//! page only once it has sent it. It never protects a page again. So a page that is still protected
//! *after* it was read was read as it was at the moment. QEMU's stream comes from the front, one
//! page after the other; we read from the back, 2 MiB at a time. Each page is taken by whoever
//! captures it first (`merge`).
//!
//! What the guest has not written since the image's parent is taken from there before anything is
//! read (`unchanged`).

mod backpressure;
mod places;
mod reader;
mod unchanged;
mod window;

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

pub(super) use backpressure::Backpressure;
pub(super) use places::{Place, Places};
pub(super) use unchanged::{Inheritance, Unchanged};
pub(super) use window::capture;

use super::merge::Merge;
use crate::cancel::Cancellation;
use crate::host::memory;
use crate::page::{PAGE_SIZE, Page, PageBytes};

/// Pages of the stream that are compared with memory at most, before it is given up: that the
/// guest has rewritten all of them already is as good as impossible.
const COMPARED: u32 = 256;

/// What reads memory beside QEMU's stream: nothing at first, then a thread.
pub(super) struct DirectReading {
    places: Places,
    /// Requested once the guest goes on, which is not to wait for processors that we use.
    begin: Cancellation,
    /// Requested once clones run, where there are any: the thread waits for it.
    clear: Option<Cancellation>,
    /// What need not be read.
    inheritance: Option<Inheritance>,
    state: State,
}

enum State {
    /// So many pages that came by the stream were not in the place where they should be.
    Unproven(u32),
    Reading {
        thread: JoinHandle<()>,
        stop: Cancellation,
        done: Cancellation,
    },
    /// It can't be done, or has ended.
    Over,
}

impl DirectReading {
    /// Reads at these places, once they are proven and it is told to `begin`. QEMU's stream is held back from
    /// then on, but what the guest can write to is not read ahead of `clear`.
    pub fn new(
        places: Places,
        begin: Cancellation,
        clear: Option<Cancellation>,
        inheritance: Option<Inheritance>,
    ) -> DirectReading {
        DirectReading { places, begin, clear, inheritance, state: State::Unproven(0) }
    }

    /// Takes note of a page that came by the stream: the first one that lies in QEMU's memory
    /// where the places say proves them, and that memory is write-protected by now. Reading begins, which
    /// is told.
    pub fn stream_brought(&mut self, page: Page, bytes: &PageBytes, merge: &Arc<Merge>) -> bool {
        let State::Unproven(compared) = &mut self.state else { return false };
        if !self.begin.is_requested() {
            return false;
        }
        let Some(place) = self.places.of(page.block) else { return false };
        let mut found = [0; PAGE_SIZE];
        let read = memory::read(self.places.pid(), place.start + page.offset(), &mut found);
        *compared += 1;
        let compared = *compared;
        match read {
            Ok(()) if found == *bytes => match self.start(merge) {
                Ok(state) => self.state = state,
                Err(error) => self.end(&format!("a thread can't be started: {error}")),
            },
            Ok(()) if compared < COMPARED => {}
            Ok(()) => self.end("what QEMU has sent does not lie where its memory should"),
            Err(error) => self.end(&format!("memory can't be read: {error}")),
        }
        matches!(self.state, State::Reading { .. })
    }

    fn end(&mut self, why: &str) {
        tracing::warn!("memory comes by QEMU's stream alone: {why}");
        self.state = State::Over;
    }

    fn start(&mut self, merge: &Arc<Merge>) -> io::Result<State> {
        let stop = Cancellation::new();
        let merge = Arc::clone(merge);
        let (clear, inheritance) = (self.clear.clone(), self.inheritance.take());
        let reader = reader::Reader::new(&self.places, merge, stop.clone(), clear, inheritance)?;
        let done = Cancellation::new();
        let end = End(done.clone());
        let builder = thread::Builder::new().name("read-memory".into());
        let thread = builder.spawn(move || {
            let _end = end;
            reader.run();
        })?;
        Ok(State::Reading { thread, stop, done })
    }

    /// What holds QEMU's stream back as long as memory is read, if it is, or until `over` is requested.
    pub fn backpressure(&self, merge: &Arc<Merge>, over: &Cancellation) -> Option<Backpressure> {
        let State::Reading { done, .. } = &self.state else { return None };
        Backpressure::new(self.places.pid(), merge, [done.clone(), over.clone()])
    }
}

/// Tells, however it ends, that reading has ended.
struct End(Cancellation);

impl Drop for End {
    fn drop(&mut self) {
        self.0.request();
    }
}

impl Drop for DirectReading {
    fn drop(&mut self) {
        if let State::Reading { thread, stop, .. } = std::mem::replace(&mut self.state, State::Over)
        {
            stop.request();
            if thread.join().is_err() {
                tracing::warn!("the thread that reads memory has panicked");
            }
        }
    }
}
