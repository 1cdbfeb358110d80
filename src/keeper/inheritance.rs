//! What a new server is given by the keeper that starts it: descriptors at agreed numbers.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::client::{Keeper, Successor};
use super::ledger::Ledger;
use super::protocol::Held;

/// The number of the first of the descriptors that a keeper holds; the others follow in the
/// order of [`Held::ALL`]. What a process opens by itself takes the lowest free number.
const FIRST: RawFd = 64;

/// The number of the new server's end of its connection with the keeper.
pub(super) const CONNECTION: RawFd = FIRST + Held::ALL.len() as RawFd;

/// The number at which the keeper holds a descriptor.
pub(super) fn number(held: Held) -> RawFd {
    FIRST + held as RawFd
}

/// What a server has left behind.
#[derive(Debug)]
#[non_exhaustive]
pub struct Inheritance {
    /// The state of the session.
    pub(crate) ledger: Ledger,
    /// The image.
    pub(crate) image: OwnedFd,
    /// A pidfd of QEMU.
    pub(crate) qemu: OwnedFd,
    /// Our end of QEMU's control socket; none where libvirt has it.
    pub(crate) control: Option<OwnedFd>,
    /// What QEMU's standard error goes to.
    pub(crate) output: OwnedFd,
    /// Our end of the migration stream.
    pub(crate) stream: OwnedFd,
    /// The copy of QEMU's userfaultfd, where there is one.
    pub(crate) userfaultfd: Option<OwnedFd>,
    /// QEMU's mappings and its page map, where the server was in a sandbox.
    pub(crate) mappings: Option<OwnedFd>,
    pub(crate) page_map: Option<OwnedFd>,
    /// The connection with the server's broker, where the server was in a sandbox, or about to
    /// enter one. Where this process is in a sandbox too, there is a broker.
    pub(crate) broker: Option<OwnedFd>,
    /// The keeper that has started this process.
    pub(crate) keeper: Keeper,
}

impl Inheritance {
    /// Takes what the keeper that has started this process holds. `successor` is what a new
    /// keeper would start, should this one die.
    ///
    /// # Errors
    /// When no keeper has started this process, or something can't be used.
    ///
    /// # Safety
    /// It must be called once at most, by a process that nobody but a keeper gives descriptors
    /// from 64 on.
    pub unsafe fn take(successor: Successor) -> io::Result<Inheritance> {
        // SAFETY: the caller's promise; each number is taken once.
        let take = |number| unsafe { take(number) };
        let keeper = take(CONNECTION)?;
        let mut all = Vec::new();
        for held in Held::ALL {
            match take(number(held)) {
                Ok(fd) => all.push((held, fd)),
                Err(error) if held.is_needed() => return Err(error),
                Err(_) => {}
            }
        }
        let copy = |wanted| {
            let found = all.iter().find(|(held, _)| *held == wanted);
            found.map(|(_, fd)| fd.try_clone()).transpose()
        };
        let needed = |held| copy(held)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
        Ok(Inheritance {
            ledger: Ledger::open(needed(Held::Ledger)?)?,
            image: needed(Held::Image)?,
            qemu: needed(Held::Qemu)?,
            control: copy(Held::Control)?,
            output: needed(Held::Output)?,
            stream: needed(Held::Stream)?,
            userfaultfd: copy(Held::Userfaultfd)?,
            mappings: copy(Held::Mappings)?,
            page_map: copy(Held::PageMap)?,
            broker: copy(Held::Broker)?,
            keeper: Keeper::inherited(keeper, all, successor)?,
        })
    }
}

/// Takes the descriptor of this number, and makes it close-on-exec.
///
/// # Safety
/// It must be nobody's.
unsafe fn take(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD reads a flag, and fails where there is no such descriptor.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and by the caller's promise nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}
