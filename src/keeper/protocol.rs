//! What a server tells its keeper: messages of a fixed size over a SOCK_SEQPACKET pair, each
//! with at most one descriptor (SCM_RIGHTS, unix(7)). The keeper answers nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::host::packets;

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
        use Held::{Broker, Control, Mappings, PageMap, Userfaultfd};
        !matches!(self, Control | Userfaultfd | Mappings | PageMap | Broker)
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
    packets::send(socket, &message.bytes(), fd)
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
    let mut bytes = [0u8; MESSAGE_BYTES + 1];
    let (len, fd) = packets::receive(socket, &mut bytes)?;
    match Message::parse(&bytes[..len]) {
        Some(message) => Ok(Received::Message(message, fd)),
        None if len == 0 => Ok(Received::End),
        None => Ok(Received::Noise),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (ours, theirs) = packets::pair().unwrap();
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
