//! Why a disk could not be copied.

use std::io;
use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};

/// Why a disk of the snapshot could not be copied. The guest writes to its own files again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// `qemu-img` can't be used.
    #[error(
        "`qemu-img`, which copies disks, can't be run: {0}; install it (in Debian the package \
         qemu-utils), or save with `DiskChoice::Overlay`"
    )]
    NoTool(io::Error),
    /// The file system can't share blocks between files.
    #[error(
        "{} can't be cloned ({source}): that takes a file system such as btrfs or XFS with reflinks; \
         save with `DiskChoice::Copy` instead", .file.display()
    )]
    NoReflink {
        /// The disk's file.
        file: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The copy's file can't be made or written.
    #[error("the copy {} of disk {disk} can't be written: {source}", .path.display())]
    Write {
        /// The copy.
        path: PathBuf,
        /// The disk.
        disk: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// `qemu-img` failed.
    #[error("copying disk {disk} to {} failed: {says}", .path.display())]
    Failed {
        /// The copy.
        path: PathBuf,
        /// The disk.
        disk: String,
        /// The tool's words.
        says: String,
    },
    /// The overlays in which the guest went on could not all be committed back into its disks.
    #[error("the disks are copied, but the guest can't be put back on its own files")]
    NotCommitted,
}

impl CopyError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            CopyError::NoTool(_) | CopyError::NoReflink { .. } => ErrorKind::HostUnsupported,
            CopyError::Write { source, .. } => ErrorKind::of_io(source),
            CopyError::Failed { says, .. } if says.contains("No space left") => ErrorKind::NoSpace,
            CopyError::Failed { .. } => ErrorKind::Io,
            CopyError::NotCommitted => ErrorKind::QemuFailed,
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            CopyError::NoReflink { file, .. } => Some(file),
            CopyError::Write { path, .. } | CopyError::Failed { path, .. } => Some(path),
            CopyError::NoTool(_) | CopyError::NotCommitted => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}
