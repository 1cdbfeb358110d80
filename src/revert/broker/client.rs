//! The server's side.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use thiserror::Error;
use uuid::Uuid;

use super::message::{Answer, PIECE, Question};
use super::run::Rights;
use crate::host::packets;
use crate::host::pidfd::Pidfd;

/// How long an answer may take: that to the slowest question comes from a disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a broker whose connection has ended may take to end, and to be killed.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no answer.
#[derive(Debug, Error)]
pub(super) enum Unanswered {
    #[error("the process outside of the sandbox has ended")]
    Ended,
    #[error("the process outside of the sandbox did not answer within {0:?}")]
    Silent(Duration),
}

/// A connection with a broker. Dropping it ends the broker.
#[derive(Debug)]
pub struct Broker {
    connection: OwnedFd,
    /// Held by who waits for an answer.
    asking: Mutex<()>,
    patience: Duration,
    /// Where this process has started it.
    process: Option<(Child, Pidfd)>,
}

impl Broker {
    /// Starts one by the program `snapback`, with these rights. Paths must be absolute.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(program: &Path, rights: &Rights) -> io::Result<Broker> {
        let (connection, theirs) = packets::pair()?;
        let mut command = Command::new(program);
        command.arg("broker");
        if let Some(qemu) = rights.qemu {
            command.arg("--qemu").arg(qemu.to_string());
        }
        if let Some(path) = &rights.working_set {
            command.args([OsStr::new("--working-set"), path.as_os_str()]);
        }
        for path in &rights.files {
            command.args([OsStr::new("--file"), path.as_os_str()]);
        }
        // Out of the reach of our terminal's signals.
        command.process_group(0).stdin(theirs);
        // What it has to say is in its answers; a log that it had open would not be removed behind
        // a server that was killed.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn()?;
        let pidfd = Pidfd::open(child.id() as i32)?;
        let mut broker = Broker::inherited(connection);
        broker.process = Some((child, pidfd));
        Ok(broker)
    }

    /// The broker of a server that has died.
    pub fn inherited(connection: OwnedFd) -> Broker {
        Broker { connection, asking: Mutex::new(()), patience: PATIENCE, process: None }
    }

    /// What a successor needs to go on with it.
    pub fn connection(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// Opens one of the files that it was started with.
    ///
    /// # Errors
    /// When it is another file, can't be opened, or the broker doesn't answer.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        let path = std::path::absolute(path)?;
        let file = self.ask(&Question::Open(path))?.file;
        file.map(File::from).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Replaces the image's working set.
    ///
    /// # Errors
    /// When it can't be written, or the broker doesn't answer.
    pub fn store_working_set(&self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(PIECE) {
            self.ask(&Question::Take(piece.to_vec()))?;
        }
        self.ask(&Question::Store).map(drop)
    }

    /// Collapses memory of its QEMU, as [`collapse`](crate::revert::collapse::collapse) does.
    ///
    /// # Errors
    /// As there, and when the broker doesn't answer.
    pub fn collapse(&self, range: Range<u64>) -> io::Result<u64> {
        self.ask(&Question::Collapse(range)).map(|answer| answer.number)
    }

    /// Asks, and waits for the answer, for so long at most.
    fn ask(&self, question: &Question) -> io::Result<Answer> {
        let _asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let id = Uuid::new_v4().as_u64_pair().0;
        let sent = packets::send(self.connection(), &question.encode(id), None);
        sent.map_err(|_| io::Error::other(Unanswered::Ended))?;
        let deadline = Instant::now() + self.patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.connection(), PollFlags::POLLIN)], timeout) {
                Err(Errno::EINTR) if !left.is_zero() => continue,
                Ok(ready) if ready > 0 => {}
                _ => {
                    // Nobody waits for it twice.
                    self.hang_up();
                    return Err(io::Error::other(Unanswered::Silent(self.patience)));
                }
            }
            match Answer::receive(&self.connection)? {
                Some((of, answer)) if of == id => {
                    return match answer.errno {
                        0 => Ok(answer),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                // To a question of a server that has died.
                Some(_) => {}
                None => return Err(io::Error::other(Unanswered::Ended)),
            }
        }
    }

    /// For the copy that a keeper holds as well.
    fn hang_up(&self) {
        let _ = shutdown(self.connection.as_raw_fd(), Shutdown::Both);
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.hang_up();
        let Some((child, pidfd)) = &mut self.process else { return };
        if !pidfd.wait_end(END_TIMEOUT) {
            let _ = pidfd.kill();
            pidfd.wait_end(END_TIMEOUT);
        }
        // One that the kernel holds even now is not waited for.
        let _ = child.try_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A broker with this at its other end, which is given little time.
    fn impatient() -> (Broker, OwnedFd) {
        let (ours, theirs) = packets::pair().unwrap();
        let mut broker = Broker::inherited(ours);
        broker.patience = Duration::from_millis(20);
        (broker, theirs)
    }

    fn unanswered(error: &io::Error) -> &Unanswered {
        let source = error.get_ref().and_then(|source| source.downcast_ref());
        source.unwrap_or_else(|| panic!("{error}"))
    }

    #[test]
    fn a_broker_that_is_silent_is_asked_once() {
        let (broker, theirs) = impatient();
        let error = broker.collapse(0..1).unwrap_err();
        assert!(matches!(unanswered(&error), Unanswered::Silent(_)), "{error}");
        // It is told so.
        assert!(Question::receive(&theirs).unwrap().is_some());
        assert!(Question::receive(&theirs).unwrap().is_none());
        let error = broker.open(Path::new("/vm.snap")).unwrap_err();
        assert!(matches!(unanswered(&error), Unanswered::Ended), "{error}");
    }

    #[test]
    fn a_broker_that_has_ended_is_no_trouble() {
        let (broker, theirs) = impatient();
        drop(theirs);
        let error = broker.store_working_set(b"x").unwrap_err();
        assert!(matches!(unanswered(&error), Unanswered::Ended), "{error}");
    }

    #[test]
    fn an_answer_to_another_question_is_passed_over() {
        let (ours, theirs) = packets::pair().unwrap();
        let broker = Broker::inherited(ours);
        // What the predecessor had asked for.
        Answer::done(1, None).send(0, &theirs).unwrap();
        let answers = std::thread::spawn(move || {
            let (id, _) = Question::receive(&theirs).unwrap().unwrap();
            Answer::done(2, None).send(id, &theirs).unwrap();
            theirs
        });
        assert_eq!(broker.collapse(0..1).unwrap(), 2);
        drop(answers.join());
    }
}
