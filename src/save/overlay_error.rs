//! Why the disks of a guest could not be switched to overlays.

use std::io;
use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};
use crate::libvirt::LibvirtError;
use crate::qmp::QmpError;

/// Why disks could not be switched to overlays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// The file can't be made.
    #[error(
        "can't make the overlay {} of disk {disk}: {source}; `SaveOptions::overlay_dir` names \
         another directory", .path.display()
    )]
    Create {
        /// The overlay.
        path: PathBuf,
        /// The disk.
        disk: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Its path can't be told to QEMU.
    #[error(
        "the overlay's path {0:?} is not UTF-8: choose another directory with \
         `SaveOptions::overlay_dir`"
    )]
    Path(PathBuf),
    /// QEMU can't open it.
    #[error(
        "QEMU can't use the overlay {} of disk {disk}: {source}; it must be able to write in that \
         directory (`SaveOptions::overlay_dir` names another), or leave the disk out with \
         `SaveOptions::exclude_disks`", .path.display()
    )]
    Open {
        /// The overlay.
        path: PathBuf,
        /// The disk.
        disk: String,
        /// QEMU's words.
        source: QmpError,
    },
    /// QEMU can't put the overlays over the disks. All disks are as they were.
    #[error(
        "QEMU can't switch the disks to their overlays: {0}; `SaveOptions::exclude_disks` leaves \
         a disk out"
    )]
    Switch(QmpError),
    /// libvirt can't. All disks are as they were.
    #[error(
        "the disks can't be switched to their overlays: {0}; `SaveOptions::exclude_disks` leaves \
         a disk out"
    )]
    Libvirt(LibvirtError),
}

impl OverlayError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            OverlayError::Create { source, .. } => ErrorKind::of_io(source),
            OverlayError::Path(_) => ErrorKind::OptionsInvalid,
            OverlayError::Open { source, .. } | OverlayError::Switch(source) => source.kind(),
            OverlayError::Libvirt(error) => error.kind(),
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        let path = match self {
            OverlayError::Create { path, .. }
            | OverlayError::Path(path)
            | OverlayError::Open { path, .. } => Some(path),
            OverlayError::Switch(_) | OverlayError::Libvirt(_) => None,
        };
        Details::new(&self.to_string(), path, None)
    }
}
