//! What was fetched from repositories, on this host's disk.
//!
//! One file for each object, as the repository stores it: encrypted where the repository is, and
//! verified by its name whenever it is read. So a cache may be shared by any number of processes, and
//! be damaged or removed at any time.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// How much is written between two looks at how much there is.
const LOOK_EVERY: u64 = 256 << 20;
/// How much is removed once there is too much: so many percent of what may be there.
const REMOVE_PERCENT: u64 = 10;

/// Where things are kept, and how many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CacheOptions {
    /// The directory. By default `$XDG_CACHE_HOME/snapback`, or `~/.cache/snapback`.
    pub directory: PathBuf,
    /// The most bytes on disk. What was not used for the longest time goes first.
    pub bytes: u64,
}

impl Default for CacheOptions {
    fn default() -> CacheOptions {
        let home = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let base = match (home("XDG_CACHE_HOME"), home("HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => Path::new(&home).join(".cache"),
            (None, None) => std::env::temp_dir(),
        };
        CacheOptions { directory: base.join("snapback"), bytes: 16 << 30 }
    }
}

/// A cache on disk.
#[derive(Debug)]
pub struct Cache {
    options: CacheOptions,
    /// Bytes written since it was looked how much there is.
    written: AtomicU64,
}

impl Cache {
    /// Opens a cache, and makes its directory.
    ///
    /// # Errors
    /// When that can't be made.
    pub fn open(options: CacheOptions) -> io::Result<Cache> {
        DirBuilder::new().recursive(true).mode(0o700).create(&options.directory)?;
        // Others may have filled it.
        Ok(Cache { options, written: AtomicU64::new(LOOK_EVERY) })
    }

    /// The path of a file of ours that is no object, such as a working set that is recorded here.
    pub fn path(&self, name: &str) -> PathBuf {
        self.options.directory.join(name)
    }

    /// What is kept under a name, if anything is. Whoever reads it verifies it.
    pub fn find(&self, name: &str) -> Option<Vec<u8>> {
        let path = self.place(name);
        let bytes = fs::read(&path).ok()?;
        // Used last now. It is only a hint.
        let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(bytes)
    }

    /// Whether something is kept under a name.
    pub fn has(&self, name: &str) -> bool {
        self.place(name).exists()
    }

    /// Keeps something. That it can't be kept is no error: it will be fetched again.
    pub fn keep(&self, name: &str, bytes: &[u8]) {
        if let Err(error) = self.try_keep(name, bytes) {
            tracing::debug!("nothing is kept in {}: {error}", self.options.directory.display());
        }
        let written = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if written >= LOOK_EVERY && self.written.swap(0, Ordering::Relaxed) >= LOOK_EVERY {
            self.make_room();
        }
    }

    /// Removes what was found to be damaged.
    pub fn remove(&self, name: &str) {
        let _ = fs::remove_file(self.place(name));
    }

    fn place(&self, name: &str) -> PathBuf {
        self.options.directory.join(&name[..name.len().min(2)]).join(name)
    }

    fn try_keep(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let place = self.place(name);
        let directory = place.parent().unwrap_or(&self.options.directory);
        let new = directory.join(format!(".{}", Uuid::new_v4().simple()));
        let create = || File::options().write(true).create_new(true).mode(0o600).open(&new);
        let file = match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
                create()
            }
            file => file,
        };
        let written = file.and_then(|mut file| file.write_all(bytes));
        let named = written.and_then(|()| fs::rename(&new, &place));
        if named.is_err() {
            let _ = fs::remove_file(&new);
        }
        named
    }

    /// Removes what was not used for the longest time, if there is too much.
    fn make_room(&self) {
        let mut found: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        let directories = fs::read_dir(&self.options.directory).into_iter().flatten().flatten();
        for directory in directories.filter(|entry| entry.path().is_dir()) {
            for entry in fs::read_dir(directory.path()).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                found.push((used, meta.blocks() * 512, entry.path()));
            }
        }
        let total: u64 = found.iter().map(|(_, bytes, _)| bytes).sum();
        if total <= self.options.bytes {
            return;
        }
        let mut due = total - self.options.bytes + self.options.bytes / 100 * REMOVE_PERCENT;
        found.sort_unstable();
        for (_, bytes, path) in found {
            let _ = fs::remove_file(path);
            due = due.saturating_sub(bytes);
            if due == 0 {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found_and_the_oldest_goes() {
        let directory = tempfile::tempdir().unwrap();
        let open = |bytes| {
            let directory = directory.path().join("cache");
            Cache::open(CacheOptions { directory, bytes }).unwrap()
        };
        let cache = open(1 << 20);
        for number in 0..40 {
            cache.keep(&format!("{number:04x}"), &vec![number; 64 << 10]);
            let file = cache.place(&format!("{number:04x}"));
            let used = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(number));
            File::open(file).unwrap().set_modified(used).unwrap();
        }
        // It is looked when it is opened, as others may have filled it.
        let cache = open(1 << 20);
        assert_eq!(cache.find("0000"), Some(vec![0; 64 << 10]));
        cache.keep("ffff", &[1]);
        assert!(cache.has("0000") && cache.has("0027") && cache.has("ffff"));
        assert!(!cache.has("0001") && cache.find("0001").is_none());
        cache.remove("0000");
        assert!(!cache.has("0000"));
    }
}
