//! What the source of a migration reports to whoever follows it: the postcopy source, and that
//! of an ordinary stream ([`eager`](crate::revert::eager)).

use tokio::sync::mpsc::UnboundedSender;

use crate::memory::{FaultReport, Unreadable};
use crate::revert::error::PostcopyError;
use crate::revert::options::Placement;

/// What a source reports.
#[derive(Debug)]
pub(in crate::revert) enum PostcopyEvent {
    /// By which transport pages go from now on.
    Placing {
        /// The transport.
        placement: Placement,
        /// Why.
        reason: String,
    },
    /// This source has taken the place of another, and faults are served again.
    TakenOver,
    /// QEMU goes on with the postcopy that was interrupted, by this source's stream.
    Reconnected,
    /// The device state is in; QEMU runs the guest next, unless it was told to wait.
    Loaded,
    /// The working set is in place.
    Preloaded,
    /// Memory can't be read, or can again.
    Unreadable(Unreadable),
    /// All has been brought but what can't be read.
    Filled,
    /// What was seen of faults that came from userfaultfd, if anything.
    Faults(Option<FaultReport>),
    /// QEMU has confirmed that it has everything. The last event, with what requests by
    /// the return path have shown.
    Finished(FaultReport),
    /// The source has ended before that. The last event.
    Failed(PostcopyError),
}

/// Reports that a thread panicked: whoever follows the source would wait forever.
pub(in crate::revert) struct LastWord {
    pub events: UnboundedSender<PostcopyEvent>,
    /// What the thread does.
    pub doing: &'static str,
}

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.events.send(PostcopyEvent::Failed(PostcopyError::Panicked(self.doing)));
        }
    }
}
