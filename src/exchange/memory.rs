//! Plain memory: a directory with one sparse file for each block.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::pages::for_each;
use super::{ExchangeError, Watch};
use crate::host::paths::parent_directory;
use crate::image::{Image, ImageError, Piece};
use crate::page::Block;

/// Writes an image's memory into a new directory. Returns the length of all files in bytes.
pub(super) fn write(
    image: &Arc<Image>,
    path: &Path,
    watch: &mut Watch<'_>,
) -> Result<u64, ExchangeError> {
    let directory = Directory::create(path)?;
    let blocks = &image.manifest().blocks;
    let mut files = Vec::with_capacity(blocks.len());
    for (block, name) in blocks.iter().zip(file_names(blocks)) {
        files.push(directory.file(&name, block.len)?);
    }
    for_each(image, watch, |piece| match piece {
        Piece::Zeros(_) => Ok(()),
        Piece::Data(run, bytes) => {
            let written = files[run.block.index()].write_all_at(bytes, run.offset());
            written.map_err(|e| directory.failed("write", e))
        }
    })?;
    for file in &files {
        // Each may take as long as the disk needs for all of it.
        watch.check()?;
        file.sync_all().map_err(|e| directory.failed("write out", e))?;
    }
    watch.check()?;
    directory.commit()?;
    Ok(blocks.iter().map(|block| block.len).sum())
}

/// A file name for each block: its own, as far as a file can have it.
fn file_names(blocks: &[Block]) -> Vec<String> {
    let mut taken = HashSet::new();
    let fitting = |c: char| if c == '/' || c.is_control() { '_' } else { c };
    let name = |(number, block): (usize, &Block)| {
        let mut name: String = block.name.chars().map(fitting).collect();
        // With the ending, a name has at most 255 bytes (`NAME_MAX`, limits.h).
        if name.is_empty() || name.starts_with('.') || name.len() > 240 || taken.contains(&name) {
            name = format!("block-{number}");
        }
        taken.insert(name.clone());
        format!("{name}.ram")
    };
    blocks.iter().enumerate().map(name).collect()
}

/// A directory that gets its name once it is complete. Dropped before, it is removed.
struct Directory {
    path: PathBuf,
    /// Its name until then; none once it has its own.
    hidden: Option<PathBuf>,
}

impl Directory {
    fn create(path: &Path) -> Result<Directory, ExchangeError> {
        let Some(name) = path.file_name() else {
            return Err(ImageError::NoFileName(path.to_owned()).into());
        };
        if path.symlink_metadata().is_ok() {
            return Err(ImageError::Exists(path.to_owned()).into());
        }
        // Short enough beside any name that a file system takes.
        let mark: String = name.to_string_lossy().chars().take(40).collect();
        let hidden = path.with_file_name(format!(".{mark}.{}.tmp", Uuid::new_v4().simple()));
        let made = DirBuilder::new().mode(0o700).create(&hidden);
        made.map_err(|e| ImageError::io("create", path, e))?;
        Ok(Directory { path: path.to_owned(), hidden: Some(hidden) })
    }

    /// A new file in it, all of it a hole.
    fn file(&self, name: &str, len: u64) -> Result<File, ExchangeError> {
        let path = self.hidden.as_deref().unwrap_or(&self.path).join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|e| self.failed("create a file in", e))?;
        file.set_len(len).map_err(|e| self.failed("write", e))?;
        Ok(file)
    }

    fn commit(mut self) -> Result<(), ExchangeError> {
        let Some(hidden) = &self.hidden else { return Ok(()) };
        let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
        let (from, to) = (nix::fcntl::AT_FDCWD, nix::fcntl::AT_FDCWD);
        match nix::fcntl::renameat2(from, hidden, to, &self.path, flags) {
            Ok(()) => {}
            // The file system does not know the flag (rename(2)); a directory is replaced
            // only if it is empty.
            Err(nix::errno::Errno::EINVAL) => {
                fs::rename(hidden, &self.path).map_err(|e| self.failed("give its name to", e))?;
            }
            Err(errno) => return Err(self.failed("give its name to", errno.into())),
        }
        self.hidden = None;
        let parent = parent_directory(&self.path);
        let synced = File::open(parent).and_then(|directory| directory.sync_all());
        synced.map_err(|e| self.failed("write out the directory of", e))
    }

    fn failed(&self, doing: &'static str, error: std::io::Error) -> ExchangeError {
        ImageError::io(doing, &self.path, error).into()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // A failure can't be reported from here; the directory's name says what it was.
            let _ = fs::remove_dir_all(hidden);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_a_file_of_its_own() {
        let block = |name: &str| Block { name: name.into(), len: 4096, page_size: 4096 };
        let blocks = ["pc.ram", "0000:00:02.0/vga.vram", "a/b", "a_b", "..", ""].map(block);
        let names = file_names(&blocks);
        let expected = [
            "pc.ram.ram",
            "0000:00:02.0_vga.vram.ram",
            "a_b.ram",
            "block-3.ram",
            "block-4.ram",
            "block-5.ram",
        ];
        assert_eq!(names, expected);
    }
}
