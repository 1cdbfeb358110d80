//! Private directories that go with their owner.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// A new directory that only its owner may enter (0700). Dropping it removes it with all
/// that is in it.
#[derive(Debug)]
pub(super) struct Directory(PathBuf);

impl Directory {
    /// Makes one in `parent`. Its name is short, for sockets in it: the path of a Unix
    /// socket has at most 107 bytes (unix(7)).
    pub fn new(parent: &Path) -> io::Result<Directory> {
        let unique = Uuid::new_v4().simple().to_string();
        let path = parent.join(format!(".snapback-{}", &unique[..12]));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Directory(path))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("the directory `{}` can't be removed: {error}", self.0.display());
        }
    }
}
