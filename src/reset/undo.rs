//! How a guest's memory goes back, by how it came.

use std::ops::ControlFlow;

use super::ResetError;
use super::mapped::MappedMemory;
use super::requests::{Asked, Request, ResetOutcome, Tracked};
use super::tracker::Tracker;

/// What takes a guest's memory back.
pub(crate) enum Undo {
    /// Its writes are heard of, through QEMU's userfaultfd.
    Tracked(Tracker),
    /// It is mapped from the image; the kernel tells what was written.
    Mapped(MappedMemory),
}

impl Undo {
    /// Waits until it is known what the guest had written before its writes were tracked.
    ///
    /// # Errors
    /// When the image or the guest's memory can't be read.
    pub async fn ready(&self) -> Result<(), ResetError> {
        match self {
            Undo::Tracked(tracker) => tracker.ready().await,
            Undo::Mapped(_) => Ok(()),
        }
    }

    /// Waits until nothing is tracked any more.
    pub async fn ended(&self) {
        match self {
            Undo::Tracked(tracker) => tracker.ended().await,
            Undo::Mapped(_) => std::future::pending().await,
        }
    }

    /// Has all memory be what it was at the moment of the image. Returns how many host pages had
    /// been written. It blocks; the guest must stand still, and QEMU is about to load its devices.
    ///
    /// # Errors
    /// When memory can't be read or written. Some of it is then what it was, and some is not.
    pub fn restore(&self) -> Result<u64, ResetError> {
        match self {
            Undo::Tracked(tracker) => tracker.restore(),
            Undo::Mapped(memory) => memory.restore(),
        }
    }

    /// The same behind the loading, which has written to some memory.
    ///
    /// # Errors
    /// As for [`Undo::restore`].
    pub fn restore_again(&self) -> Result<u64, ResetError> {
        match self {
            Undo::Tracked(tracker) => tracker.restore_again(),
            Undo::Mapped(memory) => memory.restore(),
        }
    }

    /// Notes memory that the guest has given back to the host. Of what is mapped the kernel gives
    /// what the image has.
    ///
    /// # Errors
    /// When it can't be looked for.
    pub fn find_given_back(&self) -> Result<u64, ResetError> {
        match self {
            Undo::Tracked(tracker) => tracker.find_given_back(),
            Undo::Mapped(_) => Ok(0),
        }
    }

    /// Makes ready for what the guest is likely to write.
    ///
    /// # Errors
    /// When memory can't be read.
    pub fn expect_the_same(&self) -> Result<u64, ResetError> {
        match self {
            Undo::Tracked(tracker) => tracker.expect_the_same(),
            Undo::Mapped(_) => Ok(0),
        }
    }

    /// Answers what is asked for other than a reset, and tells whether the guest's writes are still
    /// tracked. A request for a reset is given back.
    pub async fn answer(&self, asked: Asked) -> ControlFlow<bool, Asked> {
        match asked.request {
            Request::Reset => ControlFlow::Continue(asked),
            Request::Tell => {
                asked.tell(&self.tracked()).await;
                ControlFlow::Break(true)
            }
            Request::LetGo => {
                // Whoever asks goes on as soon as it is answered.
                self.end();
                asked.answer(&ResetOutcome::Done { pages: 0, took_ms: 0.0 }).await;
                ControlFlow::Break(false)
            }
        }
    }

    /// What is tracked.
    fn tracked(&self) -> Tracked {
        match self {
            Undo::Tracked(tracker) => tracker.tracked(),
            Undo::Mapped(memory) => Tracked { image: memory.image(), blocks: Vec::new() },
        }
    }

    /// Tracks no more. The guest runs on.
    pub fn end(&self) {
        if let Undo::Tracked(tracker) = self {
            tracker.end();
        }
    }

    /// How many host pages were written since the last reset, or are expected to be; of mapped
    /// memory, how many ever were.
    pub fn written(&self) -> u64 {
        match self {
            Undo::Tracked(tracker) => tracker.written(),
            Undo::Mapped(memory) => memory.own(),
        }
    }
}
