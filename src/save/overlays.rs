//! The overlays that disks are switched to: made while the guest runs, and put over all
//! disks at once while it stands still.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::access::Access;
use super::checked::Checked;
use super::overlay_error::OverlayError;
use crate::failpoint::failpoint;
use crate::guest::FoundDisk;
use crate::host::procfs::owner;
use crate::qcow2::{Backing, write_overlay};
use crate::qmp::{Qmp, QmpError};

/// A disk's overlay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Overlay {
    /// The disk, as [`Disk::describe`](crate::machine::Disk::describe) calls it.
    pub disk: String,
    /// The node that is frozen.
    pub frozen: String,
    /// The overlay's node, and that of the file below it.
    pub node: String,
    pub file_node: String,
    /// The overlay's file, absolute.
    pub path: String,
    /// Of a libvirt's domain: libvirt's name of the disk, such as `vda`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

impl Overlay {
    /// Chooses files and nodes for the overlays of these disks. Nothing is made yet.
    ///
    /// # Errors
    /// When a path can't be told to QEMU.
    pub fn plan(
        checked: &Checked,
        directory: Option<&Path>,
        image: &Path,
    ) -> Result<Vec<Overlay>, OverlayError> {
        // The same tag for all disks of a snapshot, so that people see what belongs together.
        let random = Uuid::new_v4().simple().to_string();
        let tag = &random[..8];
        let mut taken = HashSet::new();
        let plan = |(number, found): (usize, &FoundDisk)| {
            let top = found.top.as_ref()?;
            let below = Path::new(&found.disk.chain.first()?.path);
            let directory = overlay_directory(directory, below, image);
            let stem = stem(below);
            let mut path = directory.join(format!("{stem}.snap-{tag}.qcow2"));
            if !taken.insert(path.clone()) {
                path = directory.join(format!("{stem}-{number}.snap-{tag}.qcow2"));
            }
            let node = format!("snap-{tag}-{number}");
            Some(path.into_os_string().into_string().map_err(|p| OverlayError::Path(p.into())).map(
                |path| Overlay {
                    disk: found.disk.describe(),
                    frozen: top.name.clone(),
                    file_node: format!("{node}-file"),
                    node,
                    path,
                    target: checked.target(found).map(str::to_owned),
                },
            ))
        };
        checked.captured().enumerate().filter_map(plan).collect()
    }

    /// Makes the overlay's file and opens it in QEMU, ready to be put over its disk. libvirt opens
    /// it itself when it switches.
    async fn prepare(
        &self,
        access: &Access,
        found: &FoundDisk,
        owner: Owner,
        reset_point: Option<&str>,
    ) -> Result<(), OverlayError> {
        let (path, disk) = (PathBuf::from(&self.path), self.disk.clone());
        // Not made by QEMU, which would let others read it.
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let made = options.open(&path).and_then(|file| {
            let below = found.disk.chain.first().ok_or(io::ErrorKind::NotFound)?;
            let backing = Backing { path: &below.path, format: &below.format };
            write_overlay(&file, found.disk.size, backing, reset_point)?;
            owner.give(&file)
        });
        made.map_err(|source| OverlayError::Create { path: path.clone(), disk, source })?;

        if access.domain.is_some() {
            return Ok(());
        }
        let opened = self.open(&access.qmp, found).await;
        opened.map_err(|source| OverlayError::Open { path, disk: self.disk.clone(), source })
    }

    async fn open(&self, qmp: &Qmp, found: &FoundDisk) -> Result<(), QmpError> {
        let Some(top) = &found.top else {
            return Ok(());
        };
        let cache = json!({ "direct": top.direct, "no-flush": top.no_flush });
        qmp.blockdev_add(&json!({
            "driver": "file", "node-name": self.file_node, "filename": self.path, "cache": cache,
        }))
        .await?;
        let zeroes = match top.detect_zeroes.as_str() {
            mode @ ("on" | "unmap") => mode,
            _ => "off",
        };
        // What the guest discards is given back even if its disk didn't do that: otherwise
        // the overlay would only grow.
        qmp.blockdev_add(&json!({
            "driver": "qcow2", "node-name": self.node, "file": self.file_node, "backing": null,
            "cache": cache, "discard": "unmap", "detect-zeroes": zeroes,
        }))
        .await
    }
}

/// Makes the overlays of all captured disks, ready to be switched to, with an internal snapshot of
/// their empty state where one is named.
///
/// # Errors
/// When one can't be made. The caller has to take away those that were made.
pub(super) async fn prepare(
    access: &Access,
    checked: &Checked,
    overlays: &[Overlay],
    reset_point: Option<&str>,
) -> Result<(), OverlayError> {
    let owner = Owner(owner(checked.pid));
    for (number, (overlay, found)) in overlays.iter().zip(checked.captured()).enumerate() {
        overlay.prepare(access, found, owner, reset_point).await?;
        failpoint(&format!("overlay {number}"));
    }
    Ok(())
}

/// Switches all disks to their overlays, all or none.
pub(super) async fn switch(
    access: &Access,
    checked: &Checked,
    overlays: &[Overlay],
) -> Result<(), OverlayError> {
    if let Some(domain) = &access.domain {
        let target = |o: &Overlay| Some((o.target.clone()?, o.path.clone()));
        let switched: Vec<(String, String)> = overlays.iter().filter_map(target).collect();
        let others = checked.domain_disks.iter().map(|disk| &disk.target);
        let others = others.filter(|name| switched.iter().all(|(target, _)| target != *name));
        let others: Vec<String> = others.cloned().collect();
        return domain.put_overlays(&switched, &others).await.map_err(OverlayError::Libvirt);
    }
    let pairs: Vec<(&str, &str)> =
        overlays.iter().map(|o| (o.frozen.as_str(), o.node.as_str())).collect();
    access.qmp.put_overlays(&pairs).await.map_err(OverlayError::Switch)
}

/// The directory of an overlay: the one that was asked for, or else that of the file below
/// it. `/dev` can't hold overlays: for a block device it is the image's directory.
pub(super) fn overlay_directory(asked: Option<&Path>, below: &Path, image: &Path) -> PathBuf {
    let directory = match (asked, below.parent()) {
        (Some(asked), _) => asked,
        (None, Some(directory)) if !directory.starts_with("/dev") => directory,
        (None, _) => image.parent().unwrap_or(Path::new("")),
    };
    // QEMU may have another working directory.
    std::path::absolute(directory).or_else(|_| std::env::current_dir()).unwrap_or_default()
}

/// A disk's name without its ending and without the tag of an earlier snapshot, so that an
/// overlay over an overlay keeps the disk's name.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = match name.split_once(".snap-") {
        Some((stem, _)) => stem,
        None => name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem),
    };
    stem.chars().take(100).collect()
}

/// The user and group as which QEMU opens files.
#[derive(Debug, Clone, Copy)]
struct Owner(Option<(u32, u32)>);

impl Owner {
    /// Makes this user the owner of a file of ours. Only root can give files away; QEMU says
    /// itself when it can't open a file.
    fn give(self, file: &File) -> io::Result<()> {
        let Owner(Some((uid, gid))) = self else { return Ok(()) };
        let meta = file.metadata()?;
        if (meta.uid(), meta.gid()) != (uid, gid) && nix::unistd::geteuid().is_root() {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlays_keep_the_disks_name() {
        assert_eq!(stem(Path::new("/d/disk.raw")), "disk");
        assert_eq!(stem(Path::new("/d/disk")), "disk");
        assert_eq!(stem(Path::new("/d/my.disk.qcow2")), "my.disk");
        assert_eq!(stem(Path::new("/d/disk.snap-0123abcd.qcow2")), "disk");
        assert!(stem(Path::new(&"x".repeat(255))).len() <= 100);
    }

    #[test]
    fn overlays_lie_where_asked_or_beside_the_disk() {
        let image = Path::new("/images/vm.snap");
        let directory = |asked, below| overlay_directory(asked, Path::new(below), image);
        assert_eq!(directory(None, "/disks/a.raw"), Path::new("/disks"));
        assert_eq!(directory(Some(Path::new("/other")), "/disks/a.raw"), Path::new("/other"));
        assert_eq!(directory(None, "/dev/vg/disk"), Path::new("/images"));
        let here = std::env::current_dir().unwrap();
        let bare = overlay_directory(None, Path::new("/dev/vg/disk"), Path::new("vm.snap"));
        assert_eq!(
            (bare, directory(Some(Path::new("sub")), "/x/y")),
            (here.clone(), here.join("sub"))
        );
    }
}
