//! Whether QEMU may have a userfaultfd on this host, and by which setting it may.

use crate::host::procfs::owner;
use crate::host::rights::{self, Lack};
use crate::host::uffd;
use crate::machine::QemuVersion;

/// Why the QEMU of this process and version gets no userfaultfd, which a postcopy migration
/// and a background snapshot need, as far as can be seen; nothing where it gets one.
pub fn userfaultfd_lack(pid: Option<i32>, version: &QemuVersion) -> Option<Lack> {
    let (user, _) = owner(pid?)?;
    let by_device = version.uses_userfaultfd_device();
    let mut lack = rights::userfaultfd_lack(user, by_device)?;
    if !by_device && uffd::Door::Device.knock().is_ok() {
        lack.why += &format!("; {} is open, but QEMU {version} doesn't use it", uffd::DEVICE);
    }
    Some(lack)
}
