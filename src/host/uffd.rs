//! userfaultfd (userfaultfd(2)) by the crate of that name, with what it leaves to its users:
//! a call that did a part is repeated for the rest, and a page that is there already is left
//! alone.
//!
//! Two things are ours, since the crate lacks them: `zeropage`, whose partial results it
//! drops, and `by_system_call`, for hosts on which `/dev/userfaultfd` is not for us.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use linux_raw_sys::general as sys;
use nix::errno::Errno;
use userfaultfd::{Error, Event, EventBuffer, FaultKind, FeatureFlags, RegisterMode, UffdBuilder};

use super::pidfd::Pidfd;
use super::procfs;

use std::path::PathBuf;

use crate::kind::{Details, ErrorKind};

/// What the host's userfaultfd can't do.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// There is no userfaultfd for this process.
    #[error(
        "this host gives no userfaultfd ({0}): run as root, or allow it with \
         `sysctl vm.unprivileged_userfaultfd=1`"
    )]
    Unavailable(io::Error),
    /// The kernel lacks a feature that was asked for.
    #[error(
        "this host's kernel lacks a feature of userfaultfd ({0}): write-protecting memory needs \
         Linux 5.7 or later"
    )]
    NoFeature(io::Error),
    /// Memory could not be registered.
    #[error("memory at {start:#x}, {len} bytes, can't be registered with userfaultfd: {source}")]
    Register {
        /// Its address.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The process whose memory it is, or the mapping, is gone.
    #[error("the memory at {address:#x} is gone with its process ({source})")]
    Gone {
        /// The address that was to be filled.
        address: u64,
        /// ENOENT or ESRCH.
        source: io::Error,
    },
    /// Something else.
    #[error("userfaultfd can't {what} at {address:#x}: {source}")]
    Call {
        /// What was being done.
        what: &'static str,
        /// Where.
        address: u64,
        /// What the system said.
        source: io::Error,
    },
}

impl UffdError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            UffdError::Unavailable(_) | UffdError::NoFeature(_) => {
                ErrorKind::UserfaultfdUnavailable
            }
            UffdError::Gone { .. } => ErrorKind::QemuEnded,
            UffdError::Register { source, .. } | UffdError::Call { source, .. } => {
                ErrorKind::of_io(source)
            }
        }
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<PathBuf>, None)
    }
}
/// The device that gives userfaultfds.
pub const DEVICE: &str = "/dev/userfaultfd";

/// How /proc/PID/fd names a userfaultfd. `/dev/userfaultfd`, from which newer QEMUs
/// make theirs, is named by its path.
const USERFAULTFD_LINK: &str = "anon_inode:[userfaultfd]";

/// Faults that one read takes, at most.
pub const FAULTS_AT_ONCE: usize = 16;

/// Room for the faults of one read.
pub struct FaultBuffer(EventBuffer);

impl Default for FaultBuffer {
    fn default() -> FaultBuffer {
        FaultBuffer(EventBuffer::new(FAULTS_AT_ONCE))
    }
}

/// A userfaultfd, ours or one that another process made for its own memory.
///
/// It tells of faults only: neither ours nor QEMU's asks for events that tell of a change of
/// the memory's layout (`ufd_check_and_apply` in QEMU's `migration/postcopy-ram.c`), so
/// nothing needs to be held back while a page is installed. QEMU gives no memory back while
/// a postcopy migration comes in (`ram_block_discard_disable`, `virtio_balloon_inhibited`).
#[derive(Debug)]
pub struct Uffd(userfaultfd::Uffd);

impl Uffd {
    /// Makes a userfaultfd for missing pages of this process's own memory. It is
    /// non-blocking and close-on-exec.
    ///
    /// # Errors
    /// [`UffdError::Unavailable`].
    #[cfg(any(test, feature = "internals"))]
    pub fn create() -> Result<Uffd, UffdError> {
        create(FeatureFlags::empty()).map(Uffd)
    }

    /// Adopts a userfaultfd that another process has made ready, as QEMU does. `fd` must be
    /// one, and be non-blocking as QEMU's is.
    pub fn from_fd(fd: OwnedFd) -> Uffd {
        // SAFETY: the descriptor is open and ours alone; `into_raw_fd` gives it away.
        Uffd(unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) })
    }

    /// Copies of all userfaultfds that another process has (pidfd_getfd(2)).
    ///
    /// # Errors
    /// When the process is gone or may not be traced (ptrace(2)).
    pub fn all_of(pid: i32) -> io::Result<Vec<Uffd>> {
        let numbers = find_userfaultfds(pid)?;
        let process = Pidfd::open(pid)?;
        let copy = |fd| process.copy_descriptor(fd).map(Uffd::from_fd);
        numbers.into_iter().map(copy).collect()
    }

    /// How many userfaultfds another process has.
    ///
    /// # Errors
    /// As [`Uffd::all_of`].
    pub fn number_of(pid: i32) -> io::Result<usize> {
        find_userfaultfds(pid).map(|found| found.len())
    }

    /// Registers memory of this process: touching what is missing there waits until
    /// it is installed.
    ///
    /// # Safety
    /// The range must be a mapping of this process's that the caller owns, and stay one
    /// for as long as it is registered; nothing may read it in the meantime that must
    /// not wait for whoever installs it.
    ///
    /// # Errors
    /// [`UffdError::Register`].
    #[cfg(any(test, feature = "internals"))]
    pub unsafe fn register(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let registered =
            self.0.register_with_mode(start as *mut _, len as usize, RegisterMode::MISSING);
        let failed = |error| UffdError::Register { start, len, source: io_error(error) };
        registered.map(drop).map_err(failed)
    }

    /// Registers memory of the process whose userfaultfd this is, be it another: touching what
    /// is missing there waits until it is installed, and writing to what is write-protected until
    /// that is undone. A range of which some is registered already is registered anew.
    ///
    /// The process need not have asked for it when it made its userfaultfd: the kernel tells
    /// of such faults in any case (`userfault_msg` in Linux's `fs/userfaultfd.c`).
    ///
    /// # Errors
    /// [`UffdError::Register`]: EBUSY where another userfaultfd holds some of it, EINVAL where the
    /// kernel can't write-protect memory of this kind (hugetlbfs and shared memory before Linux
    /// 5.19).
    pub fn register_for_tracking(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let modes = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
        let registered = self.0.register_with_mode(start as *mut _, len as usize, modes);
        let failed = |error| UffdError::Register { start, len, source: io_error(error) };
        registered.map(drop).map_err(failed)
    }

    /// Write-protects what is in memory of a range: whoever writes there waits. What is missing is
    /// not protected, except in shared memory.
    ///
    /// # Errors
    /// [`UffdError::Gone`] and [`UffdError::Call`].
    pub fn protect(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let failed = |error| protection_error("write-protect memory", start, error);
        again(|| self.0.write_protect(start as *mut _, len as usize)).map_err(failed)
    }

    /// Undoes that, and wakes whoever waits to write there.
    ///
    /// # Errors
    /// As for [`Uffd::protect`].
    pub fn unprotect(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let failed = |error| protection_error("let memory be written", start, error);
        let unprotect = || self.0.remove_write_protection(start as *mut _, len as usize, true);
        again(unprotect).map_err(failed)
    }

    /// Ends the registration of a range: nothing waits there any more, and nothing is
    /// write-protected. Whoever waits is woken.
    ///
    /// # Errors
    /// When the range is not one of memory that can be registered.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.0.unregister(start as *mut _, len as usize).map_err(io_error)?;
        // The kernel wakes by itself only where missing pages were waited for.
        self.0.wake(start as *mut _, len as usize).map_err(io_error)
    }

    /// Installs `bytes` at `address` and wakes whoever waits there. Pages that are
    /// there already are left as they are, and their waiters woken; `page_size` is the
    /// size in bytes of the pages that back the memory.
    ///
    /// # Safety
    /// `address` must be where the memory lies that shall hold `bytes`: nothing is
    /// overwritten, but what is missing there becomes these bytes.
    ///
    /// # Errors
    /// [`UffdError::Gone`] and [`UffdError::Call`]. Some of the pages may be in place then.
    pub unsafe fn copy(&self, address: u64, bytes: &[u8], page_size: u64) -> Result<(), UffdError> {
        self.fill("copy pages", address, bytes.len() as u64, page_size, |done| {
            let rest = &bytes[done as usize..];
            let (source, target) = (rest.as_ptr().cast(), (address + done) as *mut _);
            // SAFETY: the source is `rest`, as long as is said; the destination is the
            // caller's promise.
            match unsafe { self.0.copy(source, target, rest.len(), true) } {
                Ok(copied) => (copied as u64, Ok(())),
                // The kernel's count, which is an error's negative number if nothing was
                // copied.
                Err(Error::PartiallyCopied(count)) => {
                    ((count as isize).max(0) as u64, Err(Errno::EAGAIN))
                }
                Err(error) => (0, Err(errno(&error))),
            }
        })
    }

    /// Installs `len` bytes of zeros at `address`, as [`Uffd::copy`] does. Anonymous
    /// memory takes the shared zero page; pages of hugetlbfs can't be had this way.
    ///
    /// # Safety
    /// As for [`Uffd::copy`].
    ///
    /// # Errors
    /// As for [`Uffd::copy`].
    pub unsafe fn zero(&self, address: u64, len: u64, page_size: u64) -> Result<(), UffdError> {
        self.fill("install zeros", address, len, page_size, |done| {
            // SAFETY: the destination is the caller's promise.
            unsafe { zeropage(self.as_fd(), address + done, len - done) }
        })
    }

    /// Repeats a call until all of `len` bytes are there. `call` is given the bytes done; it
    /// returns how many more it has done, which may be some although it failed.
    fn fill(
        &self,
        what: &'static str,
        address: u64,
        len: u64,
        page_size: u64,
        mut call: impl FnMut(u64) -> (u64, Result<(), Errno>),
    ) -> Result<(), UffdError> {
        let mut done = 0;
        while done < len {
            let (filled, result) = call(done);
            done += filled;
            let at = address + done;
            match result {
                Ok(()) | Err(Errno::EINTR) => {}
                // Short: the next call tells why.
                Err(Errno::EAGAIN) if filled > 0 => {}
                Err(Errno::EAGAIN) => std::thread::yield_now(),
                Err(Errno::EEXIST) => {
                    self.wake(at, page_size)?;
                    done += page_size;
                }
                Err(errno @ (Errno::ENOENT | Errno::ESRCH)) => {
                    return Err(UffdError::Gone { address: at, source: errno.into() });
                }
                Err(errno) => {
                    return Err(UffdError::Call { what, address: at, source: errno.into() });
                }
            }
        }
        Ok(())
    }

    /// Wakes whoever waits for memory in the range, to look again.
    ///
    /// # Errors
    /// [`UffdError::Call`].
    pub fn wake(&self, start: u64, len: u64) -> Result<(), UffdError> {
        self.0.wake(start as *mut _, len as usize).map_err(|error| UffdError::Call {
            what: "wake a waiting thread",
            address: start,
            source: io_error(error),
        })
    }

    /// How many threads wait for it now, their faults read by somebody or not (`userfaultfd_show_fdinfo` in
    /// Linux's `fs/userfaultfd.c`). Nothing where the kernel does not tell.
    pub fn waiting(&self) -> Option<u64> {
        let path = format!("/proc/self/fdinfo/{}", self.as_fd().as_raw_fd());
        let info = std::fs::read_to_string(path).ok()?;
        info.lines().find_map(|line| line.strip_prefix("total:"))?.trim().parse().ok()
    }

    /// Takes the faults that are there. Never waits and allocates nothing. Events that are no faults
    /// are dropped.
    ///
    /// # Errors
    /// [`UffdError::Call`].
    pub fn read_faults<'a>(
        &self,
        buffer: &'a mut FaultBuffer,
    ) -> Result<impl Iterator<Item = Fault> + use<'a>, UffdError> {
        let events = match self.0.read_events(&mut buffer.0) {
            Ok(events) => Some(events),
            Err(error) if errno(&error) == Errno::EINTR => None,
            Err(error) => {
                let source = io_error(error);
                return Err(UffdError::Call { what: "read events", address: 0, source });
            }
        };
        let fault = |event| match event {
            Ok(Event::Pagefault { addr, kind, .. }) => {
                let protected = matches!(kind, FaultKind::WriteProtected);
                Some(Fault { address: addr as u64, protected })
            }
            _ => None,
        };
        Ok(events.into_iter().flatten().filter_map(fault))
    }
}

/// What a thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The address that it has touched, which need not be that of a page.
    pub address: u64,
    /// Whether it waits to write to a page that is write-protected; else for one that is missing.
    pub protected: bool,
}

/// Repeats a call that has been told to.
fn again(call: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
    loop {
        match call() {
            Err(error) if errno(&error) == Errno::EAGAIN => std::thread::yield_now(),
            done => return done,
        }
    }
}

fn protection_error(what: &'static str, address: u64, error: Error) -> UffdError {
    match errno(&error) {
        Errno::ESRCH => UffdError::Gone { address, source: io_error(error) },
        _ => UffdError::Call { what, address, source: io_error(error) },
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Asks whether this host lets us write-protect memory by userfaultfd, as QEMU's
/// `background-snapshot` does.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn write_protect_supported() -> Result<(), UffdError> {
    create(FeatureFlags::PAGEFAULT_FLAG_WP).map(drop)
}

/// A way to get a userfaultfd that catches the kernel's accesses as well, as QEMU needs it for
/// a postcopy migration and for a background snapshot (userfaultfd(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// userfaultfd(2), which `vm.unprivileged_userfaultfd` opens to everybody, and
    /// CAP_SYS_PTRACE to its owner.
    SystemCall,
    /// `/dev/userfaultfd` (Linux 6.1), which its permissions open.
    Device,
}

impl Door {
    /// Asks for a userfaultfd by this door, and gives it back.
    ///
    /// # Errors
    /// What the system says.
    pub fn knock(self) -> io::Result<()> {
        match self {
            Door::SystemCall => match by_system_call(FeatureFlags::empty()) {
                Ok(_) => Ok(()),
                Err(UffdError::Unavailable(error) | UffdError::NoFeature(error)) => Err(error),
                Err(error) => Err(io::Error::other(error)),
            },
            Door::Device => {
                let device = File::options().read(true).write(true).open(DEVICE)?;
                // SAFETY: USERFAULTFD_IOC_NEW takes flags only and touches no memory of ours.
                let fd = unsafe { ioctl::new(device.as_raw_fd(), libc::O_CLOEXEC as _) }?;
                // SAFETY: the kernel has just made this descriptor for us, and nobody else
                // has it.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
                Ok(())
            }
        }
    }
}

/// Makes a userfaultfd that catches the kernel's accesses as well, by the way that the host
/// allows: `/dev/userfaultfd`, or the system call.
fn create(features: FeatureFlags) -> Result<userfaultfd::Uffd, UffdError> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(false);
    match builder.require_features(features).create() {
        Ok(uffd) => Ok(uffd),
        Err(Error::OpenDevUserfaultfd(_)) => by_system_call(features),
        // Making one takes rights; it is the agreement on features that is invalid.
        Err(error) if errno(&error) == Errno::EINVAL => Err(UffdError::NoFeature(io_error(error))),
        Err(error) => Err(UffdError::Unavailable(io_error(error))),
    }
}

mod ioctl {
    use linux_raw_sys::general as sys;

    nix::ioctl_write_int_bad!(new, nix::request_code_none!(sys::UFFDIO, 0));
    nix::ioctl_readwrite!(api, sys::UFFDIO, sys::_UFFDIO_API, sys::uffdio_api);
    nix::ioctl_readwrite!(zeropage, sys::UFFDIO, sys::_UFFDIO_ZEROPAGE, sys::uffdio_zeropage);
}

/// Makes a userfaultfd by the system call. The crate does so only on a host that has no
/// `/dev/userfaultfd`; but where that is root's alone, `vm.unprivileged_userfaultfd` or
/// CAP_SYS_PTRACE may allow the call all the same.
fn by_system_call(features: FeatureFlags) -> Result<userfaultfd::Uffd, UffdError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd(2) takes flags only and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(UffdError::Unavailable(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
    let uffd = unsafe { userfaultfd::Uffd::from_raw_fd(fd as i32) };
    let features = features.bits();
    let mut api = sys::uffdio_api { api: u64::from(sys::UFFD_API), features, ioctls: 0 };
    // SAFETY: UFFDIO_API(2const) reads and writes one `uffdio_api`, which lives until the
    // call returns; the descriptor is a userfaultfd.
    unsafe { ioctl::api(uffd.as_raw_fd(), &raw mut api) }
        .map_err(|errno| UffdError::NoFeature(errno.into()))?;
    Ok(uffd)
}

/// Installs zeros (UFFDIO_ZEROPAGE(2const)). Returns the bytes done beside the result, which
/// is EAGAIN if they are not all: the crate drops their count then, and a run of zeros with
/// one page in it that is there already could not be gone on with.
///
/// # Safety
/// `address` must be where the memory lies that shall hold `len` bytes of zeros.
unsafe fn zeropage(uffd: BorrowedFd<'_>, address: u64, len: u64) -> (u64, Result<(), Errno>) {
    let range = sys::uffdio_range { start: address, len };
    let mut zero = sys::uffdio_zeropage { range, mode: 0, zeropage: 0 };
    // SAFETY: reads and writes one `uffdio_zeropage`, which lives until the call returns; the
    // destination is the caller's promise.
    let result = unsafe { ioctl::zeropage(uffd.as_raw_fd(), &raw mut zero) };
    (zero.zeropage.max(0) as u64, result.map(drop))
}

/// The system's error behind one of the crate's, which names no other where the kernel keeps
/// its promises.
fn errno(error: &Error) -> Errno {
    match error {
        Error::CopyFailed(errno) | Error::ZeropageFailed(errno) | Error::SystemError(errno) => {
            Errno::from_raw(*errno as i32)
        }
        Error::OpenDevUserfaultfd(source) => {
            Errno::from_raw(source.raw_os_error().unwrap_or(libc::EIO))
        }
        Error::PartiallyCopied(_) => Errno::EAGAIN,
        Error::IncompleteMsg { .. }
        | Error::ReadEof
        | Error::UnrecognizedEvent(_)
        | Error::UnsupportedIoctls(_) => Errno::EIO,
    }
}

fn io_error(error: Error) -> io::Error {
    errno(&error).into()
}

/// The numbers of the userfaultfds that a process has.
fn find_userfaultfds(pid: i32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for fd in procfs::descriptors(pid)? {
        match procfs::descriptor_link(pid, fd) {
            Ok(link) if link.as_os_str() == USERFAULTFD_LINK => found.push(fd),
            // Root may list them even where it may not trace the process.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            // A descriptor may be closed between the listing and the look.
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_can_write_protect() {
        write_protect_supported().unwrap();
    }

    #[test]
    fn each_door_is_asked_by_itself() {
        assert!(Door::SystemCall.knock().is_ok());
        assert_eq!(Door::Device.knock().is_ok(), File::open(DEVICE).is_ok());
    }

    #[test]
    fn the_system_call_alone_makes_one_as_well() {
        by_system_call(FeatureFlags::PAGEFAULT_FLAG_WP).unwrap();
        let error = by_system_call(FeatureFlags::from_bits_retain(1 << 63)).unwrap_err();
        assert!(matches!(error, UffdError::NoFeature(_)), "{error}");
        let error = create(FeatureFlags::from_bits_retain(1 << 63)).unwrap_err();
        assert!(matches!(error, UffdError::NoFeature(_)), "{error}");
    }
}
