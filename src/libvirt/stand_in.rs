//! What a domain's XML names as the file of its mapped memory. It is the image while QEMU starts, and
//! zeros from then on.
//!
//! The XML goes with the domain: `virsh restore` and a migration's other end start QEMU with it anew.
//! What they load leaves out pages that are zeros where QEMU takes new memory for zeros (mapped-ram,
//! which is libvirt's format `sparse`, and multifd): over the image such pages would be the image's,
//! and wrong. So the file stays, as long as the image and empty, and stands for new memory.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::error::LibvirtError;

/// Hexadecimal digits that tell one from others of the same domain.
const RANDOM_DIGITS: usize = 8;

/// The file that will stand in for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StandIn {
    /// The file, which does not exist yet.
    pub path: PathBuf,
    /// The image, absolute.
    pub image: PathBuf,
}

impl StandIn {
    /// One for a domain of this name, in this directory.
    pub fn plan(image: &Path, domain: &str, directory: &Path) -> StandIn {
        let random = Uuid::new_v4().simple().to_string();
        let random = &random[..RANDOM_DIGITS];
        let path = directory.join(format!("{}{random}.ram", begins(image, domain)));
        let path = std::path::absolute(&path).unwrap_or(path);
        StandIn { path, image: image.to_owned() }
    }
}

/// Whether it is what stands behind the name of a domain.
fn is_random(text: &str) -> bool {
    text.len() == RANDOM_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// How the names of a domain's files begin.
fn begins(image: &Path, domain: &str) -> String {
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    format!("{name}.{domain}-")
}

/// Removes those beside an image that were made for a domain of this name.
pub fn remove_stand_ins(image: &Path, domain: &str) {
    let directory = image.parent().filter(|parent| !parent.as_os_str().is_empty());
    let begins = begins(image, domain);
    for entry in fs::read_dir(directory.unwrap_or(Path::new("."))).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // What follows tells it from those of a domain whose name begins with this one.
        let random = name.strip_prefix(&begins).and_then(|rest| rest.strip_suffix(".ram"));
        if random.is_some_and(is_random) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// One that was made. Dropping it removes it, unless it is kept.
#[derive(Debug)]
pub(super) struct Standing {
    file: StandIn,
    kept: bool,
}

impl Standing {
    /// Makes it lead to the image.
    pub fn make(file: StandIn) -> Result<Standing, LibvirtError> {
        match symlink(&file.image, &file.path) {
            Ok(()) => Ok(Standing { file, kept: false }),
            Err(source) => Err(LibvirtError::Memory { path: file.path, source }),
        }
    }

    /// Leaves zeros in its place. Who has opened it keeps the image.
    pub fn empty(&self) -> Result<(), LibvirtError> {
        let StandIn { path, image } = &self.file;
        let put = || -> io::Result<()> {
            let new = path.with_extension("ram.new");
            let made = File::create_new(&new).and_then(|file| {
                file.set_len(fs::metadata(image)?.len())?;
                // It holds nothing, and whoever runs QEMU has to read it.
                file.set_permissions(Permissions::from_mode(0o444))?;
                fs::rename(&new, path)
            });
            made.inspect_err(|_| drop(fs::remove_file(&new)))
        };
        put().map_err(|source| LibvirtError::Memory { path: path.clone(), source })
    }

    /// Keeps it, for the domain's next starts from what libvirt has saved.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = fs::remove_file(&self.file.path)
        {
            tracing::warn!("`{}` can't be removed: {error}", self.file.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_take_the_place_of_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm.snap");
        fs::write(&image, "image").unwrap();
        let file = StandIn::plan(&image, "vm", directory.path());
        assert_ne!(file, StandIn::plan(&image, "vm", directory.path()));
        let path = file.path.clone();
        let mut standing = Standing::make(file.clone()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"image");
        standing.empty().unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 5]);
        assert_eq!(fs::read(&image).unwrap(), b"image");
        assert!(matches!(Standing::make(file), Err(LibvirtError::Memory { .. })));
        standing.keep();
        drop(standing);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        fs::write(directory.path().join("vm.snap.vm-2-01234567.ram"), "").unwrap();
        remove_stand_ins(&image, "v");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
        remove_stand_ins(&image, "vm");
        assert!(!path.exists());
        let standing = Standing::make(StandIn { path, image }).unwrap();
        drop(standing);
        // The image, and what is another domain's.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
