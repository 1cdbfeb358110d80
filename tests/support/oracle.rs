//! Questions to the guest.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Result, SOON, wait_for};

/// What a walk over all pages found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Pages that were verified.
    pub pages: u64,
    /// Pages that were to be all zeros.
    pub zero: u64,
    /// Pages which the walk found bad.
    pub bad: u64,
    /// Bad pages met since boot, by writers too.
    pub seen_bad: u64,
    /// Sum of all pages' generations.
    pub generation_sum: u64,
}

impl Verdict {
    /// Whether no page was ever bad.
    pub fn ok(&self) -> bool {
        self.bad == 0 && self.seen_bad == 0
    }
}

/// A connection to a guest's second serial port.
pub struct Oracle {
    port: BufReader<UnixStream>,
    complaints: Vec<String>,
}

impl Oracle {
    /// Connects to the socket of QEMU's `-chardev socket,server=on`; it serves one
    /// peer at a time. Waits for the socket to be there.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> Result<Oracle> {
        let what = format!("a listener at {}", socket.display());
        let port = wait_for(SOON, &what, || Ok(UnixStream::connect(socket).ok()))?;
        // Ends a question that an earlier peer may have left unfinished.
        (&port).write_all(b"\n")?;
        Ok(Oracle { port: BufReader::new(port), complaints: Vec::new() })
    }

    /// Asks and returns the answer's line.
    ///
    /// # Errors
    /// When the guest answers `error …`, or not within a minute.
    pub fn ask(&mut self, question: &str) -> Result<String> {
        self.ask_within(question, SOON)
    }

    /// Asks, and waits that long for the answer. After a timeout the next question
    /// may be asked: each answer is known by a tag.
    ///
    /// # Errors
    /// When the guest answers `error …`, or not in time.
    pub fn ask_within(&mut self, question: &str, timeout: Duration) -> Result<String> {
        let tag = tag();
        self.port.get_mut().write_all(format!("{tag} {question}\n").as_bytes())?;
        let end = Instant::now() + timeout;
        let mut line = String::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("no answer to `{question}` within {timeout:?}").into());
            }
            self.port.get_ref().set_read_timeout(Some(left))?;
            match self.port.read_line(&mut line) {
                Ok(0) => return Err(format!("the guest hung up on `{question}`").into()),
                Ok(_) => {}
                // What came before the timeout stays in `line`.
                Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
                Err(e) => return Err(format!("asking `{question}`: {e}").into()),
            }
            if line.contains("ORACLE BAD") {
                self.complaints.push(line.trim().to_string());
            }
            // Answers to somebody else's questions, from before a snapshot, are skipped.
            if let Some((_, answer)) = line.trim().split_once(&format!("{tag} ")) {
                if let Some(reason) = answer.strip_prefix("error ") {
                    return Err(format!("the guest can't answer `{question}`: {reason}").into());
                }
                return Ok(answer.to_string());
            }
            line.clear();
        }
    }

    /// Complaints (`ORACLE BAD …`) that came in while answers were awaited.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    /// Whether the guest answers.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn ping(&mut self) -> Result<()> {
        match self.ask("ping")?.as_str() {
            "pong" => Ok(()),
            other => Err(format!("ping was answered by `{other}`").into()),
        }
    }

    /// The 128 bits of this boot, in hexadecimal.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn nonce(&mut self) -> Result<String> {
        self.ask("nonce")
    }

    /// Milliseconds of the guest's CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn uptime_ms(&mut self) -> Result<u64> {
        Ok(self.ask("uptime")?.parse()?)
    }

    /// Has every page verified, whatever the writers do meanwhile. Takes the guest
    /// about 3 s a GiB under TCG with one vCPU; ten minutes are allowed.
    ///
    /// # Errors
    /// When there is no answer. Bad pages are no error here: see [`Verdict::ok`].
    pub fn check(&mut self) -> Result<Verdict> {
        let answer = self.ask_within("check", Duration::from_secs(600))?;
        Ok(Verdict {
            pages: field(&answer, "pages")?,
            zero: field(&answer, "zero")?,
            bad: field(&answer, "bad")?,
            seen_bad: field(&answer, "seen_bad")?,
            generation_sum: field(&answer, "generation_sum")?,
        })
    }

    /// A digest of all pages and generations; the writers must have been stopped.
    ///
    /// # Errors
    /// When writers run, or there is no answer.
    pub fn sum(&mut self) -> Result<String> {
        self.ask_within("sum", Duration::from_secs(600))
    }

    /// Changes the number of writers, and the pages each rewrites a second (0: as
    /// many as it can). When this returns, the former writers have stopped.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn set_writers(&mut self, writers: u64, rate: u64) -> Result<()> {
        self.ask(&format!("writers {writers} {rate}")).map(drop)
    }

    /// One number of the answer to `stats`.
    ///
    /// # Errors
    /// When there is no answer, or no such number in it.
    pub fn stat(&mut self, name: &str) -> Result<u64> {
        field(&self.ask("stats")?, name)
    }
}

/// The value of `name=value` in an answer.
fn field(answer: &str, name: &str) -> Result<u64> {
    answer
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.parse().ok())
        .ok_or_else(|| format!("no {name}=… in `{answer}`").into())
}

/// A tag that no other question has, of this process or another, before a snapshot
/// or after.
fn tag() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let nanos = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
    format!("#{:x}-{nanos:x}-{count:x}", std::process::id())
}
