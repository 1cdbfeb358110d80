//! The ways to save a guest that are compared, and times.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::guests::events;
use crate::support::{Guest, Result, qmp, wait_for};

/// A quantity as it was measured.
#[derive(Default)]
pub struct Times(Vec<f64>);

impl Times {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    fn sort(&mut self) {
        self.0.sort_by(f64::total_cmp);
    }

    pub fn median(&mut self) -> f64 {
        self.sort();
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }

    /// The least and the most.
    pub fn ends(&mut self) -> [f64; 2] {
        self.sort();
        [self.0.first(), self.0.last()].map(|end| end.copied().unwrap_or_default())
    }

    /// A line of a table; none where nothing was measured.
    pub fn line(&mut self, name: &str) {
        if self.0.is_empty() {
            return;
        }
        let (median, [least, most]) = (self.median(), self.ends());
        println!("| {name} | {median:.1} [{least:.1}..{most:.1}] |");
    }
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// How a guest's memory is saved.
pub struct Way {
    pub name: &'static str,
    read: Option<&'static str>,
    compress: &'static str,
    file: PathBuf,
}

impl Way {
    /// By `snapback save`, by the same from QEMU's stream alone, and by QEMU's own background snapshot, which
    /// is not compressed.
    pub fn all(folder: &Path, compress: &'static str) -> [Way; 3] {
        let ways = [
            ("`snapback save`", Some("auto")),
            ("`--read stream`", Some("stream")),
            ("QEMU's own", None),
        ];
        ways.map(|(name, read)| Way { name, read, compress, file: folder.join("vm.snap") })
    }

    /// Saves the guest, into a file that is gone then. Returns how long that took, and the events if it was by
    /// the program.
    ///
    /// # Errors
    /// When it fails.
    pub fn save(&self, guest: &Guest) -> Result<(Duration, Vec<Value>)> {
        let saved = match self.read {
            Some(read) => self.by_program(guest, read)?,
            None => (snapshot(guest, &self.file)?, Vec::new()),
        };
        fs::remove_file(&self.file)?;
        Ok(saved)
    }

    fn by_program(&self, guest: &Guest, read: &str) -> Result<(Duration, Vec<Value>)> {
        let options = [
            "save",
            "--json",
            "--memory-only",
            "--compress",
            self.compress,
            "--read",
            read,
            "--qmp",
        ];
        let mut words = options.map(OsStr::new).to_vec();
        words.extend([guest.qmp_path.as_os_str(), self.file.as_os_str()]);
        let begun = Instant::now();
        let events = events(&words)?;
        Ok((begun.elapsed(), events))
    }
}

/// A background snapshot by QEMU, until the file is whole and synced. Returns how long that took.
///
/// # Errors
/// When QEMU fails.
pub fn snapshot(guest: &Guest, file: &Path) -> Result<Duration> {
    let background = |state: bool| json!({ "capabilities": [{ "capability": "background-snapshot", "state": state }] });
    qmp(&guest.qmp_path, "migrate-set-capabilities", background(true))?;
    let begun = Instant::now();
    let uri = format!("exec:cat > {}", file.display());
    qmp(&guest.qmp_path, "migrate", json!({ "uri": uri }))?;
    wait_for(Duration::from_secs(120), "QEMU's snapshot", || {
        let status = qmp(&guest.qmp_path, "query-migrate", json!({}))?["status"].clone();
        Ok((status == "completed").then_some(()))
    })?;
    fs::File::open(file)?.sync_all()?;
    let took = begun.elapsed();
    qmp(&guest.qmp_path, "migrate-set-capabilities", background(false))?;
    Ok(took)
}
