//! Checks of the places where image and overlays are to be written.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::error::CheckError;
use crate::guest::FoundDisk;
use crate::host::paths::parent_directory;
use crate::host::procfs::memory_in_use;
use crate::image::Compression;
use crate::machine::{Disk, DiskFile, DiskRole};
use crate::qmp::RamBlock;
use crate::save::error::SaveError;
use crate::save::options::{DiskChoice, SaveOptions};
use crate::save::overlays::overlay_directory;
use crate::save::undo::journal::Journal;

/// How much smaller than memory a compressed image is expected to be at the least. A
/// guess: a disk that fills up later is an error that leaves the guest as it was.
const COMPRESSED_SHARE: u64 = 4;

/// Room that an overlay needs at the least, in bytes. What the guest writes while its
/// memory is saved has to fit as well, but that can't be known ahead.
const OVERLAY_ROOM: u64 = 16 << 20;

/// Whether image and overlays can be written where they are to be, and fit. An image
/// holds at most the memory that the guest has ever touched, which is at most what
/// QEMU's process uses.
pub(super) fn check_room(
    options: &SaveOptions,
    blocks: &[RamBlock],
    pid: i32,
    disks: &[FoundDisk],
) -> Result<String, SaveError> {
    let image = &options.image;
    if !image.as_os_str().is_empty() {
        Journal::check(image)?;
        if !options.without_image {
            crate::image::check_target(image, options.force)?;
        }
    }
    let share = if options.compression == Compression::None { 1 } else { COMPRESSED_SHARE };
    let ram: u64 = blocks.iter().map(|block| block.used_len).sum();
    let needed = match options.parent {
        // How much differs from the parent can't be known ahead.
        Some(_) => 0,
        None if options.without_image => 0,
        None => ram.min(memory_in_use(pid)) / share,
    };
    let directory = parent_directory(image);
    let hint = ", or use `Compression::Zstd`";
    let free = check_free("the image", directory, needed, if share == 1 { hint } else { "" })?;
    for found in disks.iter().filter(|found| found.disk.role == DiskRole::Captured) {
        let Some(below) = found.disk.chain.first() else { continue };
        let asked = options.overlay_dir.as_deref();
        let directory = overlay_directory(asked, Path::new(&below.path), image);
        check_free(
            "a disk's overlay",
            &directory,
            OVERLAY_ROOM,
            " with `SaveOptions::overlay_dir`",
        )?;
    }
    if options.disks == DiskChoice::Copy {
        let captured = disks.iter().filter(|found| found.disk.role == DiskRole::Captured);
        let stored: u64 = captured.map(|found| stored_bytes(&found.disk)).sum();
        check_free(
            "the image and the copies of its disks",
            directory,
            needed + stored / share,
            hint,
        )?;
    }
    Ok(format!("{} MiB free for the image, about {} needed at most", free >> 20, needed >> 20))
}

/// What the files of a disk take on disk: its copy needs no more, if they are not compressed.
fn stored_bytes(disk: &Disk) -> u64 {
    let stored = |file: &DiskFile| std::fs::metadata(&file.path).map(|meta| meta.blocks() * 512);
    disk.chain.iter().filter_map(|file| stored(file).ok()).sum()
}

/// Bytes that are free in a directory, if they are enough.
fn check_free(
    what: &'static str,
    directory: &Path,
    needed: u64,
    hint: &'static str,
) -> Result<u64, CheckError> {
    let stat = nix::sys::statvfs::statvfs(directory).map_err(|errno| CheckError::Directory {
        directory: directory.to_owned(),
        source: errno.into(),
    })?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < needed {
        let (directory, free, needed) = (directory.to_owned(), free >> 20, needed >> 20);
        return Err(CheckError::Room { what, directory, free, needed, hint });
    }
    Ok(free)
}
