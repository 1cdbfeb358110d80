//! What could not be undone behind a save that failed or was killed.

use std::fmt;
use std::path::PathBuf;

use super::agent::AgentError;
use super::journal::JournalError;
use crate::qmp::QmpError;

/// Something that could not be undone. Its text says what to do about it.
#[derive(Debug)]
#[non_exhaustive]
pub enum LeftOver {
    /// An overlay could not be folded back.
    Overlay {
        /// The disk.
        disk: String,
        /// The overlay's file.
        overlay: PathBuf,
        /// Why.
        reason: String,
        /// What folds it back.
        remedy: String,
    },
    /// The guest's file systems could not be thawed, for this reason if it was tried to its
    /// end.
    Frozen(Option<AgentError>),
    /// QEMU's migration settings could not be put back.
    Settings(QmpError),
    /// All was undone, but the journal could not be removed.
    Journal(JournalError),
}

impl fmt::Display for LeftOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOver::Overlay { disk, overlay, reason, remedy } => {
                let overlay = overlay.display();
                write!(
                    f,
                    "disk {disk} goes on in {overlay}, which was not folded back ({reason}): \
                     {remedy}"
                )
            }
            LeftOver::Frozen(error) => {
                write!(f, "the guest's file systems may still be frozen")?;
                if let Some(error) = error {
                    write!(f, " ({error})")?;
                }
                write!(f, ": `snapback save --recover` on this image tries again to thaw them")
            }
            LeftOver::Settings(error) => write!(
                f,
                "QEMU's migration settings were not put back ({error}): `snapback save --recover` \
                 on this image tries again"
            ),
            LeftOver::Journal(error) => write!(
                f,
                "{error}: `snapback save --recover` on this image tries again; there is nothing \
                 else left to undo"
            ),
        }
    }
}
