//! The userfaultfd calls that snapback makes (userfaultfd(2), ioctl_userfaultfd(2)),
//! with all their partial results.
//!
//! The kernel's own definitions come from `linux-raw-sys`, so that building needs
//! neither kernel headers nor libclang.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use linux_raw_sys::general as sys;
use nix::errno::Errno;

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
    /// The memory's layout is changing: nothing is installed until the event that tells
    /// of it has been read.
    #[error("the memory at {address:#x} can't be filled while its layout is changing")]
    Changing {
        /// The address that was to be filled.
        address: u64,
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

/// Features of userfaultfd (`UFFD_FEATURE_*`).
pub mod feature {
    use linux_raw_sys::general as sys;

    /// Write faults on protected memory are told.
    pub const WRITE_PROTECT: u64 = sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
    /// `madvise(MADV_DONTNEED)` and its like are told.
    pub const EVENT_REMOVE: u64 = sys::UFFD_FEATURE_EVENT_REMOVE as u64;
    /// `munmap` is told.
    pub const EVENT_UNMAP: u64 = sys::UFFD_FEATURE_EVENT_UNMAP as u64;
    /// The features by which a change of the memory's layout is told.
    pub(super) const LAYOUT: u64 = EVENT_REMOVE | EVENT_UNMAP;
}

mod ioctl {
    use linux_raw_sys::general as sys;
    use linux_raw_sys::ioctl as numbers;

    nix::ioctl_readwrite!(api, sys::UFFDIO, sys::_UFFDIO_API, sys::uffdio_api);
    nix::ioctl_readwrite!(register, sys::UFFDIO, sys::_UFFDIO_REGISTER, sys::uffdio_register);
    nix::ioctl_readwrite!(copy, sys::UFFDIO, sys::_UFFDIO_COPY, sys::uffdio_copy);
    nix::ioctl_readwrite!(zeropage, sys::UFFDIO, sys::_UFFDIO_ZEROPAGE, sys::uffdio_zeropage);
    // These are declared with _IOR although the kernel reads their argument.
    nix::ioctl_read!(wake, sys::UFFDIO, sys::_UFFDIO_WAKE, sys::uffdio_range);
    nix::ioctl_read!(unregister, sys::UFFDIO, sys::_UFFDIO_UNREGISTER, sys::uffdio_range);

    /// The number that the macros above make, held against the kernel headers' own.
    macro_rules! proven {
        ($make:ident, $number:expr, $argument:ty, $expected:expr) => {
            const _: () = assert!(
                nix::$make!(sys::UFFDIO, $number, std::mem::size_of::<$argument>())
                    == $expected as nix::libc::Ioctl
            );
        };
    }
    proven!(request_code_readwrite, sys::_UFFDIO_API, sys::uffdio_api, numbers::UFFDIO_API);
    proven!(
        request_code_readwrite,
        sys::_UFFDIO_REGISTER,
        sys::uffdio_register,
        numbers::UFFDIO_REGISTER
    );
    proven!(request_code_readwrite, sys::_UFFDIO_COPY, sys::uffdio_copy, numbers::UFFDIO_COPY);
    proven!(
        request_code_readwrite,
        sys::_UFFDIO_ZEROPAGE,
        sys::uffdio_zeropage,
        numbers::UFFDIO_ZEROPAGE
    );
    proven!(request_code_read, sys::_UFFDIO_WAKE, sys::uffdio_range, numbers::UFFDIO_WAKE);
    proven!(
        request_code_read,
        sys::_UFFDIO_UNREGISTER,
        sys::uffdio_range,
        numbers::UFFDIO_UNREGISTER
    );
}

/// How /proc/PID/fd names a userfaultfd. `/dev/userfaultfd`, from which newer QEMUs
/// make theirs, is named by its path.
const USERFAULTFD_LINK: &str = "anon_inode:[userfaultfd]";

/// What userfaultfd has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdEvent {
    /// A thread waits for the memory at this address.
    Fault {
        /// The address, rounded down to a page or not.
        address: u64,
    },
    /// Memory was given back (`madvise`): it reads as zeros from now on.
    Removed {
        /// First address.
        start: u64,
        /// Address behind the last.
        end: u64,
    },
    /// Memory was unmapped.
    Unmapped {
        /// First address.
        start: u64,
        /// Address behind the last.
        end: u64,
    },
    /// Something that needs no answer.
    Other,
}

/// Events that one read takes, at most.
pub const EVENTS_AT_ONCE: usize = 16;

/// Room for the events of one read.
pub struct EventBuffer {
    messages: [sys::uffd_msg; EVENTS_AT_ONCE],
    count: usize,
}

impl Default for EventBuffer {
    fn default() -> EventBuffer {
        // SAFETY: `uffd_msg` is a C struct of integers and unions of integers, for
        // which all zeros is a value.
        EventBuffer { messages: unsafe { std::mem::zeroed() }, count: 0 }
    }
}

impl EventBuffer {
    /// The events of the last read.
    pub fn events(&self) -> impl Iterator<Item = UffdEvent> + '_ {
        self.messages[..self.count].iter().map(|message| {
            let arg = message.arg;
            match u32::from(message.event) {
                sys::UFFD_EVENT_PAGEFAULT => {
                    // SAFETY: the kernel fills this member for this event; all
                    // members are integers, for which any bytes are a value.
                    let address = unsafe { arg.pagefault.address };
                    UffdEvent::Fault { address }
                }
                kind @ (sys::UFFD_EVENT_REMOVE | sys::UFFD_EVENT_UNMAP) => {
                    // SAFETY: as above.
                    let (start, end) = unsafe { (arg.remove.start, arg.remove.end) };
                    match kind {
                        sys::UFFD_EVENT_REMOVE => UffdEvent::Removed { start, end },
                        _ => UffdEvent::Unmapped { start, end },
                    }
                }
                _ => UffdEvent::Other,
            }
        })
    }
}

/// A userfaultfd, ours or one that another process made for its own memory.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// There if changes of the memory's layout are told. The kernel lets a change go on
    /// as soon as its event has been read; so who installs holds this shared, and who
    /// reads holds it alone until it has noted what changed. Otherwise old content could
    /// be installed in memory that has just been given back.
    layout: Option<RwLock<()>>,
}

impl Uffd {
    /// Makes a userfaultfd for this process's own memory and agrees with the kernel on
    /// `features` ([`feature`]).
    ///
    /// # Errors
    /// [`UffdError::Unavailable`] and [`UffdError::NoFeature`].
    pub fn create(features: u64) -> Result<Uffd, UffdError> {
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
            .map_err(|e| UffdError::NoFeature(e.into()))?;
        let layout = (features & feature::LAYOUT != 0).then(RwLock::default);
        Ok(Uffd { fd, layout })
    }

    /// A userfaultfd that somebody has made ready and given us a copy of. It must be one
    /// that tells of faults only, as QEMU's is (`ufd_check_and_apply` in QEMU's
    /// `migration/postcopy-ram.c` asks for no events; giving memory back is inhibited
    /// there while a postcopy comes in).
    pub fn from_fd(fd: OwnedFd) -> Uffd {
        Uffd { fd, layout: None }
    }

    /// Copies of all userfaultfds that another process has (pidfd_getfd(2)). What
    /// [`Uffd::from_fd`] says of them holds for these.
    ///
    /// # Errors
    /// When the process is gone or may not be traced (ptrace(2)).
    pub fn all_of(pid: i32) -> io::Result<Vec<Uffd>> {
        let copy = |fd| copy_fd(pid, fd).map(Uffd::from_fd);
        find_userfaultfds(pid)?.into_iter().map(copy).collect()
    }

    /// Whether changes of the memory's layout are told.
    pub fn tells_of_layout(&self) -> bool {
        self.layout.is_some()
    }

    /// Holds off [`Uffd::alone`]. Who installs memory decides what, and does it, under
    /// this guard. Nothing where changes of the layout aren't told.
    pub fn steady(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let layout = self.layout.as_ref()?;
        // The lock guards no data that a panic could leave half done.
        Some(layout.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until nobody installs memory, and keeps it so. Who reads events does so, and
    /// notes which memory was given back, under this guard. Nothing where changes of the
    /// layout aren't told.
    pub fn alone(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        let layout = self.layout.as_ref()?;
        Some(layout.write().unwrap_or_else(PoisonError::into_inner))
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
    pub unsafe fn register(&self, start: u64, len: u64) -> Result<(), UffdError> {
        let mut register = sys::uffdio_register {
            range: sys::uffdio_range { start, len },
            mode: u64::from(sys::UFFDIO_REGISTER_MODE_MISSING),
            ioctls: 0,
        };
        // SAFETY: reads and writes one `uffdio_register`; what registering means for the
        // range is the caller's promise.
        unsafe { ioctl::register(self.fd.as_raw_fd(), &raw mut register) }
            .map_err(|e| UffdError::Register { start, len, source: e.into() })?;
        Ok(())
    }

    /// Ends the registration of a range: nothing waits there any more, and nothing is
    /// write-protected. Whoever waits is woken.
    ///
    /// # Errors
    /// When the range is not one of memory that can be registered.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = sys::uffdio_range { start, len };
        // SAFETY: reads one `uffdio_range`. Memory keeps what it holds.
        unsafe { ioctl::unregister(self.fd.as_raw_fd(), &raw mut range) }?;
        // The kernel does that by itself only where missing pages were waited for.
        // SAFETY: as above.
        unsafe { ioctl::wake(self.fd.as_raw_fd(), &raw mut range) }?;
        Ok(())
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
    /// [`UffdError::Gone`], [`UffdError::Changing`] and [`UffdError::Call`]. Some of the
    /// pages may be in place then.
    pub unsafe fn copy(&self, address: u64, bytes: &[u8], page_size: u64) -> Result<(), UffdError> {
        self.fill("copy pages", address, bytes.len() as u64, page_size, |done| {
            let mut copy = sys::uffdio_copy {
                dst: address + done,
                src: bytes[done as usize..].as_ptr() as u64,
                len: bytes.len() as u64 - done,
                mode: 0,
                copy: 0,
            };
            // SAFETY: reads and writes one `uffdio_copy`; `src` and `len` describe the
            // rest of `bytes`; the destination is the caller's promise.
            let result = unsafe { ioctl::copy(self.fd.as_raw_fd(), &raw mut copy) };
            (result, copy.copy)
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
            let mut zero = sys::uffdio_zeropage {
                range: sys::uffdio_range { start: address + done, len: len - done },
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: reads and writes one `uffdio_zeropage`; the destination is the
            // caller's promise.
            let result = unsafe { ioctl::zeropage(self.fd.as_raw_fd(), &raw mut zero) };
            (result, zero.zeropage)
        })
    }

    /// Repeats a call until all of `len` bytes are there. `call` is given the bytes done
    /// and returns the call's result and what it left in its last field: the bytes that
    /// it has done, which may be positive although it failed.
    fn fill(
        &self,
        what: &'static str,
        address: u64,
        len: u64,
        page_size: u64,
        mut call: impl FnMut(u64) -> (nix::Result<i32>, i64),
    ) -> Result<(), UffdError> {
        let mut done = 0;
        let mut looked_again = false;
        while done < len {
            let (result, filled) = call(done);
            done += u64::try_from(filled).unwrap_or(0);
            let at = address + done;
            match result {
                Ok(_) | Err(Errno::EINTR) => {}
                // Short, because the next page is there or the mapping is changing.
                Err(Errno::EAGAIN) if filled > 0 => {}
                Err(Errno::EAGAIN) if self.layout.is_some() => {
                    return Err(UffdError::Changing { address: at });
                }
                Err(Errno::EAGAIN) => std::thread::yield_now(),
                // Unmapped after the kernel's check for a change, perhaps: it then says
                // EAGAIN now.
                Err(Errno::ENOENT) if self.layout.is_some() && !looked_again => {
                    looked_again = true;
                }
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
        let mut range = sys::uffdio_range { start, len };
        // SAFETY: reads one `uffdio_range`; waking changes no memory.
        unsafe { ioctl::wake(self.fd.as_raw_fd(), &raw mut range) }.map_err(|e| {
            UffdError::Call { what: "wake a waiting thread", address: start, source: e.into() }
        })?;
        Ok(())
    }

    /// Takes the events that are there; false when there are none. Never waits where
    /// the descriptor is non-blocking, as ours and QEMU's are. Where changes of the layout
    /// are told, see [`Uffd::alone`].
    ///
    /// # Errors
    /// [`UffdError::Call`].
    pub fn read(&self, buffer: &mut EventBuffer) -> Result<bool, UffdError> {
        const MESSAGE_BYTES: usize = std::mem::size_of::<sys::uffd_msg>();
        buffer.count = 0;
        // SAFETY: the buffer is writable and as long as is said; any bytes are a value of
        // its integers and unions of integers.
        let read = unsafe {
            libc::read(
                self.fd.as_raw_fd(),
                buffer.messages.as_mut_ptr().cast(),
                MESSAGE_BYTES * EVENTS_AT_ONCE,
            )
        };
        match Errno::result(read) {
            Ok(bytes) => {
                buffer.count = bytes as usize / MESSAGE_BYTES;
                Ok(buffer.count > 0)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Err(errno) => {
                Err(UffdError::Call { what: "read events", address: 0, source: errno.into() })
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Asks whether this host lets us write-protect memory by userfaultfd, as QEMU's
/// `background-snapshot` does.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn write_protect_supported() -> Result<(), UffdError> {
    Uffd::create(feature::WRITE_PROTECT).map(drop)
}

/// The numbers of the userfaultfds that a process has.
fn find_userfaultfds(pid: i32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        match fs::read_link(entry.path()) {
            Ok(link) if link.as_os_str() == USERFAULTFD_LINK => {
                found.extend(entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
            }
            // Root may list them even where it may not trace the process.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            // A descriptor may be closed between the listing and the look.
            _ => {}
        }
    }
    Ok(found)
}

/// A process by descriptor (pidfd_open(2)), which is close-on-exec.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers, gives a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new, open, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A copy of another process's descriptor (pidfd_getfd(2)).
fn copy_fd(pid: i32, fd: i32) -> io::Result<OwnedFd> {
    let pidfd = pidfd_open(pid)?;
    // SAFETY: pidfd_getfd(2) takes numbers only.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as i32) })
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_host_can_write_protect() {
        super::write_protect_supported().unwrap();
    }
}
