//! A file that gets its name when it is complete, and otherwise leaves nothing.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use uuid::Uuid;

use crate::host::paths::parent_directory;
use crate::image::format::error::ImageError;

/// Checks that an image can be written to `path`, by trying. Leaves nothing.
///
/// # Errors
/// When the directory can't be written to, or when there is something of that name
/// already that `force` does not allow to replace.
pub fn check_target(path: &Path, force: bool) -> Result<(), ImageError> {
    Target::create(path, force).map(drop)
}

/// Checks that a file that is written to `target` replaces none of those that it is made of
/// or refers to, each given with its path.
///
/// # Errors
/// [`ImageError::Replaces`] when it would replace one of them.
pub(crate) fn check_replaces_none<'a>(
    target: &Path,
    needed: impl IntoIterator<Item = (&'a Path, &'a File)>,
) -> Result<(), ImageError> {
    let same = |file: fs::Metadata| (file.dev(), file.ino());
    let Ok(replaced) = fs::metadata(target).map(same) else { return Ok(()) };
    for (path, file) in needed {
        if same(file.metadata().map_err(|e| ImageError::io("look at", path, e))?) == replaced {
            let (path, needed) = (target.to_owned(), path.to_owned());
            return Err(ImageError::Replaces { path, needed });
        }
    }
    Ok(())
}

/// A file under construction, mode 0600, in the directory of its later name.
///
/// Where the file system has `O_TMPFILE` (open(2)) the file has no name at all
/// until [`Target::commit`]; elsewhere it has a hidden one that is removed on
/// drop. The directory is held open: renaming it does not lead the file astray.
pub(crate) struct Target {
    path: PathBuf,
    directory: File,
    name: OsString,
    force: bool,
    file: File,
    /// The hidden name, while there is one.
    hidden: Option<OsString>,
}

impl Target {
    /// Starts a file that is to be called `path`. With `force` it may replace a
    /// regular file of that name; without, such a file is an error, now and in
    /// [`Target::commit`].
    pub fn create(path: &Path, force: bool) -> Result<Target, ImageError> {
        let name =
            path.file_name().ok_or_else(|| ImageError::NoFileName(path.to_owned()))?.to_owned();
        let parent = parent_directory(path);
        let directory =
            File::open(parent).map_err(|e| ImageError::io("open the directory of", path, e))?;
        match fstatat(&directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat)
                if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG =>
            {
                return Err(ImageError::NotRegular(path.to_owned()));
            }
            Ok(_) if !force => return Err(ImageError::Exists(path.to_owned())),
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(ImageError::io("look for", path, errno.into())),
        }
        let (file, hidden) =
            open(&directory, &name).map_err(|e| ImageError::io("create", path, e.into()))?;
        Ok(Target { path: path.to_owned(), directory, name, force, file, hidden })
    }

    /// The later name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file durable, then gives it its name, then makes that durable.
    pub fn commit(mut self) -> Result<(), ImageError> {
        self.file.sync_all().map_err(|e| ImageError::io("write out", &self.path, e))?;
        self.link().map_err(|errno| match errno {
            Errno::EEXIST if !self.force => ImageError::Exists(self.path.clone()),
            errno => ImageError::io("give its name to", &self.path, errno.into()),
        })?;
        self.directory
            .sync_all()
            .map_err(|e| ImageError::io("write out the directory of", &self.path, e))
    }

    fn link(&mut self) -> nix::Result<()> {
        let (directory, name) = (&self.directory, self.name.as_os_str());
        let Some(hidden) = self.hidden.clone() else {
            // As open(2) shows under O_TMPFILE; it needs no capability.
            let open_file = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
            let give = |name: &OsStr| {
                linkat(AT_FDCWD, &open_file, directory, name, AtFlags::AT_SYMLINK_FOLLOW)
            };
            if !self.force {
                return give(name);
            }
            // linkat(2) never replaces a file and rename(2) needs a first name.
            let hidden = hidden_name(name);
            give(&hidden)?;
            self.hidden = Some(hidden.clone());
            renameat(directory, hidden.as_os_str(), directory, name)?;
            self.hidden = None;
            return Ok(());
        };
        if self.force {
            renameat(directory, hidden.as_os_str(), directory, name)?;
            self.hidden = None;
            return Ok(());
        }
        match renameat2(
            directory,
            hidden.as_os_str(),
            directory,
            name,
            RenameFlags::RENAME_NOREPLACE,
        ) {
            // The file system does not know the flag (rename(2)): link instead,
            // and let drop remove the hidden name.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                linkat(directory, hidden.as_os_str(), directory, name, AtFlags::empty())
            }
            Ok(()) => {
                self.hidden = None;
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            // The error can't be passed on; the name of what is left says what it was.
            let _ = unlinkat(&self.directory, hidden.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Opens a file without a name, or one with a hidden name.
fn open(directory: &File, name: &OsStr) -> nix::Result<(File, Option<OsString>)> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    // Without /proc a nameless file could never get its name.
    if fs::exists("/proc/self/fd").unwrap_or(false) {
        match openat(directory, ".", flags | OFlag::O_TMPFILE, mode) {
            Ok(fd) => return Ok((File::from(fd), None)),
            // What file systems and kernels without O_TMPFILE answer (open(2)).
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {}
            Err(errno) => return Err(errno),
        }
    }
    open_hidden(directory, name)
}

/// Opens a new file with a hidden name.
fn open_hidden(directory: &File, name: &OsStr) -> nix::Result<(File, Option<OsString>)> {
    let hidden = hidden_name(name);
    let flags =
        OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
    let fd = openat(directory, hidden.as_os_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok((File::from(fd), Some(hidden)))
}

/// `.NAME.RANDOM.tmp`, kept within the 255 bytes that a name may have.
fn hidden_name(name: &OsStr) -> OsString {
    let name = &name.as_bytes()[..name.len().min(200)];
    let random = Uuid::new_v4().simple().to_string();
    OsString::from_vec([b".", name, b".", &random.as_bytes()[..8], b".tmp"].concat())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    }

    /// A target as on a file system without O_TMPFILE.
    fn hidden_target(path: &Path, force: bool) -> Target {
        let mut target = Target::create(path, force).unwrap();
        let (file, hidden) = open_hidden(&target.directory, &target.name).unwrap();
        (target.file, target.hidden) = (file, hidden);
        target
    }

    #[test]
    fn both_ways_commit_once_and_leave_nothing_else() {
        for make in [|p: &Path, f| Target::create(p, f).unwrap(), hidden_target] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("vm.snap");
            drop(make(&path, false));
            assert!(names(directory.path()).is_empty());

            let (first, second) = (make(&path, false), make(&path, false));
            first.file().write_all(b"first").unwrap();
            first.commit().unwrap();
            assert!(matches!(second.commit(), Err(ImageError::Exists(_))));
            assert_eq!(fs::read(&path).unwrap(), b"first");
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

            let third = make(&path, true);
            third.file().write_all(b"third").unwrap();
            third.commit().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"third");
            assert_eq!(names(directory.path()), ["vm.snap"]);
        }
    }

    #[test]
    fn refuses_at_once_what_can_not_end_well() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.snap");
        fs::write(&path, b"mine").unwrap();
        assert!(matches!(Target::create(&path, false), Err(ImageError::Exists(_))));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(Target::create(&link, true), Err(ImageError::NotRegular(_))));
        assert!(matches!(Target::create(directory.path(), true), Err(ImageError::NotRegular(_))));
        assert!(matches!(Target::create(Path::new("/"), true), Err(ImageError::NoFileName(_))));
        let nowhere = directory.path().join("no/vm.snap");
        assert!(matches!(Target::create(&nowhere, false), Err(ImageError::Io { .. })));
    }

    #[test]
    fn a_long_name_still_has_a_hidden_one() {
        assert!(hidden_name(OsStr::from_bytes(&[b'x'; 255])).len() <= 255);
    }
}
