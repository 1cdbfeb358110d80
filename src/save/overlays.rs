//! The overlays that disks are switched to: made while the guest runs, put over all
//! disks at once while it stands still, and folded back should the save fail.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;
use uuid::Uuid;

use super::SaveEvent;
use super::checks::Checked;
use super::left_over::LeftOver;
use super::steps::step;
use crate::guest::{FoundDisk, write_overlay};
use crate::host::procfs;
use crate::qmp::{BlockEdge, Qmp, QmpError};

/// How long folding one overlay back may take: it holds what the guest has written
/// since the moment, which a failed save makes short.
const FOLD_TIMEOUT: Duration = Duration::from_secs(120);

/// Why disks could not be switched to overlays.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The file can't be made.
    #[error("can't make the overlay {} of disk {disk}: {source}; --overlay-dir names another folder", .path.display())]
    Create {
        /// The overlay.
        path: PathBuf,
        /// The disk.
        disk: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Its path can't be told to QEMU.
    #[error("the overlay's path {0:?} is not UTF-8: choose another folder with --overlay-dir")]
    Path(PathBuf),
    /// QEMU can't open it.
    #[error("QEMU can't use the overlay {} of disk {disk}: {source}; it has to be able to write in its folder (--overlay-dir names another), or leave the disk out with --exclude-disk", .path.display())]
    Open {
        /// The overlay.
        path: PathBuf,
        /// The disk.
        disk: String,
        /// QEMU's words.
        source: QmpError,
    },
    /// QEMU can't put the overlays over the disks. All disks are as they were.
    #[error(
        "QEMU can't switch the disks to their overlays: {0}; --exclude-disk NODE leaves a disk out"
    )]
    Switch(QmpError),
}

/// A disk's overlay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Overlay {
    /// The disk, as people know it.
    pub disk: String,
    /// The node that is frozen.
    pub frozen: String,
    /// The overlay's node, and that of the file below it.
    pub node: String,
    pub file_node: String,
    /// The overlay's file, absolute.
    pub path: String,
}

impl Overlay {
    /// Names for the overlays of these disks; nothing is made yet.
    ///
    /// # Errors
    /// When a path can't be told to QEMU.
    pub fn plan<'a>(
        disks: impl Iterator<Item = &'a FoundDisk>,
        folder: Option<&Path>,
        image: &Path,
    ) -> Result<Vec<Overlay>, OverlayError> {
        // One name for all disks of a snapshot, so that people see what belongs together.
        let random = Uuid::new_v4().simple().to_string();
        let tag = &random[..8];
        let mut taken = HashSet::new();
        let plan = |(number, found): (usize, &FoundDisk)| {
            let top = found.top.as_ref()?;
            let below = Path::new(&found.disk.chain.first()?.path);
            let folder = overlay_folder(folder, below, image);
            let stem = stem(below);
            let mut path = folder.join(format!("{stem}.snap-{tag}.qcow2"));
            if !taken.insert(path.clone()) {
                path = folder.join(format!("{stem}-{number}.snap-{tag}.qcow2"));
            }
            let node = format!("snap-{tag}-{number}");
            Some(path.into_os_string().into_string().map_err(|p| OverlayError::Path(p.into())).map(
                |path| Overlay {
                    disk: found.disk.describe(),
                    frozen: top.name.clone(),
                    file_node: format!("{node}-file"),
                    node,
                    path,
                },
            ))
        };
        disks.enumerate().filter_map(plan).collect()
    }

    /// Makes the overlay's file and opens it in QEMU, ready to be put over its disk.
    async fn prepare(
        &self,
        qmp: &Qmp,
        found: &FoundDisk,
        owner: Owner,
    ) -> Result<(), OverlayError> {
        let (path, disk) = (PathBuf::from(&self.path), self.disk.clone());
        // Ours to make: QEMU would let others read it.
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let made = options.open(&path).and_then(|file| {
            let below = found.disk.chain.first().ok_or(io::ErrorKind::NotFound)?;
            write_overlay(&file, found.disk.size, &below.path, &below.format)?;
            owner.give(&file)
        });
        made.map_err(|source| OverlayError::Create { path: path.clone(), disk, source })?;

        let opened = self.open(qmp, found).await;
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
        // What the guest discards is given back, whatever its disk did: the overlay would
        // only grow otherwise.
        qmp.blockdev_add(&json!({
            "driver": "qcow2", "node-name": self.node, "file": self.file_node, "backing": null,
            "cache": cache, "discard": "unmap", "detect-zeroes": zeroes,
        }))
        .await
    }

    /// Takes the overlay away, whatever has become of it: folds it back into the disk
    /// if the guest writes to it, closes it, and removes its file. Whether it was in use.
    async fn undo(&self, qmp: &Qmp) -> Result<bool, String> {
        let text = |e: QmpError| e.to_string();
        // An earlier attempt may have been killed, or have waited too long.
        let mut in_use = qmp.job(&self.node).await.map_err(text)?.is_some();
        if in_use && let Err(reason) = self.end_fold(qmp).await {
            if qmp.job(&self.node).await.map_err(text)?.is_some() {
                return Err(reason);
            }
            tracing::info!("folding {} was tried before: {reason}", self.path);
        }
        let nodes = qmp.block_nodes().await.map_err(text)?;
        let edges = qmp.block_edges().await.map_err(text)?;
        let is_open = |name: &str| nodes.iter().any(|node| node.name == name);
        if is_open(&self.node) {
            let mut users = edges.iter().filter(|edge| edge.child == self.node).peekable();
            let has_users = users.peek().is_some();
            if let Some(above) = users.find_map(|edge| edge.parent.as_deref()) {
                return Err(format!("node `{above}` lies over it meanwhile"));
            }
            if has_users {
                in_use = true;
                // Jobs and nodes have names of their own.
                qmp.begin_fold(&self.node, &self.node, &self.frozen).await.map_err(text)?;
                step("folding");
                self.end_fold(qmp).await?;
                step("folded");
            }
            qmp.blockdev_del(&self.node).await.map_err(text)?;
        }
        if is_open(&self.file_node) {
            qmp.blockdev_del(&self.file_node).await.map_err(text)?;
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.to_string()),
            _ => Ok(in_use),
        }
    }

    /// Waits until the overlay is folded, once that has begun.
    async fn end_fold(&self, qmp: &Qmp) -> Result<(), String> {
        match tokio::time::timeout(FOLD_TIMEOUT, qmp.end_fold(&self.node)).await {
            Ok(folded) => folded.map_err(|e| e.to_string()),
            Err(_) => Err(format!("it has not ended in {FOLD_TIMEOUT:?}, and goes on")),
        }
    }

    /// The overlay, which was not folded back.
    fn left_over(&self, reason: String, remedy: String) -> LeftOver {
        let (disk, overlay) = (self.disk.clone(), self.path.clone().into());
        LeftOver::Overlay { disk, overlay, reason, remedy }
    }

    /// The overlay, if there is one, of a QEMU that has ended.
    pub fn left_behind(&self) -> Option<LeftOver> {
        // It may never have been made.
        fs::symlink_metadata(&self.path).ok()?;
        let remedy = format!(
            "fold it with `qemu-img commit {}` while no QEMU uses the disk, then remove it",
            self.path
        );
        Some(self.left_over("its QEMU has ended".into(), remedy))
    }

    /// What folds it in a QEMU that lives.
    async fn fold_by_hand(&self, qmp: &Qmp) -> String {
        let edges = qmp.block_edges().await.unwrap_or_default();
        // QEMU wants to be told what lies on top of all.
        let commit = json!({
            "job-id": self.node, "device": top(&edges, &self.node), "top-node": self.node,
            "base-node": self.frozen,
        });
        let complete = json!({ "id": self.node });
        // Behind an ordinary migration, by which a paused guest is saved on QEMU before 9.0.
        let first = match qmp.status().await.as_deref() {
            Ok("postmigrate") => {
                "let the guest go on (`cont`), since QEMU has given up its disks until then; then "
            }
            _ => "",
        };
        format!(
            "{first}run `snapback save --recover` on this image again, before which it may be folded by \
             QMP: `{{\"execute\":\"block-commit\",\"arguments\":{commit}}}`, then, should \
             `query-jobs` call the job `ready`, \
             `{{\"execute\":\"job-complete\",\"arguments\":{complete}}}`"
        )
    }
}

/// The node on top of those that lie over `node`.
fn top<'a>(edges: &'a [BlockEdge], node: &'a str) -> &'a str {
    let mut top = node;
    // The graph has no circles; who knows what QEMU says.
    for _ in edges {
        let above = edges.iter().find_map(|e| e.parent.as_deref().filter(|_| e.child == top));
        match above {
            Some(above) => top = above,
            None => break,
        }
    }
    top
}

/// Makes the overlays of all captured disks, ready to be switched to.
///
/// # Errors
/// When one can't be made. What was made is for the caller to [`undo`].
pub(super) async fn prepare(
    qmp: &Qmp,
    checked: &Checked,
    overlays: &[Overlay],
) -> Result<(), OverlayError> {
    let owner = Owner(procfs::owner(checked.pid));
    for (number, (overlay, found)) in overlays.iter().zip(checked.captured()).enumerate() {
        overlay.prepare(qmp, found, owner).await?;
        step(&format!("overlay {number}"));
    }
    Ok(())
}

/// Switches all disks to their overlays, all or none.
pub(super) async fn switch(qmp: &Qmp, overlays: &[Overlay]) -> Result<(), OverlayError> {
    let pairs: Vec<(&str, &str)> =
        overlays.iter().map(|o| (o.frozen.as_str(), o.node.as_str())).collect();
    qmp.put_overlays(&pairs).await.map_err(OverlayError::Switch)
}

/// Takes all overlays away. Returns those for which that can't be done.
pub(super) async fn undo(
    qmp: &Qmp,
    overlays: &[Overlay],
    on_event: &mut impl FnMut(SaveEvent),
) -> Vec<LeftOver> {
    let mut left = Vec::new();
    for overlay in overlays {
        match overlay.undo(qmp).await {
            Ok(true) => on_event(SaveEvent::Folded { disk: overlay.disk.clone() }),
            Ok(false) => {}
            Err(_) if qmp.ended().is_some() => left.extend(overlay.left_behind()),
            Err(reason) => left.push(overlay.left_over(reason, overlay.fold_by_hand(qmp).await)),
        }
    }
    left
}

/// The folder of an overlay: what was asked for, or else that of the file below it. No
/// place for files is a block device's: there it is the image's.
pub(super) fn overlay_folder(asked: Option<&Path>, below: &Path, image: &Path) -> PathBuf {
    let folder = match (asked, below.parent()) {
        (Some(asked), _) => asked,
        (None, Some(folder)) if !folder.starts_with("/dev") => folder,
        (None, _) => image.parent().unwrap_or(Path::new("")),
    };
    // QEMU has its own working folder.
    std::path::absolute(folder).or_else(|_| std::env::current_dir()).unwrap_or_default()
}

/// A disk's name without its ending, or the tag of an earlier snapshot: overlays of
/// overlays keep the disk's name.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = match name.split_once(".snap-") {
        Some((stem, _)) => stem,
        None => name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem),
    };
    stem.chars().take(100).collect()
}

/// The user whom QEMU opens files as.
#[derive(Debug, Clone, Copy)]
struct Owner(Option<(u32, u32)>);

impl Owner {
    /// Makes a file of ours its own. Only root can give files away; QEMU says itself when
    /// it can't open a file.
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
    fn the_top_is_found_in_the_graph() {
        let edge = |parent: Option<&str>, child: &str| BlockEdge {
            parent: parent.map(str::to_owned),
            child: child.to_owned(),
            role: "backing".into(),
        };
        let edges = [edge(Some("b"), "a"), edge(None, "a"), edge(Some("c"), "b"), edge(None, "c")];
        assert_eq!((top(&edges, "a"), top(&edges, "c"), top(&[], "a")), ("c", "c", "a"));
        assert_eq!(top(&[edge(Some("a"), "a")], "a"), "a");
    }

    #[test]
    fn overlays_lie_where_asked_or_beside_the_disk() {
        let image = Path::new("/images/vm.snap");
        let folder = |asked, below| overlay_folder(asked, Path::new(below), image);
        assert_eq!(folder(None, "/disks/a.raw"), Path::new("/disks"));
        assert_eq!(folder(Some(Path::new("/other")), "/disks/a.raw"), Path::new("/other"));
        assert_eq!(folder(None, "/dev/vg/disk"), Path::new("/images"));
        let here = std::env::current_dir().unwrap();
        let bare = overlay_folder(None, Path::new("/dev/vg/disk"), Path::new("vm.snap"));
        assert_eq!(
            (bare, folder(Some(Path::new("sub")), "/x/y")),
            (here.clone(), here.join("sub"))
        );
    }
}
