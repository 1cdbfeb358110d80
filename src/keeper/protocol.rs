//! What a server tells its keeper: messages of a fixed size over a SOCK_SEQPACKET pair, each
//! with at most one descriptor (SCM_RIGHTS, unix(7)). The keeper answers nothing.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A descriptor that the keeper holds, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Held {
    /// A pidfd of the server itself.
    Server,
    /// The shared memory of the [`Ledger`](super::Ledger).
    Ledger,
    /// The image.
    Image,
    /// A pidfd of QEMU.
    Qemu,
    /// Our end of QEMU's control socket.
    Control,
    /// The file that QEMU's standard error goes to.
    Output,
    /// Our end of the migration stream.
    Stream,
    /// The copy of QEMU's userfaultfd.
    Userfaultfd,
    /// QEMU's mappings (/proc/PID/smaps). Nobody in a sandbox can open them.
    Mappings,
    /// QEMU's page map (/proc/PID/pagemap). Nobody in a sandbox can open it.
    PageMap,
    /// The server's end of its connection with the broker.
    Broker,
}

impl Held {
    /// All of them, by number.
    pub const ALL: [Held; 11] = [
        Held::Server,
        Held::Ledger,
        Held::Image,
        Held::Qemu,
        Held::Control,
        Held::Output,
        Held::Stream,
        Held::Userfaultfd,
        Held::Mappings,
        Held::PageMap,
        Held::Broker,
    ];

    /// Whether no server can go on without it.
    pub(super) fn is_needed(self) -> bool {
        !matches!(self, Held::Userfaultfd | Held::Mappings | Held::PageMap | Held::Broker)
    }
}

/// A message to the keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Hold the descriptor that comes with this message, in place of an earlier one of its
    /// kind.
    Hold(Held),
    /// Enter the sandbox whose Landlock ruleset comes with this message; without one, only its
    /// seccomp filter. A new server is then inside as well.
    Confine,
    /// The server ends, and needs no successor.
    Ended,
}

/// Bytes of a message.
pub(super) const MESSAGE_BYTES: usize = 8;

const MAGIC: [u8; 4] = *b"SBK1";
const HOLD: u8 = 1;
const ENDED: u8 = 2;
const CONFINE: u8 = 3;

impl Message {
    fn bytes(self) -> [u8; MESSAGE_BYTES] {
        let (kind, held) = match self {
            Message::Hold(held) => (HOLD, held as u8),
            Message::Ended => (ENDED, 0),
            Message::Confine => (CONFINE, 0),
        };
        let [a, b, c, d] = MAGIC;
        [a, b, c, d, kind, held, 0, 0]
    }

    /// Reads a message; nothing where the bytes are none.
    pub fn parse(bytes: &[u8]) -> Option<Message> {
        let bytes: [u8; MESSAGE_BYTES] = bytes.try_into().ok()?;
        let message = match (bytes[4], Held::ALL.get(usize::from(bytes[5]))) {
            (HOLD, Some(held)) => Message::Hold(*held),
            (ENDED, Some(_)) => Message::Ended,
            (CONFINE, Some(_)) => Message::Confine,
            _ => return None,
        };
        (message.bytes() == bytes).then_some(message)
    }
}

/// Sends a message, with a copy of `fd` where it holds one.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    message: Message,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
    let bytes = message.bytes();
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], rights.as_slice(), flags, None)?;
    Ok(())
}

/// What was received.
pub(super) enum Received {
    Message(Message, Option<OwnedFd>),
    /// Something that is no message.
    Noise,
    /// The other end is closed.
    End,
}

/// Receives the next message; waits for one. Allocates nothing.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Received> {
    /// Room for the header of one descriptor's control message and the descriptor itself.
    #[repr(C, align(8))]
    struct Control([u8; 64]);

    let mut bytes = [0u8; MESSAGE_BYTES + 1];
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
    match Message::parse(&bytes[..len]) {
        Some(message) => Ok(Received::Message(message, fd)),
        None if len == 0 => Ok(Received::End),
        None => Ok(Received::Noise),
    }
}

/// The descriptor that came with a message. There is room for no second one in what a server
/// sends.
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

/// The two ends of a connection between a server and its keeper.
pub(super) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (ours, theirs) = socket_pair().unwrap();
        let (one, other) = nix::unistd::pipe().unwrap();
        send(ours.as_fd(), Message::Hold(Held::Image), Some(other.as_fd())).unwrap();
        send(ours.as_fd(), Message::Ended, None).unwrap();
        drop((ours, other));
        let Received::Message(message, Some(fd)) = receive(&theirs).unwrap() else { panic!() };
        assert_eq!(message, Message::Hold(Held::Image));
        nix::unistd::write(&fd, b"x").unwrap();
        let mut read = [0];
        assert_eq!(nix::unistd::read(&one, &mut read), Ok(1));
        let ended = receive(&theirs).unwrap();
        assert!(matches!(ended, Received::Message(Message::Ended, None)));
        assert!(matches!(receive(&theirs).unwrap(), Received::End));
    }

    proptest! {
        #[test]
        fn anything_may_be_received(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            if let Some(message) = Message::parse(&bytes) {
                prop_assert_eq!(&message.bytes()[..], &bytes[..]);
            }
        }
    }

    #[test]
    fn every_message_is_read_as_it_was_sent() {
        let others = [Message::Confine, Message::Ended];
        let messages = Held::ALL.map(Message::Hold).into_iter().chain(others);
        for message in messages {
            assert_eq!(Message::parse(&message.bytes()), Some(message));
        }
    }
}
