//! Packets between two of our own processes (unix(7), SOCK_SEQPACKET), each with a descriptor or
//! without.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, getsockopt, sendmsg, socketpair,
    sockopt,
};

/// The two ends of a connection.
///
/// # Errors
/// When no descriptor can be had.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Takes the connection that this process was started with from standard input, where /dev/null
/// takes its place.
///
/// # Errors
/// ENOTSOCK when standard input is something else.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let connection = io::stdin().as_fd().try_clone_to_owned()?;
    if getsockopt(&connection, sockopt::SockType)? != SockType::SeqPacket {
        return Err(Errno::ENOTSOCK.into());
    }
    nix::unistd::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    Ok(connection)
}

/// Sends a packet, with a copy of `fd` where there is one. It never waits.
///
/// # Errors
/// EPIPE when the other end is closed, EAGAIN when it has let packets pile up.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], rights.as_slice(), flags, None)?;
    Ok(())
}

/// Receives the next packet into `bytes`, and waits for one. Returns its length, 0 at the end of
/// the connection; what doesn't fit is lost. Allocates nothing.
///
/// # Errors
/// As for recvmsg(2).
pub fn receive(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    /// Room for the header of one descriptor's control message and the descriptor itself.
    #[repr(C, align(8))]
    struct Control([u8; 64]);

    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: a header of zeros is a valid one: null pointers, and lengths of 0.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len() as _;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the header names one buffer and room for control messages, both of the lengths
    // that it says, which outlive the call.
    let len = unsafe { libc::recvmsg(socket, &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has filled in the control messages and their length.
    let fd = unsafe { first_descriptor(&header) };
    Ok((len, fd))
}

/// The descriptor that came with a packet. There is room for no second one in what we send.
///
/// # Safety
/// `header` must have been filled in by recvmsg(2), and its descriptors not been taken before.
unsafe fn first_descriptor(header: &libc::msghdr) -> Option<OwnedFd> {
    // SAFETY: the macros of cmsg(3) stay within the room for control messages that the kernel
    // has filled in; a message of type SCM_RIGHTS is followed by at least one descriptor, which
    // is new and nobody else's.
    unsafe {
        let message = libc::CMSG_FIRSTHDR(header).as_ref()?;
        let is_one = message.cmsg_level == libc::SOL_SOCKET
            && message.cmsg_type == libc::SCM_RIGHTS
            && message.cmsg_len as usize >= libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        let fd = is_one.then(|| libc::CMSG_DATA(message).cast::<RawFd>().read_unaligned());
        fd.map(|fd| OwnedFd::from_raw_fd(fd))
    }
}
