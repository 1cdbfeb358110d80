//! What can go wrong with undoing a save.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::agent::AgentError;
use crate::kind::{Details, ErrorKind};
use crate::qmp::QmpError;

/// Why a journal can't be kept or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// An earlier save did not come to its end.
    #[error(
        "an earlier save of this image did not come to its end, as {} tells; clean up behind it \
         with `recover()`, giving the guest's QMP socket and the image {}",
        .journal.display(), .image.display()
    )]
    Unfinished {
        /// The journal.
        journal: PathBuf,
        /// The image.
        image: PathBuf,
    },
    /// It can't be written, read or removed.
    #[error("can't {doing} the journal {}: {source}", .journal.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The journal.
        journal: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// It is not one.
    #[error(
        "{} is not a journal that this version can read ({problem}); if no save is under way, look \
         at the overlays that it names, then remove it", .journal.display()
    )]
    Unreadable {
        /// The file.
        journal: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl JournalError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            JournalError::Unfinished { .. } => ErrorKind::SaveUnfinished,
            JournalError::Io { source, .. } => ErrorKind::of_io(source),
            JournalError::Unreadable { .. } => ErrorKind::SaveUnfinished,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let (JournalError::Unfinished { journal, .. }
        | JournalError::Io { journal, .. }
        | JournalError::Unreadable { journal, .. }) = self;
        Details::new(&self.to_string(), Some(journal), None)
    }
}

/// Something that could not be undone behind a save that failed or was killed. Its text says what to do about it.
#[derive(Debug)]
#[non_exhaustive]
pub enum LeftOver {
    /// An overlay could not be committed back into its disk.
    Overlay {
        /// The disk.
        disk: String,
        /// The overlay's file.
        overlay: PathBuf,
        /// Why.
        reason: String,
        /// How to commit it.
        remedy: String,
    },
    /// The guest's file systems could not be thawed. The reason is there unless thawing was
    /// broken off.
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
                    "disk {disk} goes on in {overlay}, which was not committed back ({reason}): \
                     {remedy}"
                )
            }
            LeftOver::Frozen(error) => {
                write!(f, "the guest's file systems may still be frozen")?;
                if let Some(error) = error {
                    write!(f, " ({error})")?;
                }
                write!(f, ": `recover()` of this image tries again to thaw them")
            }
            LeftOver::Settings(error) => write!(
                f,
                "QEMU's migration settings were not put back ({error}): `recover()` of this image \
                 tries again"
            ),
            LeftOver::Journal(error) => write!(
                f,
                "{error}: `recover()` of this image tries again; there is nothing \
                 else left to undo"
            ),
        }
    }
}
