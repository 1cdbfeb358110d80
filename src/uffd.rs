//! The userfaultfd calls that snapback makes (userfaultfd(2), ioctl_userfaultfd(2)).
//!
//! The kernel's own definitions come from `linux-raw-sys`, so that building needs
//! neither kernel headers nor libclang.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as sys;

/// What the host's userfaultfd can't do.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// There is no userfaultfd for this process.
    #[error(
        "this host gives no userfaultfd ({0}): run as root, or allow it with \
         `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    Unavailable(io::Error),
    /// The kernel can't protect memory against writing by userfaultfd.
    #[error(
        "this host's kernel can't write-protect memory by userfaultfd ({0}): Linux 5.7 or later \
         is needed"
    )]
    NoWriteProtect(io::Error),
}

mod ioctl {
    use linux_raw_sys::general as sys;
    use linux_raw_sys::ioctl::UFFDIO_API;

    nix::ioctl_readwrite!(api, sys::UFFDIO, sys::_UFFDIO_API, sys::uffdio_api);
    const _: () = assert!(
        nix::request_code_readwrite!(
            sys::UFFDIO,
            sys::_UFFDIO_API,
            std::mem::size_of::<sys::uffdio_api>()
        ) == UFFDIO_API as nix::libc::Ioctl
    );
}

/// Opens a userfaultfd and agrees with the kernel on `features`.
fn open(features: u64) -> Result<OwnedFd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd(2) takes flags only and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(UffdError::Unavailable(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = sys::uffdio_api { api: u64::from(sys::UFFD_API), features, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which lives until the
    // call returns; the descriptor is a userfaultfd.
    unsafe { ioctl::api(fd.as_raw_fd(), &raw mut api) }
        .map_err(|e| UffdError::NoWriteProtect(e.into()))?;
    Ok(fd)
}

/// Asks whether this host lets us write-protect memory by userfaultfd, as QEMU's
/// `background-snapshot` does.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn write_protect_supported() -> Result<(), UffdError> {
    open(u64::from(sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP)).map(drop)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_host_can_write_protect() {
        super::write_protect_supported().unwrap();
    }
}
