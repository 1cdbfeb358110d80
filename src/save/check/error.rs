//! Why a guest can't be saved.

use std::path::PathBuf;

use crate::guest::GuestError;
use crate::kind::{Details, ErrorKind};

/// The oldest QEMU that is known to work, as major and minor version.
pub(super) const OLDEST_QEMU: (u32, u32) = (7, 2);

/// Why a snapshot can't be taken. The guest has not been touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// QEMU is too old.
    #[error("QEMU {found} is too old: an instant save needs {}.{} or later", OLDEST_QEMU.0, OLDEST_QEMU.1)]
    TooOld {
        /// QEMU's version.
        found: String,
    },
    /// The guest is in a state in which it can't be saved.
    #[error("the guest is in state `{state}`: {hint}")]
    State {
        /// QEMU's run state.
        state: String,
        /// What to do.
        hint: &'static str,
    },
    /// Another migration is under way.
    #[error(
        "a migration is under way in this QEMU (status `{0}`): wait until it has ended, or cancel it"
    )]
    Migrating(String),
    /// A reverted guest still waits for memory.
    #[error(
        "the guest was reverted and its memory is not complete yet (status `{0}`): save it when it \
         is, or without `SaveOptions::no_wait`"
    )]
    Incomplete(String),
    /// A device or a setting forbids migration.
    #[error("QEMU can't save this guest: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// Something in the guest rules out a background snapshot.
    #[error("this guest can't be saved while it runs: {}", .0.iter().map(Obstacle::to_string).collect::<Vec<_>>().join("; "))]
    Obstacles(Vec<Obstacle>),
    /// QEMU has no `background-snapshot` or refuses it.
    #[error("QEMU refuses a background snapshot: {refusal}{}", .lack.as_ref().map(|l| format!("; {l}")).unwrap_or_default())]
    NoBackgroundSnapshot {
        /// QEMU's words.
        refusal: String,
        /// What QEMU lacks on this host, as far as we can see.
        lack: Option<String>,
    },
    /// QEMU's process can't be seen.
    #[error(
        "the process behind the QMP socket can't be seen from here (it lives in another PID \
         namespace): run snapback where QEMU's process is visible"
    )]
    Unseen,
    /// A writable disk can't be frozen.
    #[error(
        "disk {disk} can't be captured: {problem}; detach it, leave it out with \
         `SaveOptions::exclude_disks`, or save memory alone with `DiskChoice::None`"
    )]
    Disk {
        /// The disk.
        disk: String,
        /// Why not.
        problem: String,
    },
    /// A revert would be refused because of a disk.
    #[error(
        "a snapshot would be taken that can't be reverted: {problem}; leave the disk out with \
         `SaveOptions::exclude_disks`, save memory alone with `DiskChoice::None`, or name it in \
         `SaveOptions::allow_missing_devices` to save it all the same"
    )]
    Irrevertible {
        /// What the revert would say.
        problem: GuestError,
    },
    /// A disk was to be left out that is not there.
    #[error(
        "`SaveOptions::exclude_disks`: no disk is called {name}; there are: {}", .disks.join(", ")
    )]
    NoSuchDisk {
        /// The name that was given.
        name: String,
        /// The writable disks.
        disks: Vec<String>,
    },
    /// The guest could not be reset inside its QEMU, which was asked for.
    #[error(
        "the guest could not be reset inside its QEMU: {0}; save it without \
         `SaveOptions::resettable`"
    )]
    NotResettable(String),
    /// There is not enough room.
    #[error(
        "too little room for {what} in `{directory}`: {free} MiB free, about {needed} MiB needed; \
         free some, or choose another directory{hint}"
    )]
    Room {
        /// What needs it.
        what: &'static str,
        /// The directory.
        directory: PathBuf,
        /// MiB that are free.
        free: u64,
        /// MiB that may be needed.
        needed: u64,
        /// What else helps.
        hint: &'static str,
    },
    /// A directory can't be asked for its room.
    #[error("the directory `{directory}` can't be used: {source}")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
}

impl CheckError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            CheckError::TooOld { .. } => ErrorKind::QemuTooOld,
            CheckError::State { .. } => ErrorKind::GuestState,
            CheckError::Migrating(_) => ErrorKind::MigrationActive,
            CheckError::Incomplete(_) => ErrorKind::MemoryIncomplete,
            CheckError::Blocked(_) | CheckError::Obstacles(_) => ErrorKind::GuestUnsupported,
            CheckError::NoBackgroundSnapshot { .. } => ErrorKind::UserfaultfdUnavailable,
            CheckError::Unseen => ErrorKind::NotQemu,
            CheckError::Disk { .. } => ErrorKind::DiskUnsupported,
            CheckError::Irrevertible { problem } => problem.kind(),
            CheckError::NoSuchDisk { .. } => ErrorKind::NoSuchDisk,
            CheckError::NotResettable(_) => ErrorKind::NotResettable,
            CheckError::Room { .. } => ErrorKind::NoSpace,
            CheckError::Directory { source, .. } => ErrorKind::of_io(source),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            CheckError::Room { directory, .. } | CheckError::Directory { directory, .. } => {
                Some(directory)
            }
            _ => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}

/// What rules out a background snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// A device whose state QEMU can't write.
    #[error("device {name} is of the type `{kind}`, which QEMU can't migrate; detach it")]
    Device {
        /// Its place in QEMU's object tree.
        name: String,
        /// Its type.
        kind: String,
    },
    /// A device that another process serves.
    #[error(
        "{0} is served by another process (vhost-user), whose writes to guest memory can't be \
         held up; detach it"
    )]
    VhostUser(String),
    /// A virtio-mem device: QEMU leaves memory that is not plugged into the guest out of a
    /// background snapshot, and from 8.1 on sends the device's state ahead of all memory.
    #[error(
        "device {0} (virtio-mem) has memory which QEMU leaves out of a background snapshot; \
         detach it"
    )]
    VirtioMem(String),
    /// Memory on a file that the kernel can't write-protect.
    #[error(
        "memory backend `{id}` lies on {}, a file whose pages Linux can't write-protect \
         (userfaultfd knows anonymous memory, memfd, tmpfs and hugetlbfs)", .path.display()
    )]
    Memory {
        /// The backend's id.
        id: String,
        /// The file.
        path: PathBuf,
    },
}
