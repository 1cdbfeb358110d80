//! Images in files.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::host::sandbox;
use crate::image::format::error::ImageError;
use crate::image::store::{Neighbour, Store};

/// A regular file. It is read with pread(2).
pub(in crate::image) struct FileStore {
    path: PathBuf,
    /// The path as text, for error messages.
    name: String,
    file: File,
    len: u64,
}

impl FileStore {
    /// Opens a file.
    ///
    /// # Errors
    /// [`ImageError::Io`] when it can't be opened, [`ImageError::NotRegular`] when it is
    /// something else than a regular file.
    pub fn open(path: &Path) -> Result<FileStore, ImageError> {
        let io = |error| ImageError::io("open", path, error);
        let file = sandbox::open(path).map_err(io)?;
        FileStore::of(file, path)
    }

    /// A file that is open already; `path` is where it was opened.
    ///
    /// # Errors
    /// As for [`FileStore::open`].
    pub fn of(file: File, path: &Path) -> Result<FileStore, ImageError> {
        let metadata = file.metadata().map_err(|error| ImageError::io("open", path, error))?;
        if !metadata.is_file() {
            return Err(ImageError::NotRegular(path.to_owned()));
        }
        let name = path.display().to_string();
        Ok(FileStore { path: path.to_owned(), name, file, len: metadata.len() })
    }
}

impl Store for FileStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, position)
    }

    /// Looks at the relative path as seen from the directory in which the file really lies,
    /// at the absolute path, and for a file of the same name in that directory.
    fn neighbours<'a>(
        &'a self,
        relative: &str,
        absolute: &str,
    ) -> Box<dyn Iterator<Item = Neighbour> + 'a> {
        let real = fs::canonicalize(&self.path).ok();
        let path = real.as_deref().unwrap_or(&self.path);
        let directory = path.parent().unwrap_or(Path::new("."));
        let absolute = PathBuf::from(absolute);
        let beside = absolute.file_name().map(|name| directory.join(name));
        let mut places = vec![directory.join(relative)];
        for place in [Some(absolute), beside].into_iter().flatten() {
            // `..` goes through links as the file system does; equal texts mean equal places.
            if !places.contains(&place) {
                places.push(place);
            }
        }
        Box::new(places.into_iter().map(|place| Neighbour {
            name: place.display().to_string(),
            store: FileStore::open(&place).map(|store| Box::new(store) as Box<dyn Store>),
        }))
    }

    fn look_again(&self, is_same: &dyn Fn(&dyn Store) -> bool) {
        let identity = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        let Ok(other) = FileStore::open(&self.path) else { return };
        let (Ok(old), Ok(new)) = (identity(&self.file), identity(&other.file)) else { return };
        if old == new || other.len != self.len || !is_same(&other) {
            return;
        }
        // SAFETY: dup3(2) takes numbers. Both descriptors are open: their owners are borrowed.
        // It replaces ours in one step, so that a thread that reads at the same time reads from
        // one file or the other, and it stays ours to close.
        let replaced =
            unsafe { libc::dup3(other.file.as_raw_fd(), self.file.as_raw_fd(), libc::O_CLOEXEC) };
        match replaced {
            -1 => tracing::warn!("`{}`: {}", self.name, io::Error::last_os_error()),
            _ => tracing::info!("`{}` has been replaced: it is read from now on", self.name),
        }
    }

    fn file(&self) -> Option<(&Path, &File)> {
        Some((&self.path, &self.file))
    }
}
