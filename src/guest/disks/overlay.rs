//! The overlays of a reverted guest: a new file for each captured disk, on top of the frozen
//! ones, which are never written.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::guest::GuestError;
use crate::guest::disks::frozen;
use crate::machine::{Disk, DiskFile};
use crate::qcow2::{Backing, write_overlay};

/// Number of the first descriptor set (`-add-fd`) by which QEMU gets overlays without a name,
/// far above any that a command line would use.
const FIRST_SET: usize = 900_000;

/// The internal snapshot to which a reset goes back.
pub const RESET_POINT: &str = "snapback-reset";

/// Where overlays are created, and how long they stay.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct OverlayOptions {
    /// Where overlays are created; `None` for the directory of each disk's frozen file.
    pub directory: Option<PathBuf>,
    /// What the names of overlays begin with; `None` for the frozen file's name.
    pub prefix: Option<String>,
    /// Whether overlays have no name and disappear with QEMU, however it ends.
    pub ephemeral: bool,
    /// Whether each has an internal snapshot of its empty state, [`RESET_POINT`].
    pub(crate) reset_point: bool,
    /// The frozen files, where they are served to QEMU instead of lying on this host.
    pub(crate) far: Option<FarDisks>,
}

/// Frozen files that are served by NBD on a Unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FarDisks {
    /// The socket.
    pub socket: PathBuf,
    /// The export of each file, by the path that it has in the record.
    pub names: Vec<(String, String)>,
}

/// What the name of a file that is served begins with: a URI as QEMU takes it.
const NBD: &str = "nbd+unix:///";

/// How long QEMU waits for a server that has gone, in seconds, before the guest sees an error.
const RECONNECT_S: u32 = 600;

impl FarDisks {
    /// The files of a disk, by their URIs.
    pub(in crate::guest) fn chain(&self, disk: &Disk) -> Result<Vec<DiskFile>, GuestError> {
        let served = |file: &DiskFile| {
            let name = self.names.iter().find(|(path, _)| *path == file.path);
            let (_, name) = name.ok_or_else(|| GuestError::DiskMissing {
                disk: disk.describe(),
                path: file.path.clone().into(),
                advice: "a snapshot that has it".into(),
            })?;
            let socket = self.socket.display();
            let path = format!("{NBD}{name}?socket={socket}");
            Ok(DiskFile { path, stamp: None, ..file.clone() })
        };
        disk.chain.iter().map(served).collect()
    }
}

/// A file that is served, as QEMU opens it; nothing for one on this host.
fn served(path: &str) -> Option<Value> {
    let (export, socket) = path.strip_prefix(NBD)?.split_once("?socket=")?;
    Some(json!({
        "driver": "nbd", "server": { "type": "unix", "path": socket }, "export": export,
        "read-only": true, "reconnect-delay": RECONNECT_S,
    }))
}

/// An overlay to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The disk, as [`Disk::describe`] names it.
    pub disk: String,
    /// Its file, which does not exist yet; `None` for a file without a name.
    pub path: Option<PathBuf>,
    /// The directory on whose file system a file without a name is created.
    directory: PathBuf,
    /// The descriptor set by which QEMU opens a file without a name.
    set: usize,
    /// Whether it has the snapshot [`RESET_POINT`].
    reset_point: bool,
    /// Size that the guest sees, in bytes.
    size: u64,
    /// The frozen files, the one on top first; at least one.
    chain: Vec<DiskFile>,
}

impl Overlay {
    /// Plans the overlay of the disk at position `at` of the record.
    pub(in crate::guest) fn new(
        disk: &Disk,
        at: usize,
        chain: Vec<DiskFile>,
        options: &OverlayOptions,
    ) -> Result<Overlay, GuestError> {
        let top = match chain.first() {
            Some(file) => Path::new(&file.path),
            None => return Err(GuestError::DiskNotRecorded { disk: disk.describe() }),
        };
        let directory = options.directory.as_deref().or(top.parent()).unwrap_or(Path::new("/"));
        let directory = std::path::absolute(directory).map_err(|source| GuestError::Overlay {
            disk: disk.describe(),
            directory: directory.to_owned(),
            source,
        })?;
        let prefix = match &options.prefix {
            Some(prefix) => prefix.as_bytes(),
            None => top.file_name().map_or(&b"disk"[..], OsStr::as_bytes),
        };
        let path = (!options.ephemeral).then(|| directory.join(file_name(prefix, disk)));
        Ok(Overlay {
            disk: disk.describe(),
            path,
            directory,
            set: FIRST_SET + at,
            reset_point: options.reset_point,
            size: disk.size,
            chain,
        })
    }

    /// Its file as QEMU names it.
    pub fn file_name(&self) -> PathBuf {
        match &self.path {
            Some(path) => path.clone(),
            None => format!("/dev/fdset/{}", self.set).into(),
        }
    }

    /// The frozen file right below.
    pub fn frozen(&self) -> &Path {
        Path::new(self.chain.first().map_or("", |file| &file.path))
    }

    /// The overlay and all that is below as `blockdev-add` would have it (QEMU's QMP
    /// reference, `BlockdevOptions`). Everything below is read only. `aio` is how files
    /// are read and written, where that was said.
    pub(in crate::guest) fn node(
        &self,
        aio: Option<&str>,
    ) -> Result<Map<String, Value>, GuestError> {
        let own = match &self.path {
            Some(path) => path.to_str().ok_or_else(|| GuestError::Path {
                what: "overlay",
                path: path.clone(),
                problem: "it is not UTF-8".to_owned(),
            })?,
            None => &format!("/dev/fdset/{}", self.set),
        };
        let file = |driver: &str, name: &str, writable: bool| {
            let mut file = json!({ "driver": driver, "filename": name });
            file["read-only"] = json!(!writable);
            // Else QEMU would open it for reading first, which a descriptor set refuses.
            file["auto-read-only"] = json!(false);
            if let Some(aio) = aio {
                file["aio"] = json!(aio);
            }
            file
        };
        let mut below = Value::Null;
        for DiskFile { path, format, .. } in self.chain.iter().rev() {
            let device = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
            let driver = if device { "host_device" } else { "file" };
            let file = served(path).unwrap_or_else(|| file(driver, path, false));
            let mut node = json!({ "driver": format, "read-only": true, "file": file });
            if format != "raw" {
                node["backing"] = below;
            }
            below = node;
        }
        let mut node = Map::new();
        node.insert("driver".into(), json!("qcow2"));
        node.insert("file".into(), file("file", own, true));
        node.insert("backing".into(), below);
        Ok(node)
    }

    /// Creates the file, open for reading and writing.
    fn make(&self) -> Result<File, GuestError> {
        let failed = |source| GuestError::Overlay {
            disk: self.disk.clone(),
            directory: self.directory.clone(),
            source,
        };
        let file = match &self.path {
            Some(path) => new_file(path).map_err(failed)?,
            None => nameless(&self.directory).map_err(failed)?,
        };
        let Some(DiskFile { path, format, .. }) = self.chain.first() else {
            return Err(GuestError::DiskNotRecorded { disk: self.disk.clone() });
        };
        // QEMU would take a name in the overlay together with what it is told of the server.
        let path = if served(path).is_some() { "" } else { path };
        let snapshot = self.reset_point.then_some(RESET_POINT);
        let written = write_overlay(&file, self.size, Backing { path, format }, snapshot);
        if written.is_err() {
            self.path.iter().for_each(|path| drop(fs::remove_file(path)));
        }
        written.map_err(failed)?;
        Ok(file)
    }
}

/// Overlays that were created. Dropping this removes them, unless they are kept.
#[derive(Debug, Default)]
pub struct Overlays {
    paths: Vec<PathBuf>,
}

impl Overlays {
    /// Creates overlays that have names.
    ///
    /// # Errors
    /// When one can't be created: none is left then.
    pub fn named(overlays: &[Overlay]) -> Result<Overlays, GuestError> {
        Overlays::make(overlays, |_, _| {})
    }

    /// Creates overlays. For those without a name, `inherit` gets a descriptor for QEMU and the
    /// number of its descriptor set.
    pub(in crate::guest) fn make(
        overlays: &[Overlay],
        mut inherit: impl FnMut(OwnedFd, usize),
    ) -> Result<Overlays, GuestError> {
        let mut made = Overlays::default();
        for overlay in overlays {
            let file = overlay.make()?;
            match &overlay.path {
                Some(path) => made.paths.push(path.clone()),
                None => {
                    // QEMU from 9.0 on wants one that has O_DIRECT for a disk that is used
                    // that way (`cache=none`), and one that has not for others.
                    let direct = direct(&file);
                    inherit(file.into(), overlay.set);
                    direct.into_iter().for_each(|file| inherit(file.into(), overlay.set));
                }
            }
        }
        Ok(made)
    }

    /// Keeps them, since a guest has written to them.
    pub fn keep(&mut self) {
        self.paths.clear();
    }
}

impl Drop for Overlays {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!("the overlay `{}` can't be removed: {error}", path.display());
            }
        }
    }
}

/// `PREFIX.DISK-RANDOM.qcow2`, kept within the 255 bytes that a name may have.
fn file_name(prefix: &[u8], disk: &Disk) -> PathBuf {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let name = frozen::name(disk);
    let name = name.trim_start_matches("/machine/").trim_start_matches('#');
    let name: String = name.chars().map(|c| if is_plain(c) { c } else { '-' }).take(64).collect();
    let random = Uuid::new_v4().simple().to_string();
    let end = format!(".{name}-{}.qcow2", &random[..8]);
    let prefix = &prefix[..prefix.len().min(255 - end.len())];
    PathBuf::from(OsStr::from_bytes(&[prefix, end.as_bytes()].concat()))
}

/// A new file with mode 0600, since it holds a guest's data.
fn new_file(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// A file without a name: created so (open(2), `O_TMPFILE`), or unlinked at once where the
/// file system does not support that.
fn nameless(directory: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    match options.open(directory).map_err(|e| (e.raw_os_error(), e)) {
        Ok(file) => Ok(file),
        Err((Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL), _)) => {
            let path = directory.join(format!(".snapback-{}", Uuid::new_v4().simple()));
            let file = new_file(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
        Err((_, error)) => Err(error),
    }
}

/// The same file, opened again with O_DIRECT; `None` where the file system does not support
/// that, which QEMU reports itself if it matters.
fn direct(file: &File) -> Option<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn disk() -> Disk {
        let file = |path: &str, format: &str| DiskFile {
            node: "f0".into(),
            path: path.into(),
            format: format.into(),
            stamp: None,
        };
        Disk {
            device: "drive/0".into(),
            size: 1 << 20,
            chain: vec![file("/vm/top", "qcow2"), file("/vm/base", "raw")],
            ..Disk::default()
        }
    }

    #[test]
    fn what_is_below_an_overlay_is_read_only() {
        let options = OverlayOptions { ephemeral: true, ..OverlayOptions::default() };
        let overlay = Overlay::new(&disk(), 1, disk().chain, &options).unwrap();
        let expected = json!({
            "driver": "qcow2",
            "file": {
                "driver": "file", "filename": "/dev/fdset/900001", "read-only": false,
                "auto-read-only": false, "aio": "native",
            },
            "backing": {
                "driver": "qcow2", "read-only": true,
                "file": {
                    "driver": "file", "filename": "/vm/top", "read-only": true,
                    "auto-read-only": false, "aio": "native",
                },
                "backing": {
                    "driver": "raw", "read-only": true,
                    "file": {
                        "driver": "file", "filename": "/vm/base", "read-only": true,
                        "auto-read-only": false, "aio": "native",
                    },
                },
            },
        });
        assert_eq!(Value::Object(overlay.node(Some("native")).unwrap()), expected);
        assert!(Overlay::new(&disk(), 0, vec![], &options).is_err());
    }

    #[test]
    fn overlays_are_private_and_go_unless_they_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let here = |prefix: &str, ephemeral| OverlayOptions {
            directory: Some(directory.path().into()),
            prefix: Some(prefix.into()),
            ephemeral,
            ..OverlayOptions::default()
        };
        let names = || fs::read_dir(directory.path()).unwrap().count();
        let plan = |options| Overlay::new(&disk(), 0, disk().chain, &options).unwrap();
        let named = plan(here(&"x".repeat(255), false));
        let path = named.path.clone().unwrap();
        assert!(path.to_str().unwrap().contains(".drive-0-"), "{}", path.display());
        let no_inheriting = |_, _| panic!("it has a name");
        let overlays = Overlays::make(std::slice::from_ref(&named), no_inheriting).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(overlays);
        assert_eq!(names(), 0);
        Overlays::make(std::slice::from_ref(&named), no_inheriting).unwrap().keep();
        assert_eq!(names(), 1);
        // A second one of the same name takes nothing away.
        assert!(Overlays::make(&[named], no_inheriting).is_err());
        assert_eq!(names(), 1);

        let mut inherited = Vec::new();
        let unnamed = plan(here("x", true));
        Overlays::make(&[unnamed], |fd, set| inherited.push((fd, set))).unwrap();
        assert_eq!((names(), inherited[0].1), (1, FIRST_SET));
        assert!(inherited.iter().all(|(_, set)| *set == FIRST_SET));
        let made = File::from(inherited.remove(0).0).metadata().unwrap();
        assert!(made.len() > 0 && made.nlink() == 0 && made.mode() & 0o777 == 0o600);
    }

    #[test]
    fn a_directory_that_can_not_be_used_is_named() {
        let directory = Some("/nowhere/at/all".into());
        for ephemeral in [false, true] {
            let directory = directory.clone();
            let options = OverlayOptions { directory, ephemeral, ..OverlayOptions::default() };
            let overlay = Overlay::new(&disk(), 0, disk().chain, &options).unwrap();
            let error = overlay.make().unwrap_err().to_string();
            assert!(
                error.contains("/nowhere/at/all") && error.contains("`OverlayOptions::directory`")
            );
        }
    }
}
