//! Why a revert fails.

use std::path::PathBuf;
use std::process::ExitStatus;

use super::follow_error::FollowError;
use crate::agent::AgentError;
use crate::guest::GuestError;
use crate::host::PageSizeError;
use crate::image::ImageError;
use crate::kind::{Details, ErrorKind};
use crate::libvirt::{LaunchError, LibvirtError, PlanError};
use crate::memory::{MemoryError, WorkingSetError};
use crate::qmp::QmpError;
use crate::repository::RepositoryError;
use crate::reset::ResetError;
use crate::transport::TransportError;
use crate::transport::proof::AttachError;
use crate::transport::search::SearchError;
use crate::wire::WireError;

/// Why a revert failed. The QEMU that it started has been ended. Overlays of disks stay if
/// the guest has run; [`RevertEvent::Disk`](super::RevertEvent::Disk) has told where they are.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RevertError {
    /// The image can't be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A snapshot that is far away can't be opened again.
    #[error("the snapshot that the guest was brought back from can't be opened again: {0}")]
    Repository(Box<RepositoryError>),
    /// Disks of a snapshot that is far away can't be served.
    #[error("the disks of the snapshot can't be served to QEMU: {0}")]
    Disks(std::io::Error),
    /// The image is under way, and its save can't be followed.
    #[error(transparent)]
    Follow(Box<FollowError>),
    /// The host's pages have another size.
    #[error(transparent)]
    PageSize(#[from] PageSizeError),
    /// QEMU can't be started as recorded.
    #[error(transparent)]
    Vm(#[from] GuestError),
    /// The guest can't be reset inside its QEMU, or could not.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The image's domain can't be started as it was saved.
    #[error(transparent)]
    Domain(Box<PlanError>),
    /// libvirt does not start the domain, or run it.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// QEMU takes no postcopy migration, by which memory is brought while the guest runs.
    #[error(
        "QEMU takes no postcopy migration here ({refusal}){}; `Placement::Eager` needs none",
        .lack.as_ref().map(|lack| format!(": {lack}")).unwrap_or_default()
    )]
    NoPostcopy {
        /// QEMU's words.
        refusal: String,
        /// What it lacks on this host, and what gives it that, as far as we can see.
        lack: Option<String>,
    },
    /// QEMU's control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest's memory or device state could not be delivered.
    #[error("{error}{qemu}")]
    Postcopy {
        /// What failed.
        error: PostcopyError,
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
    /// A guest that was to be held in standby runs already.
    #[error(
        "QEMU ran the guest, which was to wait in standby: start QEMU with `-S` beside \
         `-incoming defer`"
    )]
    NotHeld,
    /// QEMU ended while it was given the guest.
    #[error("{error}{qemu}")]
    Died {
        /// How that was noticed.
        error: QmpError,
        /// What QEMU itself had to say.
        qemu: String,
    },
    /// A guest that was to be served again is served, or needs nothing.
    #[error(
        "QEMU's migration is `{status}`: only a guest whose page server has died can be taken up \
         again"
    )]
    NotInterrupted {
        /// The status of QEMU's migration; empty where there was none.
        status: String,
    },
    /// A guest that was to be served again has a server, or a keeper that starts one.
    #[error("process {by} serves this guest: there is nothing to take up")]
    Served {
        /// The server's process id.
        by: i32,
    },
    /// It is not known where QEMU's control socket is.
    #[error("process {pid} has no control socket on its command line: name it, by `Orphan::Qmp`")]
    NoControl {
        /// QEMU's process id.
        pid: i32,
    },
    /// A socket between us and QEMU failed.
    #[error("{what}: {source}")]
    Socket {
        /// What was being done.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The machine's clock can't go on from the moment, as [`Rtc::Keep`](super::Rtc::Keep)
    /// wants it.
    #[error("the machine's clock can't go on from the moment: {0}; `rtc` has to be `Now`")]
    Rtc(&'static str),
    /// The guest's agent can't be told what it was to be.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The image was to be checked, and is damaged.
    #[error("{0}; `snapback verify` says all that is wrong")]
    Damaged(String),
    /// The working set that was harvested can't be written.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetError),
    /// A guest that was to show its working set asked for nothing.
    #[error("the guest asked for no memory in that time: give it longer, or let it do something")]
    NothingDemanded,
    /// Cancelled before the guest's memory was complete.
    #[error("interrupted: {0}")]
    Interrupted(&'static str),
}

impl RevertError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use RevertError::*;
        match self {
            Image(error) => error.kind(),
            Follow(error) => error.kind(),
            Repository(error) => error.kind(),
            Disks(error) => ErrorKind::of_io(error),
            PageSize(error) => error.kind(),
            Vm(error) => error.kind(),
            Qmp(error) => error.kind(),
            WorkingSet(error) => error.kind(),
            Postcopy { error, .. } => error.kind(),
            NoPostcopy { .. } => ErrorKind::UserfaultfdUnavailable,
            NotRun { .. } => ErrorKind::QemuFailed,
            NotHeld | NoControl { .. } => ErrorKind::OptionsInvalid,
            NotInterrupted { .. } | Served { .. } => ErrorKind::GuestState,
            Died { .. } => ErrorKind::QemuEnded,
            Socket { source, .. } => match ErrorKind::of_io(source) {
                ErrorKind::NotFound => ErrorKind::QemuUnreachable,
                kind => kind,
            },
            Rtc(_) => ErrorKind::OptionsInvalid,
            Domain(error) => error.kind(),
            Agent(error) => error.kind(),
            Reset(error) => error.kind(),
            Libvirt(error) => error.kind(),
            Damaged(_) => ErrorKind::ImageDamaged,
            NothingDemanded => ErrorKind::NothingDemanded,
            Interrupted(_) => ErrorKind::Interrupted,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        use RevertError::*;
        match self {
            Image(error) => error.details(),
            Follow(error) => error.details(),
            Vm(error) => error.details(),
            Agent(error) => error.details(),
            Reset(error) => error.details(),
            Qmp(error) => error.details(),
            Libvirt(error) => error.details(),
            WorkingSet(error) => error.details(),
            Postcopy { error, .. } => error.details(),
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}

impl RevertError {
    /// Whether a reset was refused before anything was touched.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, RevertError::Reset(error) if error.is_refusal())
    }
}

impl From<FollowError> for RevertError {
    fn from(error: FollowError) -> RevertError {
        RevertError::Follow(Box::new(error))
    }
}

impl From<PlanError> for RevertError {
    fn from(error: PlanError) -> RevertError {
        match error {
            PlanError::Guest(error) => error.into(),
            error => RevertError::Domain(Box::new(error)),
        }
    }
}

impl From<LaunchError> for RevertError {
    fn from(error: LaunchError) -> RevertError {
        match error {
            LaunchError::Guest(error) => error.into(),
            LaunchError::Libvirt(error) => error.into(),
        }
    }
}

impl From<PostcopyError> for RevertError {
    fn from(error: PostcopyError) -> RevertError {
        RevertError::Postcopy { error, qemu: String::new() }
    }
}

impl RevertError {
    /// QEMU leaves the guest in this run state.
    pub(super) fn not_run(status: String) -> RevertError {
        RevertError::NotRun { status, qemu: String::new() }
    }

    /// Whether it means that QEMU has ended, or is about to.
    pub(super) fn is_end_of_qemu(&self) -> bool {
        use PostcopyError::{HungUp, Opening, Stream};
        matches!(
            self,
            RevertError::Postcopy {
                error: HungUp
                    | Opening(_)
                    | Stream(_)
                    | PostcopyError::Memory(MemoryError::Install {
                        source: TransportError::Gone(_),
                        ..
                    }),
                ..
            } | RevertError::Qmp(QmpError::Gone { .. })
        )
    }

    /// The same with how QEMU has ended and what it wrote to its standard error: only there does it
    /// tell why it ended a migration. Where we ended it, what it says there is not the reason.
    pub(super) fn with_end_of_qemu(self, status: Option<ExitStatus>, words: &str) -> RevertError {
        let ended = status.map(|status| format!("; QEMU ended ({status})")).unwrap_or_default();
        let qemu = match words {
            "" => ended,
            words => format!("{ended}; QEMU says: {words}"),
        };
        use PostcopyError::{HungUp, Memory, Opening, Refused, Stream};
        let ends = self.is_end_of_qemu();
        match self {
            RevertError::Postcopy {
                error: error @ (HungUp | Opening(_) | Refused(_) | Stream(_) | Memory(_)),
                ..
            } if ends || matches!(error, Refused(_)) => RevertError::Postcopy { error, qemu },
            RevertError::NotRun { status, .. } => RevertError::NotRun { status, qemu },
            RevertError::Qmp(error @ QmpError::Gone { .. }) if !qemu.is_empty() => {
                RevertError::Died { error, qemu }
            }
            error => error,
        }
    }
}

/// Why the source's side of a postcopy migration ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostcopyError {
    /// Memory could not be brought.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory that the image should hold can't be read.
    #[error("{error}{}", .guest_physical.map(physical).unwrap_or_default())]
    Unreadable {
        /// Which memory, and why.
        error: MemoryError,
        /// Its guest-physical address, where that is known.
        guest_physical: Option<u64>,
    },
    /// The return path could not be understood.
    #[error("QEMU's return path: {0}")]
    Wire(#[from] WireError),
    /// The opening could not be sent.
    #[error("QEMU closed the migration stream while it was given the device state ({0})")]
    Opening(std::io::Error),
    /// Pages can't be installed directly, though nothing else was asked for.
    #[error("memory can't be installed by userfaultfd: {0}")]
    Adopt(#[from] AttachError),
    /// Some blocks can't be installed directly, though nothing else was asked for.
    #[error("memory can't be installed by userfaultfd: these blocks were not found in QEMU: {0}")]
    Unproven(String),
    /// Memory can't be read from the image.
    #[error("the memory at offset {offset:#x} of block `{block}` can't be had: {source}")]
    Read {
        /// The block's name.
        block: String,
        /// Offset in the block, in bytes.
        offset: u64,
        /// What is wrong with the image.
        source: Box<ImageError>,
    },
    /// An ordinary stream could not be sent to its end.
    #[error("QEMU closed the migration stream before it had loaded all of the guest ({0})")]
    Stream(std::io::Error),
    /// QEMU hung up.
    #[error("QEMU closed the return path before its memory was complete")]
    HungUp,
    /// QEMU reported a failure.
    #[error("QEMU ended the migration with status {0}")]
    Refused(u32),
    /// The migration socket could not be shared between threads.
    #[error(
        "duplicating the descriptor of the migration socket failed: {0} (is the limit of open \
         files too low?)"
    )]
    Duplicate(std::io::Error),
    /// A thread could not be started.
    #[error("starting a thread failed: {0}")]
    Thread(std::io::Error),
    /// The state that a server has left can't be used.
    #[error("what the page server that died has left can't be used: {0}")]
    Inherited(std::io::Error),
    /// A server has died while it sent something that may be sent in parts.
    #[error("the page server died while it sent a huge page by QEMU's socket: nobody can go on")]
    Torn,
    /// Whether QEMU has taken in pages that a server had sent when it died can't be seen.
    #[error(
        "the page server died while it sent memory of block `{block}`, and whether QEMU has it \
         can't be seen{why}"
    )]
    Unsettled {
        /// The block's name.
        block: String,
        /// What stands in the way; empty or with a leading separator.
        why: String,
    },
    /// A guest's memory was not found in QEMU.
    #[error(transparent)]
    Search(#[from] SearchError),
    /// Memory that was installed directly can't be brought by the socket.
    #[error(
        "some of the guest's memory was put in place directly, and QEMU would take it a second time \
         by its socket: go on directly ({0})"
    )]
    NotBySocket(String),
    /// A thread of ours panicked.
    #[error(
        "the thread that was to {0} panicked: that is a bug of snapback, whose message is on \
         standard error"
    )]
    Panicked(&'static str),
}

impl PostcopyError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        use PostcopyError::*;
        match self {
            Memory(error) | Unreadable { error, .. } => kind_of_memory(error),
            Wire(error) => error.kind(),
            Read { source, .. } => source.kind(),
            Opening(_) | HungUp | Stream(_) => ErrorKind::QemuEnded,
            Adopt(error) => error.kind(),
            Unproven(_) => ErrorKind::UserfaultfdUnavailable,
            Refused(_) => ErrorKind::QemuFailed,
            Duplicate(error) | Thread(error) => ErrorKind::of_io(error),
            Inherited(_) | Torn | Unsettled { .. } => ErrorKind::ServerLost,
            Search(error) => error.kind(),
            NotBySocket(_) => ErrorKind::UserfaultfdUnavailable,
            Panicked(_) => ErrorKind::Internal,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        match self {
            PostcopyError::Memory(error) | PostcopyError::Unreadable { error, .. } => {
                error.details()
            }
            PostcopyError::Read { source, .. } => source.details(),
            _ => Details::new(&self.to_string(), None::<PathBuf>, None),
        }
    }
}

/// Words for a guest-physical address.
fn physical(address: u64) -> String {
    format!(" (the guest's physical address {address:#x})")
}

/// The kind of an error of memory whose source is an image.
fn kind_of_memory(error: &MemoryError) -> ErrorKind {
    let (MemoryError::Source { source, .. } | MemoryError::Reader(source)) = error else {
        return error.kind();
    };
    source.downcast_ref::<ImageError>().map_or(error.kind(), ImageError::kind)
}
