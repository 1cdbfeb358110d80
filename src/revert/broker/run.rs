//! The broker's process.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::message::{Answer, Question};
use crate::host::pidfd::Pidfd;
use crate::host::sandbox::open_here;
use crate::memory::{WorkingSet, WorkingSetError, working_set};
use crate::revert::collapse::collapse;

/// What a broker may do for its server. It is given when the broker is started, and not asked
/// for later.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Rights {
    /// The QEMU whose memory it may collapse.
    pub qemu: Option<i32>,
    /// The file of the working set, which it may open for reading, and replace.
    pub working_set: Option<PathBuf>,
    /// Files that it may open for reading.
    pub files: Vec<PathBuf>,
}

/// Does what the server at the other end of `connection` asks for, as far as `rights` go, until
/// the connection ends. A server that sends what is no question is served no more.
pub fn run(connection: OwnedFd, rights: &Rights) {
    // By its number it might be another process by the time that it is asked for.
    let qemu = rights.qemu.and_then(|pid| Pidfd::open(pid).ok());
    let mut taken = Vec::new();
    while let Ok(Some((id, question))) = Question::receive(&connection) {
        let answer = match question {
            Question::Open(path) => open(rights, &path),
            Question::Take(piece) => take(&mut taken, &piece),
            Question::Store => store(rights, &std::mem::take(&mut taken)),
            Question::Collapse(range) => collapse_in(qemu.as_ref(), range),
        };
        let answer = answer.unwrap_or_else(|error| Answer::failed(&error));
        if answer.send(id, &connection).is_err() {
            break;
        }
    }
}

fn open(rights: &Rights, path: &Path) -> io::Result<Answer> {
    match rights.files.iter().chain(&rights.working_set).any(|file| file == path) {
        true => Ok(Answer::done(0, Some(open_here(path)?.into()))),
        false => Err(not_granted()),
    }
}

fn take(taken: &mut Vec<u8>, piece: &[u8]) -> io::Result<Answer> {
    if taken.len() + piece.len() > working_set::MAX_BYTES {
        taken.clear();
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    taken.extend_from_slice(piece);
    Ok(Answer::done(0, None))
}

fn store(rights: &Rights, bytes: &[u8]) -> io::Result<Answer> {
    let path = rights.working_set.as_ref().ok_or_else(not_granted)?;
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    match WorkingSet::decode(bytes).map_err(invalid)?.store(path) {
        Err(WorkingSetError::Io { source, .. }) => Err(source),
        Err(_) => Err(io::ErrorKind::Other.into()),
        Ok(()) => Ok(Answer::done(0, None)),
    }
}

fn collapse_in(qemu: Option<&Pidfd>, range: Range<u64>) -> io::Result<Answer> {
    let qemu = qemu.ok_or_else(not_granted)?;
    Ok(Answer::done(collapse(qemu, range)?, None))
}

fn not_granted() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host::packets;
    use crate::identity::Identity;
    use crate::page::{Block, BlockId, Page};
    use crate::revert::broker::Broker;

    /// What a server that asks a broker with these rights comes to.
    fn ask<T>(rights: Rights, server: impl FnOnce(&Broker) -> T) -> T {
        let (ours, theirs) = packets::pair().unwrap();
        let broker = std::thread::spawn(move || run(theirs, &rights));
        let connection = Broker::inherited(ours);
        let result = server(&connection);
        drop(connection);
        broker.join().unwrap();
        result
    }

    fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    fn a_working_set_and_nothing_else_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.snap.ws");
        let block = Block { name: "ram".into(), len: 1 << 20, page_size: 4096 };
        let page = Page { block: BlockId(0), number: 3 };
        let set = WorkingSet::following(None, Identity::from_bytes([7; 16]), [page], &[block]);
        let set = set.unwrap().encode();
        ask(Rights { working_set: Some(path.clone()), ..Rights::default() }, |broker| {
            assert_eq!(errno(broker.open(&path)), Some(libc::ENOENT));
            assert_eq!(errno(broker.store_working_set(b"#!/bin/sh")), Some(libc::EINVAL));
            assert!(!path.exists());
            let too_long = vec![0; working_set::MAX_BYTES + 1];
            assert_eq!(errno(broker.store_working_set(&too_long)), Some(libc::EFBIG));
            broker.store_working_set(&set).unwrap();
            let mut read = Vec::new();
            broker.open(&path).unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, set);
        });
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn named_files_and_no_others_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let [image, other, link] = ["image", "other", "link"].map(|name| folder.path().join(name));
        std::fs::write(&image, "image").unwrap();
        std::fs::write(&other, "other").unwrap();
        symlink(&image, &link).unwrap();
        ask(Rights { files: vec![image.clone()], ..Rights::default() }, |broker| {
            let mut file = broker.open(&image).unwrap();
            assert!(std::io::Write::write(&mut file, b"x").is_err());
            for path in [&other, &link, &folder.path().join("x/../image"), &"/".into()] {
                assert_eq!(errno(broker.open(path)), Some(libc::EPERM), "{}", path.display());
            }
        });
    }

    #[test]
    fn a_broker_without_rights_does_nothing() {
        ask(Rights::default(), |broker| {
            assert_eq!(errno(broker.open(Path::new("/etc/passwd"))), Some(libc::EPERM));
            assert_eq!(errno(broker.store_working_set(b"")), Some(libc::EPERM));
            assert_eq!(errno(broker.collapse(0..2 << 20)), Some(libc::EPERM));
        });
    }

    #[test]
    fn a_qemu_that_has_ended_is_an_error() {
        let mut qemu = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        ask(Rights { qemu: Some(qemu.id() as i32), ..Rights::default() }, |broker| {
            // By now the broker has opened it.
            let _ = broker.collapse(0..2 << 20);
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            assert_eq!(errno(broker.collapse(0..2 << 20)), Some(libc::ESRCH));
        });
    }
}
