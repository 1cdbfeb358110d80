//! Where reverts are recorded: a private directory of the user's, and in it one for each revert.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Hexadecimal digits of an id.
const ID_DIGITS: usize = 8;

/// How often a new directory is tried, should others remove the empty one above it meanwhile.
const TRIES: usize = 5;

/// A new id.
pub(crate) fn new_id() -> String {
    Uuid::new_v4().simple().to_string()[..ID_DIGITS].to_owned()
}

/// Whether a name is an id.
pub(super) fn is_id(name: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name.len() == ID_DIGITS && name.bytes().all(is_digit)
}

/// The user's directory, whether it is there or not.
pub(crate) fn base() -> PathBuf {
    let user = us();
    let is_ours = |path: &PathBuf| {
        path.is_absolute() && fs::metadata(path).is_ok_and(|meta| meta.uid() == user)
    };
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(is_ours) {
        Some(runtime) => runtime.join("snapback"),
        None if user == 0 => PathBuf::from("/run/snapback"),
        None => std::env::temp_dir().join(format!("snapback-{user}")),
    }
}

/// The user that files are made by.
pub(super) fn us() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// The directory of a revert, whether it is there or not.
pub(super) fn of(id: &str) -> PathBuf {
    base().join(id)
}

/// Makes the directory of a new revert.
pub(super) fn make(path: &Path) -> io::Result<()> {
    let above = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut made = Err(io::Error::from(io::ErrorKind::NotFound));
    for _ in 0..TRIES {
        make_private(above)?;
        made = DirBuilder::new().mode(0o700).create(path);
        // Whoever removes the last revert removes the directory above it as well.
        match &made {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => break,
        }
    }
    made
}

/// The place of the log of a new revert's server, in a directory that is there.
///
/// # Errors
/// When the directory can't be made, or is not private. The error comes with its path.
pub(crate) fn log_of(id: &str) -> Result<PathBuf, (PathBuf, io::Error)> {
    let base = base();
    match make_private(&base) {
        Ok(()) => Ok(base.join(format!("{id}.log"))),
        Err(error) => Err((base, error)),
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    check_private(path)
}

/// Refuses a directory that others could have made, can list or write to. They may get through it,
/// to the socket of a daemon that a group uses: what else is in it is private itself.
pub(super) fn check_private(path: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    match meta.is_dir() && meta.uid() == us() && meta.mode() & 0o066 == 0 {
        true => Ok(()),
        false => {
            let why = "it must be a directory of your own, with mode 0700";
            Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
        }
    }
}

/// Removes a directory with these files in it, and the one above if it is empty then. Anything
/// else in it stays, and the directory with it.
pub(super) fn remove(path: &Path, files: &[&str]) -> io::Result<()> {
    for file in files {
        match fs::remove_file(path.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir(path)?;
    // Mostly there are others in it.
    path.parent().map(fs::remove_dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn ids_are_told_from_other_names() {
        assert!(is_id(&new_id()) && new_id() != new_id());
        for other in ["", "1f0c92a", "1f0c92abc", "1F0C92AB", "1f0c92ab.log", "..", "../../ab"] {
            assert!(!is_id(other), "{other}");
        }
    }

    #[test]
    fn a_directory_goes_with_the_one_above_it_once_both_are_empty() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("snapback");
        let (one, other) = (base.join("1"), base.join("2"));
        make(&one).unwrap();
        make(&other).unwrap();
        assert_eq!(fs::metadata(&one).unwrap().mode() & 0o777, 0o700);
        fs::write(one.join("state"), "x").unwrap();
        remove(&one, &["state", "none"]).unwrap();
        assert!(!one.exists() && other.exists());
        fs::write(other.join("stranger"), "x").unwrap();
        assert!(remove(&other, &["state"]).is_err() && other.join("stranger").exists());
        fs::remove_file(other.join("stranger")).unwrap();
        remove(&other, &[]).unwrap();
        assert!(!base.exists());
    }

    #[test]
    fn a_directory_that_others_can_enter_or_that_is_elsewhere_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("snapback");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(make(&base.join("1")).is_err());
        fs::remove_dir(&base).unwrap();
        std::os::unix::fs::symlink("/tmp", &base).unwrap();
        assert!(make(&base.join("1")).is_err());
    }
}
