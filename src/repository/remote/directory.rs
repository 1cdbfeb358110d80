//! A store that is a directory: what is done to many objects there at once is done by threads of our
//! own. The store's library hands each of them to another thread, which takes longer than the work.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Listing;

/// Threads at most. The kernel does the work; it waits for the disk in some file systems.
const THREADS: usize = 8;
/// What a thread takes at a time: neighbours, which lie in one directory.
const AT_ONCE: usize = 256;

/// A store that is a directory.
pub struct Directory(pub PathBuf);

/// Whether an object of this key has the same name in the directory. Others are the library's to name.
fn is_plain(key: &str) -> bool {
    key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_'))
}

impl Directory {
    /// Removes objects, those that are there. Returns the keys of those that can't be removed so.
    pub fn remove(&self, keys: Vec<String>) -> Vec<String> {
        let pieces: Vec<&[String]> = keys.chunks(AT_ONCE).collect();
        in_threads(&pieces, |keys, left: &mut Vec<String>| {
            for key in keys.iter() {
                let removed = is_plain(key) && {
                    let removed = fs::remove_file(self.0.join(key));
                    removed.map_or_else(|error| error.kind() == ErrorKind::NotFound, |()| true)
                };
                if !removed {
                    left.push(key.clone());
                }
            }
        })
    }

    /// Lists what lies in these directories, which hold nothing but objects with plain names. `None`
    /// where that can't be done so.
    pub fn list(&self, under: &[String]) -> Option<Vec<Listing>> {
        let failed = AtomicUsize::new(0);
        let found = in_threads(under, |under, found| {
            if !is_plain(under) || self.list_one(under, found).is_err() {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        });
        (failed.into_inner() == 0).then_some(found)
    }

    fn list_one(&self, under: &str, found: &mut Vec<Listing>) -> io::Result<()> {
        let entries = match fs::read_dir(self.0.join(under)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            // The library writes under other names.
            let Some(name) = name.to_str().filter(|name| is_plain(name)) else { continue };
            match entry.metadata() {
                Ok(meta) if meta.is_file() => found.push(Listing {
                    key: format!("{under}/{name}"),
                    len: meta.len(),
                    put_ms: meta.mtime() * 1000,
                }),
                Ok(_) => return Err(ErrorKind::IsADirectory.into()),
                // Removed meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Does work on pieces in several threads, and returns all that they have collected, in any order.
fn in_threads<P: Sync, T: Send>(pieces: &[P], work: impl Fn(&P, &mut Vec<T>) + Sync) -> Vec<T> {
    let (next, all) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS.min(pieces.len()) {
            scope.spawn(|| {
                let mut mine = Vec::new();
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(piece, &mut mine);
                }
                all.lock().unwrap_or_else(PoisonError::into_inner).append(&mut mine);
            });
        }
    });
    all.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_listed_and_removed_and_others_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory(folder.path().to_owned());
        let path = |key: &str| folder.path().join(key);
        for under in ["packs/00", "packs/01"] {
            fs::create_dir_all(path(under)).unwrap();
        }
        let keys: Vec<String> = (0..600).map(|n| format!("packs/{:02}/{n:04x}", n % 2)).collect();
        keys.iter().for_each(|key| fs::write(path(key), key).unwrap());
        // As the library calls what it has not put yet.
        fs::write(path("packs/00/ffff#1"), "").unwrap();
        let under: Vec<String> = (0..3).map(|n| format!("packs/{n:02}")).collect();
        let mut listed = directory.list(&under).unwrap();
        listed.sort_by(|a, b| a.key.cmp(&b.key));
        assert_eq!(listed.len(), keys.len());
        assert_eq!((listed[0].key.as_str(), listed[0].len), ("packs/00/0000", 13));
        assert!(listed[0].put_ms > 1_700_000_000_000);

        let mut wanted = keys.clone();
        wanted.extend(["packs/00/absent".to_owned(), "tags/a%2Fb".to_owned()]);
        assert_eq!(directory.remove(wanted), ["tags/a%2Fb"]);
        assert_eq!(directory.list(&under).unwrap(), []);
        assert!(path("packs/00/ffff#1").exists());
        fs::create_dir(path("packs/00/0000")).unwrap();
        assert_eq!(directory.list(&under), None);
    }
}
