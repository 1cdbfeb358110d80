//! What can go wrong with a save.

use std::path::PathBuf;
use std::time::Duration;

use super::check::error::CheckError;
use super::copy_error::CopyError;
use super::overlay_error::OverlayError;
use super::undo::error::{JournalError, LeftOver};
use crate::agent::AgentError;
use crate::guest::GuestError;
use crate::host::PageSizeError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};
use crate::libvirt::LibvirtError;
use crate::qmp::QmpError;
use crate::runs::RunsError;
use crate::wire::WireError;

/// Why a save failed. The guest runs on (or stays paused) as before, and neither an image nor
/// anything else is left behind; the exceptions are [`SaveError::StillFrozen`],
/// [`SaveError::LeftOver`] and [`SaveError::InterruptedTwice`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The checks found a reason before the guest was touched.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// The host's pages have another size.
    #[error(transparent)]
    PageSize(#[from] PageSizeError),
    /// Whoever tracks the guest's writes for a reset did not let go of its memory.
    #[error(transparent)]
    Tracked(#[from] RunsError),
    /// libvirt failed, whose domain the guest is.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// QEMU's control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The machine could not be looked at.
    #[error(transparent)]
    Vm(#[from] GuestError),
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The migration stream could not be understood.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The socket for the stream failed.
    #[error("making a socket for the migration stream failed: {0}")]
    Socket(std::io::Error),
    /// A thread could not be started.
    #[error("starting a thread failed: {0}")]
    Thread(std::io::Error),
    /// Memory that was captured could not be kept for a fork.
    #[error("keeping the guest's memory for its clones failed: {0}")]
    Captured(std::io::Error),
    /// Nobody can follow the save.
    #[error(
        "the socket by which the save of {} is followed can't be made ({source}): is that image \
         being saved already?", .image.display()
    )]
    Followers {
        /// The image.
        image: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Who follows the save would use files that are written to again.
    #[error(
        "a save whose disks are copied can't be followed, since the guest goes back to the files \
         that who follows would read: choose `DiskChoice::Overlay`, or revert once it is whole"
    )]
    FollowedCopies,
    /// QEMU ended the migration itself.
    #[error("QEMU's migration ended with status `{status}`{}", .reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default())]
    Migration {
        /// QEMU's migration status.
        status: String,
        /// QEMU's reason.
        reason: Option<String>,
    },
    /// The disks could not be switched to overlays.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A disk could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The journal could not be kept.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The guest's agent could not freeze its file systems.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Somebody else has stopped the guest, or let it go, while the save was made ready.
    #[error(
        "the guest's state has become `{state}` while its save was being prepared, and not by us: \
         it is left as it is; save again"
    )]
    Meanwhile {
        /// The state, in QEMU's words.
        state: String,
    },
    /// A device was plugged in or removed while the save was made ready.
    #[error(
        "a device was plugged in or removed while the save was being prepared: the guest is left \
         as it is; save again"
    )]
    DevicesChanged,
    /// QEMU took too long to write-protect the guest's memory, the guest standing still.
    #[error("QEMU did not get to sending memory within {0:?}, while the guest stood still")]
    Held(Duration),
    /// The image is whole, but the guest could not be thawed.
    #[error(
        "the image is whole, but the guest's file systems may still be frozen ({0}): \
         `recover()` of this image tries again to thaw them"
    )]
    StillFrozen(AgentError),
    /// The save failed, and not all that it had changed could be undone.
    #[error("{cause}; and {}", .left.iter().map(LeftOver::to_string).collect::<Vec<_>>().join("; "))]
    LeftOver {
        /// What failed.
        cause: Box<SaveError>,
        /// What that is, and what to do about it.
        left: Vec<LeftOver>,
    },
    /// The cause of a [`SaveError::LeftOver`] that is found by [`recover`](super::recover).
    #[error("an earlier save was killed, or could not undo all that it had done")]
    Killed,
    /// It can't be told whether a save that was killed had come to its end.
    #[error(
        "a save of {} was killed, and it can't be told whether it had come to its end, so nothing \
         was touched: {source}; mend that and recover again, or move the file away first if it is \
         surely not the image", .image.display()
    )]
    Unclear {
        /// The image.
        image: PathBuf,
        /// Why it can't be looked at.
        source: ImageError,
    },
    /// QEMU has left its memory write-protected, and that can't be mended.
    #[error(
        "QEMU has left the guest's memory write-protected, and its userfaultfd can't be used \
         ({0}): run this as root, or as the user of QEMU with the right to trace it (ptrace(2))"
    )]
    Protected(std::io::Error),
    /// The QMP socket given to recover a save is that of another QEMU.
    #[error("the save that was killed was of the guest in process {pid}: give its QMP socket")]
    OtherQemu {
        /// That process.
        pid: i32,
    },
    /// Interrupted before the image was whole.
    #[error("interrupted: the guest runs on, and no image was written")]
    Interrupted,
    /// Interrupted a second time, before QEMU had let go of the guest's memory.
    #[error(
        "interrupted twice: no image was written, and the guest may hang, since QEMU had not let \
         go of its memory yet: `recover()` of this image lets it go, and undoes \
         what the save has changed"
    )]
    InterruptedTwice,
}

impl SaveError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use SaveError::*;
        match self {
            Check(error) => error.kind(),
            PageSize(error) => error.kind(),
            Tracked(error) => error.kind(),
            Libvirt(error) => error.kind(),
            Qmp(error) => error.kind(),
            Vm(error) => error.kind(),
            Image(error) => error.kind(),
            Wire(error) => error.kind(),
            Overlay(error) => error.kind(),
            Copy(error) => error.kind(),
            Journal(error) => error.kind(),
            Agent(error) => error.kind(),
            Socket(error) | Thread(error) | Captured(error) => ErrorKind::of_io(error),
            Followers { source, .. } => ErrorKind::of_io(source),
            FollowedCopies => ErrorKind::OptionsInvalid,
            Migration { .. } => ErrorKind::QemuFailed,
            Meanwhile { .. } | DevicesChanged => ErrorKind::GuestChanged,
            Held(_) => ErrorKind::QemuTimeout,
            StillFrozen(_) => ErrorKind::StillFrozen,
            // Where the cause was damage or an interrupt, what is left over comes first.
            LeftOver { .. } | InterruptedTwice => ErrorKind::LeftOver,
            Killed | Unclear { .. } => ErrorKind::SaveUnfinished,
            Protected(_) => ErrorKind::PermissionDenied,
            OtherQemu { .. } => ErrorKind::NotQemu,
            Interrupted => ErrorKind::Interrupted,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use SaveError::*;
        match self {
            Check(error) => error.details(),
            Libvirt(error) => error.details(),
            Qmp(error) => error.details(),
            Vm(error) => error.details(),
            Image(error) => error.details(),
            Overlay(error) => error.details(),
            Copy(error) => error.details(),
            Journal(error) => error.details(),
            Agent(error) | StillFrozen(error) => error.details(),
            LeftOver { cause, .. } => cause.details(),
            Unclear { image, .. } | Followers { image, .. } => {
                Details::new(&self.to_string(), Some(image), None)
            }
            OtherQemu { pid } => Details::new(&self.to_string(), None::<PathBuf>, Some(*pid)),
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}
