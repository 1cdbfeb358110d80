//! `pull`: a snapshot brought back as files.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::Serialize;

use super::repository::Repository;
use crate::image::Target;
use crate::repository::Moved;
use crate::repository::error::RepositoryError;
use crate::repository::format::manifest::{FileRef, Role, SnapshotManifest};
use crate::repository::format::map::{Extent, FileMap};
use crate::repository::lease::{Held, Lease};

/// How many requests for extents are under way at once.
const THREADS: usize = 6;
/// How much of a file's stored bytes one of them asks for.
const PART: u64 = 8 << 20;
/// The most time between two tellings of progress.
const TOLD_EVERY: Duration = Duration::from_millis(100);

/// Where a snapshot is brought to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PullOptions {
    /// The image's path. Its parents, and the files of its disks, come beside it.
    pub image: PathBuf,
    /// Replace existing files.
    pub force: bool,
    /// Leave the disks out.
    pub no_disks: bool,
}

impl PullOptions {
    /// Brings a snapshot to this path.
    pub fn new(image: impl Into<PathBuf>) -> PullOptions {
        PullOptions { image: image.into(), force: false, no_disks: false }
    }
}

/// A file that was brought back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[non_exhaustive]
pub struct PulledFile {
    /// What it is.
    pub role: Role,
    /// Where it was on the host that pushed it.
    pub was: String,
    /// Where it is now.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Whether an image of its identity and length was there already, and so was not fetched.
    pub was_there: bool,
}

/// A snapshot that was brought back.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pulled {
    /// Its manifest.
    pub manifest: SnapshotManifest,
    /// Its files, the image last.
    pub files: Vec<PulledFile>,
    /// Bytes that were fetched.
    pub fetched: u64,
}

/// Brings a snapshot back as files. Each has its name when it is whole, the image last.
///
/// # Errors
/// When a file can't be written, or what is stored of it can't be read or is damaged.
pub fn pull(
    repository: &Repository,
    manifest: SnapshotManifest,
    options: &PullOptions,
    mut on_progress: impl FnMut(Moved) + Send,
) -> Result<Pulled, RepositoryError> {
    let places = places(&manifest, options)?;
    let lease = Held::put(repository, &Lease::reading(&manifest))?;
    let total = places.iter().map(|(file, _)| file.len).sum();
    let mut fetched = 0;
    let mut before = 0;
    let files = lease.while_held(|| {
        let mut files = Vec::new();
        for (file, path) in &places {
            let was_there = is_there(file, path);
            if !was_there {
                let target = Target::create(path, options.force)?;
                let map = repository.map(file)?;
                let sent = fetched;
                fetched += write(repository, &map, target.file(), path, &mut |done, got| {
                    on_progress(Moved { done: before + done, total, sent: sent + got });
                })?;
                target.commit()?;
            }
            before += file.len;
            on_progress(Moved { done: before, total, sent: fetched });
            let (was, path) = (file.path.clone(), path.clone());
            files.push(PulledFile { role: file.role, was, path, bytes: file.len, was_there });
        }
        Ok(files)
    })?;
    Ok(Pulled { manifest, files, fetched })
}

/// Whether an image of that identity and length is there: a parent that an earlier pull has brought.
fn is_there(file: &FileRef, path: &Path) -> bool {
    let same = |found: crate::image::Overview| {
        file.image == Some(found.manifest.identity) && file.len == found.file_len
    };
    file.role == Role::Parent && crate::image::inspect(path).is_ok_and(same)
}

/// Where each file goes, the image last.
fn places<'a>(
    manifest: &'a SnapshotManifest,
    options: &PullOptions,
) -> Result<Vec<(&'a FileRef, PathBuf)>, RepositoryError> {
    let wrong = |problem: String| Err(RepositoryError::Options(problem));
    let image = &options.image;
    let Some(name) = image.file_name() else {
        return wrong(format!("`{}` names no file", image.display()));
    };
    let directory = image.parent().unwrap_or(Path::new(""));
    let mut places: Vec<(&FileRef, PathBuf)> = Vec::new();
    let mut taken: HashMap<PathBuf, &str> = HashMap::new();
    for file in &manifest.files {
        let path = match file.role {
            Role::Image => image.clone(),
            Role::WorkingSet => crate::memory::working_set::path_for(image),
            Role::Disk if options.no_disks => continue,
            Role::Parent | Role::Disk => {
                let plain = Path::new(file.name()).file_name();
                let Some(plain) = plain.filter(|plain| plain.to_str() == Some(file.name())) else {
                    return wrong(format!("`{}` names no file", file.path));
                };
                match file.role {
                    // Where the image looks for it.
                    Role::Parent => directory.join(plain),
                    _ => {
                        let mut beside = name.to_owned();
                        beside.push(".disks");
                        directory.join(beside).join(plain)
                    }
                }
            }
        };
        // Two disks of one name in two directories.
        let path = match (file.role, taken.contains_key(&path)) {
            (Role::Disk, true) => {
                let id = &file.map.to_string()[..8];
                path.with_file_name(format!("{id}-{}", file.name()))
            }
            (_, true) => return wrong(format!("two of its files are called `{}`", file.name())),
            _ => path,
        };
        taken.insert(path.clone(), &file.path);
        places.push((file, path));
    }
    places.sort_by_key(|(file, _)| file.role == Role::Image);
    for (_, path) in places.iter().filter(|(file, _)| file.role == Role::Disk) {
        let parent = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(|e| RepositoryError::io("making", parent, e))?;
    }
    Ok(places)
}

/// Writes a file. Returns the bytes that were fetched for it.
pub fn write(
    repository: &Repository,
    map: &FileMap,
    file: &File,
    path: &Path,
    on_progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<u64, RepositoryError> {
    let io = |error| RepositoryError::io("writing", path, error);
    file.set_len(map.len).map_err(io)?;
    for part in &map.inline {
        file.write_all_at(&part.bytes, part.offset).map_err(io)?;
    }
    let parts = parts(&map.extents);
    let (next, fetched, done) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (failed, told) = (Mutex::new(None), Mutex::new((Instant::now(), on_progress)));
    let cancel = repository.access.cancel();
    let work = || -> Result<(), RepositoryError> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(part) = parts.get(number) else { return Ok(()) };
            if cancel.is_requested() {
                return Err(RepositoryError::Interrupted);
            }
            let read = repository.read_extents(part)?;
            for (extent, bytes) in part.iter().zip(&read) {
                file.write_all_at(bytes, extent.offset).map_err(io)?;
            }
            let got: u64 = part.iter().map(|extent| u64::from(extent.stored)).sum();
            let got = fetched.fetch_add(got, Ordering::Relaxed) + got;
            let wrote: u64 = part.iter().map(|extent| u64::from(extent.raw)).sum();
            let wrote = done.fetch_add(wrote, Ordering::Relaxed) + wrote;
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if told.0.elapsed() >= TOLD_EVERY {
                told.0 = Instant::now();
                (told.1)(wrote, got);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS.min(parts.len()) {
            scope.spawn(|| {
                if let Err(error) = work() {
                    next.store(parts.len(), Ordering::Relaxed);
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(fetched.into_inner()),
    }
}

/// Extents that are asked for together.
pub fn parts(extents: &[Extent]) -> Vec<&[Extent]> {
    let (mut parts, mut from, mut bytes) = (Vec::new(), 0, 0);
    for (number, extent) in extents.iter().enumerate() {
        if bytes >= PART {
            parts.push(&extents[from..number]);
            (from, bytes) = (number, 0);
        }
        bytes += u64::from(extent.stored);
    }
    if from < extents.len() {
        parts.push(&extents[from..]);
    }
    parts
}
