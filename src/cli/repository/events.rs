//! The events of commands on repositories.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use crate::repository::{
    Checked, Difference, Moved, Pruned, PulledFile, RepositoryDamage, SnapshotManifest, time_text,
};

/// What a command on a repository tells.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(in crate::cli) enum RepositoryEvent {
    /// A repository was made.
    Initialized {
        /// Its address.
        repository: String,
        /// Its id.
        id: String,
        /// Whether it is encrypted.
        encrypted: bool,
        /// What it is known by (`--trust`), if it is encrypted.
        #[serde(skip_serializing_if = "Option::is_none")]
        fingerprint: Option<String>,
        /// Whether its store minds the condition that nothing is there when an object is put. If not, of two
        /// who put the same at once neither is told.
        conditional: bool,
    },
    /// How far files and a repository have come.
    Moved(Moved),
    /// A snapshot is in the repository.
    Pushed {
        /// The snapshot.
        #[serde(flatten)]
        snapshot: Box<ListedSnapshot>,
        /// Whether it was there before.
        was_there: bool,
    },
    /// A snapshot was brought back as files.
    Pulled {
        /// The snapshot.
        #[serde(flatten)]
        snapshot: Box<ListedSnapshot>,
        /// Bytes that were fetched.
        fetched_bytes: u64,
        /// The image.
        image: PathBuf,
        /// All files, the image last.
        files: Vec<PulledFile>,
    },
    /// A snapshot could be reverted here: its guest ran, cut off from everything, and had all of its
    /// memory and disks in the end. It is gone again.
    Drilled {
        /// The snapshot's id.
        snapshot: String,
        /// The machine's name.
        machine: String,
        /// From the start of the revert until the guest ran, in milliseconds.
        ran_ms: f64,
        /// From the start of the command until all was in place, in milliseconds.
        whole_ms: f64,
        /// Bytes that were fetched from the repository.
        fetched_bytes: u64,
    },
    /// A snapshot of a repository.
    Snapshot(Box<ListedSnapshot>),
    /// A snapshot with the tags that it has now.
    Tagged(Box<ListedSnapshot>),
    /// A snapshot that `forget` has looked at.
    Forgotten {
        /// The snapshot.
        #[serde(flatten)]
        snapshot: Box<ListedSnapshot>,
        /// Whether it is kept.
        kept: bool,
        /// By which rules: `last`, `hourly`, `daily`, `weekly`, `monthly`, `tag`.
        kept_by: Vec<String>,
        /// Whether this only tells what would be done.
        dry_run: bool,
    },
    /// What nothing refers to was marked, what had been marked was removed, and what is needed of packs
    /// that are mostly unused was put into new ones.
    Pruned {
        /// What was done.
        #[serde(flatten)]
        pruned: Pruned,
        /// Whether this only tells what would be done.
        dry_run: bool,
    },
    /// Something in a repository is not what it should be.
    RepositoryDamaged(RepositoryDamage),
    /// A repository was checked.
    RepositoryChecked {
        /// What was looked at.
        #[serde(flatten)]
        checked: Checked,
        /// How much was not what it should be.
        damages: u64,
    },
    /// A configuration of backups could be understood.
    BackupConfig {
        /// The repository.
        repository: String,
        /// The machines.
        machines: Vec<String>,
    },
    /// A machine was not backed up, while others are. Its error, as the command of that machine alone
    /// would have ended with.
    BackupFailed {
        /// The machine.
        machine: String,
        /// The kind of error, as in `error`.
        code: String,
        /// What failed, why, and what to do.
        message: String,
    },
    /// How memory, or a file of a disk, of one snapshot differs from that of another.
    Difference(Difference),
    /// A snapshot is in one file.
    Packed {
        /// The snapshot.
        #[serde(flatten)]
        snapshot: Box<ListedSnapshot>,
        /// The file.
        file: PathBuf,
        /// Its length in bytes.
        packed_bytes: u64,
    },
    /// A snapshot is in the other repository.
    Copied {
        /// The snapshot.
        #[serde(flatten)]
        snapshot: Box<ListedSnapshot>,
        /// Whether it was there before.
        was_there: bool,
    },
}

/// A snapshot of a repository.
#[derive(Serialize, JsonSchema)]
pub(in crate::cli) struct ListedSnapshot {
    /// Its id.
    pub id: String,
    /// The machine.
    pub machine: String,
    /// The moment, in UTC.
    pub time: String,
    /// The moment, in microseconds since 1970.
    pub moment_unix_us: u64,
    /// Its tags.
    pub tags: BTreeSet<String>,
    /// The host that pushed it.
    pub host: String,
    /// The machine's memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of its files.
    pub file_bytes: u64,
    /// Bytes that its files take in the repository; what two of them share counts twice.
    pub stored_bytes: u64,
    /// Bytes that came with it.
    pub own_bytes: u64,
    /// The images that it refers to.
    pub parents: Vec<String>,
    /// How many files of disks belong to it.
    pub disk_files: usize,
    /// How it is reverted at another site: values of options by their names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub profile: BTreeMap<String, Vec<String>>,
}

impl ListedSnapshot {
    /// What people call it.
    pub fn name(&self) -> String {
        format!("{}@{} ({})", self.machine, self.time, &self.id[..12])
    }

    /// With the tags that were added or taken away since.
    pub fn new(manifest: &SnapshotManifest, tags: BTreeSet<String>) -> Box<ListedSnapshot> {
        let disks = manifest.files.iter().filter(|file| file.role == crate::repository::Role::Disk);
        Box::new(ListedSnapshot {
            id: manifest.id.to_string(),
            machine: manifest.machine.clone(),
            time: time_text(manifest.moment_unix_us),
            moment_unix_us: manifest.moment_unix_us,
            tags,
            host: manifest.host.clone(),
            memory_bytes: manifest.memory,
            file_bytes: manifest.bytes,
            stored_bytes: manifest.stored,
            own_bytes: manifest.own,
            parents: manifest.parents.iter().map(ToString::to_string).collect(),
            disk_files: disks.count(),
            profile: manifest.profile.clone(),
        })
    }
}
