//! Why a revert fails.

use super::FeedError;
use crate::guest::{Process, VmError};
use crate::host::PageSizeError;
use crate::image::ImageError;
use crate::memory::WorkingSetError;
use crate::qmp::QmpError;

/// Why a revert failed. The QEMU that it started has been ended. Overlays of disks stay if
/// the guest has run; [`RevertEvent::Disk`](super::RevertEvent::Disk) has told where they are.
#[derive(Debug, thiserror::Error)]
pub enum RevertError {
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host's pages have another size.
    #[error(transparent)]
    PageSize(#[from] PageSizeError),
    /// QEMU can't be started as recorded.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// QEMU's control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest's memory or device state could not be delivered.
    #[error("{error}{qemu}")]
    Feed {
        /// What failed.
        error: FeedError,
        /// What QEMU itself had to say; empty when nothing.
        qemu: String,
    },
    /// QEMU took the guest and does not run it, mostly because it can't use its disks.
    #[error("QEMU took the guest but leaves it `{status}`{qemu}")]
    NotRun {
        /// QEMU's run state.
        status: String,
        /// What QEMU itself had to say; empty when nothing.
        qemu: String,
    },
    /// QEMU ended while it was given the guest.
    #[error("{error}{qemu}")]
    Died {
        /// How that was noticed.
        error: QmpError,
        /// What QEMU itself had to say.
        qemu: String,
    },
    /// A socket between us and QEMU failed.
    #[error("{what}: {source}")]
    Socket {
        /// What was being done.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The machine's clock can't be kept at the moment's time.
    #[error("the machine's clock can't go on from the moment: {0}; leave out --rtc keep")]
    Rtc(&'static str),
    /// The image was to be checked, and is damaged.
    #[error("{0}; `snapback verify` says all that is wrong")]
    Damaged(String),
    /// The working set that was harvested can't be written.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetError),
    /// A guest that was to show its working set asked for nothing.
    #[error("the guest asked for no memory in that time: give it longer, or let it do something")]
    NothingDemanded,
    /// Interrupted before the guest's memory was complete.
    #[error("interrupted: {0}")]
    Interrupted(&'static str),
}

pub(super) fn feed_error(error: FeedError) -> RevertError {
    RevertError::Feed { error, qemu: String::new() }
}

/// QEMU tells why it ended a migration only on its standard error. Where we ended it,
/// what it says there is not the reason.
pub(super) fn with_qemus_words(error: RevertError, process: &Process) -> RevertError {
    use FeedError::{HungUp, Opening, Refused};
    let words = process.log_tail();
    if words.is_empty() {
        return error;
    }
    let qemu = format!("; QEMU says: {words}");
    match error {
        RevertError::Feed { error: error @ (HungUp | Opening(_) | Refused(_)), .. } => {
            RevertError::Feed { error, qemu }
        }
        RevertError::NotRun { status, .. } => RevertError::NotRun { status, qemu },
        RevertError::Qmp(error @ QmpError::Gone { .. }) => RevertError::Died { error, qemu },
        error => error,
    }
}
