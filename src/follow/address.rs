//! The socket of a save that can be followed. Its name is in no directory (unix(7), abstract), so
//! that a save that is killed leaves none behind.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, socket,
    sockopt,
};
use nix::unistd::geteuid;
use xxhash_rust::xxh3::xxh3_128;

use crate::host::paths::parent_directory;

/// The socket on which the save of `image` listens. Accepting from it never waits.
///
/// # Errors
/// EADDRINUSE when there is such a save already.
pub fn listen(image: &Path) -> io::Result<OwnedFd> {
    let listener = packets(SockFlag::SOCK_NONBLOCK)?;
    bind(listener.as_raw_fd(), &address(image)?)?;
    nix::sys::socket::listen(&listener, Backlog::new(16)?)?;
    Ok(listener)
}

/// Takes the next who follows; EAGAIN where there is none.
///
/// # Errors
/// As for accept(2).
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    let fd = accept4(listener.as_fd().as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Connects to the save of `image`.
///
/// # Errors
/// ECONNREFUSED when there is none.
pub fn connect(image: &Path) -> io::Result<OwnedFd> {
    let connection = packets(SockFlag::empty())?;
    loop {
        match nix::sys::socket::connect(connection.as_raw_fd(), &address(image)?) {
            Err(Errno::EINTR) => {}
            done => return Ok(done.map(|()| connection)?),
        }
    }
}

/// The user of whoever is at the other end.
///
/// # Errors
/// As for getsockopt(2).
pub fn peer_user(connection: impl AsFd) -> io::Result<u32> {
    Ok(getsockopt(&connection, sockopt::PeerCredentials)?.uid())
}

/// Whether that user may be at the other end. Anybody can take an abstract name, and who follows
/// runs the command line that it is told.
pub fn is_trusted(user: u32) -> bool {
    user == 0 || user == geteuid().as_raw()
}

fn packets(flags: SockFlag) -> io::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

/// The address for an image, by whatever path it is named. A name has 107 bytes at most.
fn address(image: &Path) -> io::Result<UnixAddr> {
    let parent = parent_directory(image);
    let path: PathBuf = parent.canonicalize()?.join(image.file_name().unwrap_or_default());
    let name = format!("snapback-follow-{:032x}", xxh3_128(path.as_os_str().as_bytes()));
    Ok(UnixAddr::new_abstract(name.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_is_found_by_any_path_of_its_image_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("vm.snap");
        assert_eq!(connect(&image).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listener = listen(&image).unwrap();
        assert_eq!(listen(&image).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let other = folder.path().join("../").join(folder.path().file_name().unwrap());
        let connection = connect(&other.join("vm.snap")).unwrap();
        assert!(is_trusted(peer_user(&connection).unwrap()));
        assert!(connect(&folder.path().join("other.snap")).is_err());
        drop(listener);
        listen(&image).unwrap();
    }
}
