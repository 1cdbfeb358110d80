//! The guest's console: ready, heartbeats, complaints.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Result, wait_for};

/// One heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Counts from 1.
    pub number: u64,
    /// Milliseconds of the guest's CLOCK_MONOTONIC.
    pub uptime_ms: u64,
    /// Pages verified since boot.
    pub verified: u64,
    /// Bad pages met since boot.
    pub bad: u64,
}

/// A file that the guest's console goes to, from some place in it on.
#[derive(Debug, Clone)]
pub struct SerialLog {
    path: PathBuf,
    /// Where in the file this log begins, in bytes.
    start: usize,
}

impl SerialLog {
    /// The whole file.
    pub fn whole(path: &Path) -> SerialLog {
        SerialLog { path: path.into(), start: 0 }
    }

    /// Only what is written from now on.
    pub fn from_now(path: &Path) -> SerialLog {
        let start = fs::metadata(path).map_or(0, |file| file.len() as usize);
        SerialLog { path: path.into(), start }
    }

    /// What has been written; the empty string when there is no file yet.
    pub fn text(&self) -> String {
        let bytes = fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.start..).unwrap_or_default()).into_owned()
    }

    /// The last lines, for error messages.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// The heartbeats so far. A line that a revert cut in two is none.
    pub fn beats(&self) -> Vec<Beat> {
        self.text().split_inclusive('\n').filter_map(parse_beat).collect()
    }

    /// The latest heartbeat.
    pub fn last_beat(&self) -> Option<Beat> {
        self.beats().pop()
    }

    /// The complaints (`ORACLE BAD …`) so far.
    pub fn complaints(&self) -> Vec<String> {
        let text = self.text();
        text.lines().filter(|line| line.contains("ORACLE BAD")).map(String::from).collect()
    }

    /// Waits for a heartbeat whose number is greater than `after`.
    ///
    /// # Errors
    /// When `timeout` passes, with the end of the log.
    pub fn wait_beat(&self, after: u64, timeout: Duration) -> Result<Beat> {
        let what = format!("a heartbeat after number {after} in {}", self.path.display());
        wait_for(timeout, &what, || Ok(self.last_beat().filter(|beat| beat.number > after)))
            .map_err(|e| format!("{e}; the log ends:\n{}", self.tail()).into())
    }
}

fn parse_beat(line: &str) -> Option<Beat> {
    let mut fields = line.strip_prefix("BEAT ")?.strip_suffix('\n')?.split_whitespace();
    let mut next = || fields.next()?.parse().ok();
    let beat = Beat { number: next()?, uptime_ms: next()?, verified: next()?, bad: next()? };
    fields.next().is_none().then_some(beat)
}
