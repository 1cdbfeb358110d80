//! Watches for a guest's signs of life: lines on a serial port that match a pattern.
//!
//! A thread of its own takes the time as soon as the bytes are there, whatever else
//! the program is busy with. A file is watched by inotify(7), a socket by poll(2): in
//! between, the watch uses no CPU.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::kind::{Details, ErrorKind};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use regex::bytes::Regex;
use tokio::sync::watch;

/// What counts as a sign of life.
#[derive(Debug, Clone)]
pub struct Sign {
    /// A line counts, once, as soon as what there is of it matches.
    pub pattern: Regex,
    /// The file that the guest's serial port is written to, or the Unix socket that it
    /// listens on. `{run}` stands for the run's directory.
    pub path: String,
    /// How many signs are waited for, at least 1.
    pub nth: usize,
}

/// The longest line that is kept for matching, in bytes.
const MAX_LINE: usize = 64 << 10;

/// How long a guest may take to give the signs that are waited for.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Why signs of life can't be waited for, or did not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// The port can't be watched.
    #[error("the guest's port `{path}` can't be watched for signs of life: {source}", path = path.display())]
    Port {
        /// The file or socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There were too few.
    #[error(
        "the guest gave {seen} of {nth} signs of life within {} s (lines in `{path}` that match \
         `{pattern}`): ask for fewer in `Sign::nth`, or for another pattern in `Sign::pattern`",
        TIMEOUT.as_secs(), path = path.display()
    )]
    Missing {
        /// How many came.
        seen: usize,
        /// How many were waited for.
        nth: usize,
        /// The file or socket.
        path: PathBuf,
        /// The pattern.
        pattern: String,
    },
}

impl SignError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::OptionsInvalid
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<std::path::PathBuf>, None)
    }
}

/// What a watch has seen.
#[derive(Debug, Default)]
struct Seen {
    signs: Vec<Instant>,
    failed: Option<io::Error>,
}

/// A watch under way. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Watch {
    sign: Sign,
    path: PathBuf,
    seen: watch::Receiver<Seen>,
    /// Closed by being dropped, which the thread sees.
    _stop: UnixStream,
}

/// Where lines are read from, and what reports that there are more.
enum Port {
    File(File, Inotify),
    Socket(UnixStream),
}

impl Watch {
    /// Watches the port at `path` from now on. A file is read from `offset` on, or from
    /// its start where it is shorter.
    pub fn start(sign: &Sign, path: &Path, offset: u64) -> Result<Watch, SignError> {
        let failed = |source| SignError::Port { path: path.to_owned(), source };
        let port = open(path, offset).map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let (tell, seen) = watch::channel(Seen::default());
        let lines = Lines { pattern: sign.pattern.clone(), line: Vec::new(), counted: false };
        let follow = move || {
            if let Err(error) = follow(port, &stopped, lines, &tell) {
                tell.send_modify(|seen| seen.failed = Some(error));
            }
        };
        std::thread::Builder::new().name("signs".into()).spawn(follow).map_err(failed)?;
        Ok(Watch { sign: sign.clone(), path: path.to_owned(), seen, _stop: stop })
    }

    /// Waits for the requested signs; returns the times of the first and of the Nth.
    pub async fn wait(&mut self) -> Result<(Instant, Instant), SignError> {
        let Sign { nth, ref pattern, .. } = self.sign;
        let enough = |seen: &Seen| seen.signs.len() >= nth || seen.failed.is_some();
        // Fails once the thread has ended, which sends its result before.
        let _ = tokio::time::timeout(TIMEOUT, self.seen.wait_for(enough)).await;
        let seen = self.seen.borrow();
        if let (Some(first), Some(last)) = (seen.signs.first(), seen.signs.get(nth - 1)) {
            return Ok((*first, *last));
        }
        let (path, pattern) = (self.path.clone(), pattern.to_string());
        Err(match &seen.failed {
            Some(error) => {
                SignError::Port { path, source: io::Error::new(error.kind(), error.to_string()) }
            }
            None => SignError::Missing { seen: seen.signs.len(), nth, path, pattern },
        })
    }
}

fn open(path: &Path, offset: u64) -> io::Result<Port> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_socket() {
        return Ok(Port::Socket(UnixStream::connect(path)?));
    }
    if !kind.is_file() {
        return Err(io::Error::other("it is neither a file nor a Unix socket"));
    }
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
    let mut file = File::open(path)?;
    let offset = if file.metadata()?.len() < offset { 0 } else { offset };
    file.seek(SeekFrom::Start(offset))?;
    Ok(Port::File(file, inotify))
}

/// Reads the port until `stop` is closed.
fn follow(
    mut port: Port,
    stop: &UnixStream,
    mut lines: Lines,
    tell: &watch::Sender<Seen>,
) -> io::Result<()> {
    let mut buffer = vec![0; 4096];
    let mut take = |bytes: &[u8]| {
        let now = Instant::now();
        let count = lines.take(bytes);
        if count > 0 {
            tell.send_modify(|seen| seen.signs.extend(std::iter::repeat_n(now, count)));
        }
    };
    loop {
        if let Port::File(file, _) = &mut port {
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    n => take(&buffer[..n]),
                }
            }
        }
        let readable = match &port {
            Port::File(_, inotify) => inotify.as_fd(),
            Port::Socket(socket) => socket.as_fd(),
        };
        let mut fds = [
            PollFd::new(readable, PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if fds[1].any() == Some(true) {
            return Ok(());
        }
        match &mut port {
            Port::File(_, inotify) => match inotify.read_events() {
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            },
            Port::Socket(socket) => match socket.read(&mut buffer)? {
                0 => return Err(io::Error::other("QEMU closed it")),
                n => take(&buffer[..n]),
            },
        }
    }
}

/// Counts matching lines in a stream of bytes.
struct Lines {
    pattern: Regex,
    /// What there is of the current line.
    line: Vec<u8>,
    /// Whether the current line has been counted.
    counted: bool,
}

impl Lines {
    /// Takes more bytes, and returns how many more lines match.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let mut count = 0;
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let text = part.strip_suffix(b"\n");
            let room = MAX_LINE - self.line.len();
            let more = text.unwrap_or(part);
            self.line.extend_from_slice(&more[..more.len().min(room)]);
            if !self.counted && self.pattern.is_match(&self.line) {
                self.counted = true;
                count += 1;
            }
            if text.is_some() {
                self.line.clear();
                self.counted = false;
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn sign(pattern: &str, nth: usize) -> Sign {
        Sign { pattern: Regex::new(pattern).unwrap(), path: String::new(), nth }
    }

    #[test]
    fn each_matching_line_counts_once_however_it_comes() {
        let mut lines =
            Lines { pattern: Regex::new("BEAT [0-9]").unwrap(), line: vec![], counted: false };
        let counts = ["BE", "AT 1", "2 BEAT 3\nno", "\nBEAT 4\nBEAT 5\n", "BEAT 6"]
            .map(|s| lines.take(s.as_bytes()));
        assert_eq!(counts, [0, 1, 0, 2, 1]);
        assert_eq!(lines.take(&vec![b'x'; MAX_LINE * 2]), 0);
        assert_eq!(lines.line.len(), MAX_LINE);
        assert_eq!(lines.take(b"\nBEAT 7"), 1);
    }

    #[tokio::test]
    async fn a_file_is_watched_from_an_offset_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serial");
        let mut file = File::create(&path).unwrap();
        writeln!(file, "BEAT old").unwrap();
        let before = Instant::now();
        let mut watch = Watch::start(&sign("BEAT", 2), &path, 9).unwrap();
        write!(file, "BEAT 1\nx\nBEAT").unwrap();
        let (first, second) = watch.wait().await.unwrap();
        assert!(before <= first && first <= second);
    }

    #[tokio::test]
    async fn a_socket_that_closes_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("serial");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut watch = Watch::start(&sign("login:", 2), &path, 0).unwrap();
        let (mut port, _) = listener.accept().unwrap();
        port.write_all(b"login: ").unwrap();
        drop(port);
        let error = watch.wait().await.unwrap_err().to_string();
        assert!(error.contains("QEMU closed it"), "{error}");
        let missing = Watch::start(&sign("x", 1), &directory.path().join("none"), 0);
        assert!(missing.unwrap_err().to_string().contains("can't be watched"));
    }
}
