//! The reverts that are recorded, as they are now.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Serialize;

use super::directory::{self, base, check_private, is_id};
use super::{Again, OfPool, Record, RunsError};
use crate::keeper::{Figures, Ledger};

/// A revert that is recorded.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[non_exhaustive]
pub struct Run {
    /// Its id.
    pub id: String,
    /// Its image.
    pub image: PathBuf,
    /// QEMU's process; none where it has ended, or has not been started yet.
    pub qemu_pid: Option<i32>,
    /// The process that brings the guest's memory; none where it was killed.
    pub server_pid: Option<i32>,
    /// The process that replaces a server that is killed; none where there is none.
    pub keeper_pid: Option<i32>,
    /// By which transport memory comes: `uffd`, `socket`, `map` or `eager`; none where that is not
    /// known yet.
    pub way: Option<String>,
    /// The share of the guest's memory that is in place, from 0 to 1; none where nobody knows.
    pub present: Option<f64>,
    /// Requests of the guest's for memory so far; none where nobody knows.
    pub faults: Option<u64>,
    /// Seconds since the revert began.
    pub age_s: f64,
    /// How many servers have followed the first; none where nobody knows.
    pub restarts: Option<u64>,
    /// What it waits for: `store` while the store of its repository does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    #[serde(skip)]
    pub(super) record: Record,
}

/// The reverts of this user that are recorded, the oldest first. What is no record is left out,
/// with a warning.
///
/// # Errors
/// When the user's directory is there and can't be used.
pub fn list() -> Result<Vec<Run>, RunsError> {
    let mut runs: Vec<Run> = ids()?.into_iter().filter_map(Run::read).collect();
    runs.sort_by_key(|run| run.record.begun_unix_ms);
    Ok(runs)
}

/// The only revert whose id begins so.
///
/// # Errors
/// When there is none, or several.
pub fn find(id: &str) -> Result<Run, RunsError> {
    let mut runs = list()?;
    runs.retain(|run| run.id.starts_with(id));
    match runs.pop() {
        Some(run) if runs.is_empty() => Ok(run),
        Some(last) => {
            let ids = runs.into_iter().chain([last]).map(|run| run.id).collect();
            Err(RunsError::Ambiguous { id: id.to_owned(), ids })
        }
        None => Err(RunsError::NoSuchRun { id: id.to_owned() }),
    }
}

/// Has [`left_overs`](super::left_overs) leave the overlays alone of the guest in this QEMU: it
/// has all its memory, and is about to be saved, by which they become part of a snapshot.
pub(crate) fn keep_overlays(qemu: i32) {
    let of_qemu = |run: &Run| run.qemu_pid == Some(qemu) && !run.record.resident;
    for run in list().unwrap_or_default().into_iter().filter(of_qemu) {
        let (record, directory) =
            (Record { resident: true, ..run.record.clone() }, run.directory());
        if let Err(error) = record.write(&directory) {
            tracing::debug!("the record in `{}` was not changed: {error}", directory.display());
        }
    }
}

/// The revert in this QEMU, if one is recorded: the last, where the server of another is about to
/// end.
///
/// # Errors
/// As [`list`].
pub(crate) fn of_qemu(qemu: i32) -> Result<Option<Run>, RunsError> {
    Ok(list()?.into_iter().rfind(|run| run.qemu_pid == Some(qemu)))
}

/// The directory of the record of the revert in this QEMU, for a server that takes it up.
pub(crate) fn directory_of(qemu: i32) -> Option<PathBuf> {
    of_qemu(qemu).ok()?.as_ref().map(Run::directory)
}

/// The names in the user's directory that are ids.
pub(super) fn ids() -> Result<Vec<String>, RunsError> {
    let names = names()?.into_iter();
    Ok(names.filter(|name| is_id(name)).collect())
}

/// The names in the user's directory; none where there is no such directory.
pub(super) fn names() -> Result<Vec<String>, RunsError> {
    let base = base();
    let entries = match check_private(&base).and_then(|()| fs::read_dir(&base)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RunsError::Directory { path: base, source }),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.collect())
}

impl Run {
    /// Reads the record of this id; none where it is none, or has been removed meanwhile.
    fn read(id: String) -> Option<Run> {
        let directory = directory::of(&id);
        let read = check_private(&directory).and_then(|()| Record::read(&directory));
        match read {
            Ok(record) => Some(Run::of(id, record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("no record of a revert in `{}`: {error}", directory.display());
                None
            }
        }
    }

    fn of(id: String, record: Record) -> Run {
        let living = |process: Option<super::ProcessId>| process.and_then(|id| id.living());
        let (server, keeper) = (living(record.server), living(record.keeper));
        let figures = [server, keeper].into_iter().flatten().find_map(figures_of);
        let present = match (record.resident, figures) {
            (true, _) => Some(1.0),
            (false, Some(figures)) => Some(figures.present as f64 / record.pages.max(1) as f64),
            (false, None) => None,
        };
        let begun = UNIX_EPOCH + Duration::from_millis(record.begun_unix_ms);
        Run {
            id,
            image: record.image.clone(),
            qemu_pid: living(record.qemu),
            server_pid: server,
            keeper_pid: keeper,
            way: record.way.clone(),
            present,
            faults: figures.map(|figures| figures.requests),
            age_s: begun.elapsed().unwrap_or_default().as_secs_f64(),
            restarts: figures.map(|figures| figures.restarts),
            // Nobody tells any more, once its server has ended.
            waits_for: server.and(record.waits_for.clone()),
            record,
        }
    }

    /// Whether its guest waits for memory that nobody brings.
    pub fn is_stuck(&self) -> bool {
        self.is_unserved() && self.qemu_pid.is_some() && !self.record.resident
    }

    /// Whether nothing of it is under way: its server and its keeper have ended, and so has
    /// QEMU, unless its guest needs neither.
    pub fn is_over(&self) -> bool {
        self.is_unserved() && !self.is_stuck()
    }

    fn is_unserved(&self) -> bool {
        self.server_pid.is_none() && self.keeper_pid.is_none()
    }

    /// The pool that it belongs to: its daemon resets and ends it.
    pub fn pool(&self) -> Option<&OfPool> {
        self.record.pool.as_ref()
    }

    /// How it is done again, where that was told.
    pub fn again(&self) -> Option<&Again> {
        self.record.again.as_ref()
    }

    /// The log of its server.
    ///
    /// # Errors
    /// When it has none.
    pub fn log(&self) -> Result<&Path, RunsError> {
        let log = self.record.log.as_deref();
        log.ok_or_else(|| RunsError::NoLog { id: self.id.clone() })
    }

    pub(super) fn directory(&self) -> PathBuf {
        directory::of(&self.id)
    }
}

/// What the ledger says that a process has open; none where it has none, or can't be looked
/// into.
fn figures_of(pid: i32) -> Option<Figures> {
    Ledger::figures(&Ledger::of_process(pid).next()?).ok()
}
