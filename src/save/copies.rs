//! Copies of captured disks, made from the frozen files: with them a snapshot is complete, and the
//! guest goes back to its own files.
//!
//! The disks are frozen under overlays as for any save, and the copies are made at leisure behind it.
//! QEMU could copy its disks itself (`blockdev-backup`), but each first write of the guest would
//! wait for a copy of what it replaces, and fail if the copy's file system is full.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::checked::Checked;
use super::copy_error::CopyError;
use super::options::{DiskChoice, SaveOptions};
use crate::cancel::Cancellation;
use crate::guest::FoundDisk;
use crate::host::program::{ProgramError, answer, ends_with_us};
use crate::image::Compression;

/// The program that copies.
const QEMU_IMG: &str = "qemu-img";

/// How long a copy may take at most. A guess that no disk exceeds: one that is stuck is interrupted
/// by its user.
const LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);

/// A captured disk's copy.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DiskCopy {
    /// The disk, as [`Disk::describe`](crate::machine::Disk::describe) calls it.
    pub disk: String,
    /// The frozen file, and its format.
    from: String,
    from_format: String,
    /// The copy, an absolute path.
    pub path: String,
    /// Whether the copy shares the blocks of the frozen file, until one of the two is written.
    reflink: bool,
}

/// How copies are written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Copying {
    /// Whether they are compressed.
    pub compress: bool,
    /// The most bytes a second.
    pub rate: Option<u64>,
}

impl DiskCopy {
    /// Chooses the files of the copies, one for each captured disk, in their order; none where none
    /// are asked for. Nothing is made yet.
    pub fn plan(checked: &Checked, options: &SaveOptions) -> Vec<DiskCopy> {
        let reflink = match options.disks {
            DiskChoice::Copy => false,
            DiskChoice::Reflink => true,
            DiskChoice::Overlay | DiskChoice::None => return Vec::new(),
        };
        let random = Uuid::new_v4().simple().to_string();
        let tag = &random[..8];
        let plan = |(number, found): (usize, &FoundDisk)| {
            let from = found.disk.chain.first()?;
            let path = match reflink {
                true => beside(Path::new(&from.path), number, tag),
                false => beside_image(&options.image, number, tag)?,
            };
            Some(DiskCopy {
                disk: found.disk.describe(),
                from: from.path.clone(),
                from_format: from.format.clone(),
                path: path.to_str()?.to_owned(),
                reflink,
            })
        };
        checked.captured().enumerate().filter_map(plan).collect()
    }

    /// The format of the copy: a clone keeps that of its original.
    pub fn format(&self) -> &str {
        if self.reflink { &self.from_format } else { "qcow2" }
    }

    /// Whether the files below the frozen one are still needed: a clone refers to them as its
    /// original does, a copy holds all.
    pub fn needs_chain(&self) -> bool {
        self.reflink
    }

    /// Makes the copy, durably, and returns how many bytes it takes on disk. The frozen file must not
    /// change meanwhile. What is there of one that fails is left to [`DiskCopy::remove`].
    ///
    /// # Errors
    /// When it can't be written, or is cancelled: `None`.
    pub fn make(&self, how: Copying, cancel: &Cancellation) -> Result<u64, Option<CopyError>> {
        let path = PathBuf::from(&self.path);
        let failed =
            |source| Some(CopyError::Write { path: path.clone(), disk: self.disk.clone(), source });
        // Not made by the tool, which would let others read it.
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(failed)?;
        match self.reflink {
            true => self.clone_into(&file).map_err(Some)?,
            false => self.copy(how, cancel)?,
        }
        file.sync_all().map_err(failed)?;
        Ok(file.metadata().map_err(failed)?.blocks() * 512)
    }

    fn clone_into(&self, file: &File) -> Result<(), CopyError> {
        let from = File::open(&self.from);
        from.and_then(|from| reflink(&from, file))
            .map_err(|source| CopyError::NoReflink { file: PathBuf::from(&self.from), source })
    }

    fn copy(&self, how: Copying, cancel: &Cancellation) -> Result<(), Option<CopyError>> {
        let mut command = Command::new(QEMU_IMG);
        command.args(["convert", "-O", "qcow2", "-f", &self.from_format]);
        if how.compress {
            command.args(["-c", "-o", "compression_type=zstd"]);
        }
        if let Some(rate) = how.rate {
            command.args(["-r", &rate.to_string()]);
        }
        command.args([&self.from, &self.path]);
        ends_with_us(&mut command);
        let failed = |says| CopyError::Failed {
            path: PathBuf::from(&self.path),
            disk: self.disk.clone(),
            says,
        };
        match answer(command, Vec::new(), LIMIT, cancel) {
            Ok(answer) if answer.status.success() => Ok(()),
            Ok(answer) => {
                Err(Some(failed(String::from_utf8_lossy(&answer.stderr).trim().to_owned())))
            }
            Err(ProgramError::Stopped) => Err(None),
            Err(ProgramError::Run(error)) => Err(Some(CopyError::NoTool(error))),
            Err(late @ ProgramError::Late(_)) => Err(Some(failed(late.to_string()))),
        }
    }

    /// Removes the copy, if it was made.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Finds out ahead of a save whether these disks, if any, can be copied as the options ask for.
///
/// # Errors
/// When they can't.
pub(super) fn check<'a>(
    options: &SaveOptions,
    files: impl Iterator<Item = &'a str>,
) -> Result<(), CopyError> {
    check_with(QEMU_IMG, options, files)
}

/// The same with any program that copies.
fn check_with<'a>(
    tool: &str,
    options: &SaveOptions,
    files: impl Iterator<Item = &'a str>,
) -> Result<(), CopyError> {
    let mut files = files.peekable();
    if files.peek().is_none() {
        return Ok(());
    }
    match options.disks {
        DiskChoice::Copy => {
            let mut command = Command::new(tool);
            command.arg("--version").stdout(Stdio::null());
            command.status().map(drop).map_err(CopyError::NoTool)
        }
        DiskChoice::Reflink => files.map(Path::new).try_for_each(|file| {
            try_reflink(file)
                .map_err(|source| CopyError::NoReflink { file: file.to_owned(), source })
        }),
        DiskChoice::Overlay | DiskChoice::None => Ok(()),
    }
}

/// Makes a clone of the file and throws it away.
fn try_reflink(file: &Path) -> io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    let mut options = File::options();
    options.write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    reflink(&File::open(file)?, &options.open(directory)?)
}

nix::ioctl_write_int_bad!(ficlone, linux_raw_sys::ioctl::FICLONE);

/// Has `to` share all blocks of `from`: ioctl_ficlone(2).
fn reflink(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: the request takes two descriptors, both open, and touches no memory of ours.
    unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd()) }?;
    Ok(())
}

/// The name of a copy beside the image.
fn beside_image(image: &Path, number: usize, tag: &str) -> Option<PathBuf> {
    let image = std::path::absolute(image).ok()?;
    let name = image.file_name()?.to_string_lossy().into_owned();
    Some(image.with_file_name(format!("{name}.disk{number}-{tag}.qcow2")))
}

/// The name of a clone beside its original: only the same file system can share blocks.
fn beside(file: &Path, number: usize, tag: &str) -> PathBuf {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let end = file.extension().map(|end| format!(".{}", end.to_string_lossy()));
    file.with_file_name(format!("{stem}.copy{number}-{tag}{}", end.unwrap_or_default()))
}

impl Copying {
    /// As the options ask for.
    pub fn of(options: &SaveOptions) -> Copying {
        Copying { compress: options.compression != Compression::None, rate: options.bandwidth }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_without_disks_needs_no_tool() {
        let check = |disks, files: &[&str]| {
            let mut options = SaveOptions::new("qmp.sock", "vm.snap");
            options.disks = disks;
            check_with("/nowhere/qemu-img", &options, files.iter().copied())
        };
        assert!(check(DiskChoice::Copy, &[]).is_ok());
        assert!(check(DiskChoice::Reflink, &[]).is_ok());
        assert!(check(DiskChoice::Overlay, &["/disk.raw"]).is_ok());
        let missing = check(DiskChoice::Copy, &["/disk.raw"]);
        assert!(matches!(missing, Err(CopyError::NoTool(_))), "{missing:?}");
    }
}
