//! What goes between a save and who follows it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::host::packets;
use crate::page::{BlockId, Page};

/// Which protocol this is, and its version.
const HEADER: [u8; 12] = *b"sb-follow\x01\0\0";

/// Bytes of a wish.
const WISH: usize = 10;

/// What who follows is given, each as a descriptor.
pub struct Followed<F> {
    /// An image without memory.
    pub image: F,
    /// The pages that are captured.
    pub pages: F,
    /// Which pages are.
    pub states: F,
}

/// Gives who follows the guest.
///
/// # Errors
/// As for sendmsg(2).
pub fn send_header(to: impl AsFd, followed: Followed<BorrowedFd<'_>>) -> io::Result<()> {
    let Followed { image, pages, states } = followed;
    [image, pages, states]
        .into_iter()
        .try_for_each(|fd| packets::send(to.as_fd(), &HEADER, Some(fd)))
}

/// Receives the guest, and waits for it; nothing if the save ends without.
///
/// # Errors
/// What the system says; InvalidData where the save is of another version.
pub fn receive_header(from: impl AsFd) -> io::Result<Option<Followed<OwnedFd>>> {
    let next = || {
        let mut bytes = [0; HEADER.len() + 1];
        match packets::receive(&from, &mut bytes)? {
            (0, _) => Ok(None),
            (len, Some(fd)) if bytes[..len] == HEADER => Ok(Some(fd)),
            _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
        }
    };
    let Some(image) = next()? else { return Ok(None) };
    let (Some(pages), Some(states)) = (next()?, next()?) else { return Ok(None) };
    Ok(Some(Followed { image, pages, states }))
}

/// Wishes for a page. Never waits.
///
/// # Errors
/// As for sendmsg(2): EAGAIN where many wishes wait already.
pub fn send_wish(to: impl AsFd, page: Page) -> io::Result<()> {
    let mut bytes = [0; WISH];
    bytes[..2].copy_from_slice(&page.block.0.to_le_bytes());
    bytes[2..].copy_from_slice(&page.number.to_le_bytes());
    packets::send(to.as_fd(), &bytes, None)
}

/// Receives the next wish, and waits for it; nothing when who follows has gone, or sends something
/// else. There may be no such page.
///
/// # Errors
/// As for recvmsg(2).
pub fn receive_wish(from: impl AsFd) -> io::Result<Option<Page>> {
    let mut bytes = [0; WISH + 1];
    let (len, _) = packets::receive(from, &mut bytes)?;
    let [b0, b1, number @ .., _] = bytes;
    let (block, number) = (BlockId(u16::from_le_bytes([b0, b1])), u64::from_le_bytes(number));
    Ok((len == WISH).then_some(Page { block, number }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_and_wishes_arrive() {
        let (ours, theirs) = packets::pair().unwrap();
        let fd = ours.as_fd();
        send_header(&ours, Followed { image: fd, pages: fd, states: fd }).unwrap();
        assert!(receive_header(&theirs).unwrap().is_some());
        let page = Page { block: BlockId(3), number: 1 << 40 };
        send_wish(&theirs, page).unwrap();
        packets::send(theirs.as_fd(), b"nonsense", None).unwrap();
        assert_eq!(receive_wish(&ours).unwrap(), Some(page));
        assert_eq!(receive_wish(&ours).unwrap(), None);
        drop(ours);
        assert!(receive_header(&theirs).unwrap().is_none());
    }

    #[test]
    fn another_protocol_is_told_apart() {
        let (ours, theirs) = packets::pair().unwrap();
        packets::send(ours.as_fd(), b"sb-follow\x02\0\0", Some(ours.as_fd())).unwrap();
        let error = receive_header(&theirs).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
