//! Taking overlays away again: each is committed back into its disk if the guest writes to
//! it, closed, and removed.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use serde_json::json;

use super::error::LeftOver;
use crate::failpoint::failpoint;
use crate::libvirt::{Domain, LibvirtError};
use crate::qmp::{BlockEdge, Qmp, QmpError};
use crate::save::access::Access;
use crate::save::event::{OnEvent, SaveEvent};
use crate::save::overlays::Overlay;

/// How long committing one overlay may take at the least.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(120);

/// The slowest that an overlay is expected to be committed at, in bytes a second. It holds what the
/// guest has written since the moment.
const COMMIT_RATE: u64 = 4 << 20;

/// Takes all overlays away. Returns those that could not be taken away.
pub(in crate::save) async fn undo_overlays(
    access: &Access,
    overlays: &[Overlay],
    on_event: OnEvent<'_>,
) -> Vec<LeftOver> {
    let mut left = Vec::new();
    for overlay in overlays {
        let Access { qmp, domain } = access;
        let undone = match (domain, &overlay.target) {
            (Some(domain), Some(target)) => overlay.undo_in_domain(domain, target).await,
            _ => overlay.undo(qmp).await,
        };
        match undone {
            Ok(true) => on_event(SaveEvent::Committed { disk: overlay.disk.clone() }),
            Ok(false) => {}
            Err(_) if qmp.ended().is_some() => left.extend(overlay.left_behind()),
            Err(reason) => {
                let remedy = match (domain, &overlay.target) {
                    (Some(domain), Some(target)) => commit_by_virsh(domain, target),
                    _ => overlay.commit_by_hand(qmp).await,
                };
                left.push(overlay.left_over(reason, remedy));
            }
        }
    }
    left
}

impl Overlay {
    /// Takes the overlay away, however far it has come: commits it into the disk if the guest
    /// writes to it, closes it, and removes its file. Returns whether it was in use.
    async fn undo(&self, qmp: &Qmp) -> Result<bool, String> {
        let text = |e: QmpError| e.to_string();
        // An earlier attempt may have been killed, or have waited too long.
        let mut in_use = qmp.job(&self.node).await.map_err(text)?.is_some();
        if in_use && let Err(reason) = self.end_commit(qmp).await {
            if qmp.job(&self.node).await.map_err(text)?.is_some() {
                return Err(reason);
            }
            tracing::info!("an earlier commit of {} failed: {reason}", self.path);
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
                // The job can have the node's name: QEMU tells jobs and nodes apart.
                qmp.begin_commit(&self.node, &self.node, &self.frozen).await.map_err(text)?;
                failpoint("committing");
                self.end_commit(qmp).await?;
                failpoint("committed");
            }
            qmp.blockdev_del(&self.node).await.map_err(text)?;
        }
        if is_open(&self.file_node) {
            qmp.blockdev_del(&self.file_node).await.map_err(text)?;
        }
        self.remove_unused()?;
        Ok(in_use)
    }

    /// The same through libvirt, which knows the disk as `target`.
    async fn undo_in_domain(&self, domain: &Domain, target: &str) -> Result<bool, String> {
        let text = |e: LibvirtError| e.to_string();
        // An earlier attempt may have been killed.
        let mut in_use = domain.has_block_job(target).await.map_err(text)?;
        if !in_use {
            let disks = domain.disks().await.map_err(text)?;
            let disk = disks.into_iter().find(|disk| disk.target == target).unwrap_or_default();
            if let Some(above) = disk.source.as_ref().filter(|_| disk.below.contains(&self.path)) {
                return Err(format!("{above} lies over it meanwhile"));
            }
            in_use = disk.source.as_ref() == Some(&self.path);
            if in_use {
                domain.begin_commit(target).await.map_err(text)?;
                failpoint("committing");
            }
        }
        if in_use {
            let limit = self.commit_limit();
            let end = tokio::time::timeout(limit, domain.end_commit(target)).await;
            end.map_err(|_| format!("it has not ended in {limit:?}"))?.map_err(text)?;
            failpoint("committed");
        }
        self.remove_unused()?;
        Ok(in_use)
    }

    /// Removes the file, which no QEMU has open any more.
    fn remove_unused(&self) -> Result<(), String> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.to_string()),
            _ => Ok(()),
        }
    }

    /// Removes the file of an overlay that nobody has open or has written to.
    pub fn remove(&self) {
        // It may not have been made yet. One that can't be removed is told of as left behind.
        let _ = fs::remove_file(&self.path);
    }

    /// Waits for the end of a commit that has begun.
    async fn end_commit(&self, qmp: &Qmp) -> Result<(), String> {
        let limit = self.commit_limit();
        match tokio::time::timeout(limit, qmp.end_commit(&self.node)).await {
            Ok(committed) => committed.map_err(|e| e.to_string()),
            Err(_) => Err(format!("it has not ended in {limit:?}, and goes on")),
        }
    }

    /// How long committing it may take.
    fn commit_limit(&self) -> Duration {
        let bytes = fs::metadata(&self.path).map_or(0, |meta| meta.blocks() * 512);
        COMMIT_TIMEOUT + Duration::from_secs(bytes / COMMIT_RATE)
    }

    /// What is to be told of this overlay, which was not committed.
    fn left_over(&self, reason: String, remedy: String) -> LeftOver {
        let (disk, overlay) = (self.disk.clone(), self.path.clone().into());
        LeftOver::Overlay { disk, overlay, reason, remedy }
    }

    /// The same after QEMU has ended, if the overlay's file was ever made.
    pub fn left_behind(&self) -> Option<LeftOver> {
        fs::symlink_metadata(&self.path).ok()?;
        let remedy = format!(
            "commit it with `qemu-img commit {}` while no QEMU uses the disk, then remove it",
            self.path
        );
        Some(self.left_over("its QEMU has ended".into(), remedy))
    }

    /// What commits it in a QEMU that lives.
    async fn commit_by_hand(&self, qmp: &Qmp) -> String {
        let edges = qmp.block_edges().await.unwrap_or_default();
        // `device` has to be the node on top of all.
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
            "{first}try again with `recover()` of this image; before that, it can be committed by \
             QMP: `{{\"execute\":\"block-commit\",\"arguments\":{commit}}}`, then, if \
             `query-jobs` calls the job `ready`, \
             `{{\"execute\":\"job-complete\",\"arguments\":{complete}}}`"
        )
    }
}

/// What commits the overlay of a domain that runs.
fn commit_by_virsh(domain: &Domain, target: &str) -> String {
    let name = domain.name();
    format!(
        "try again with `recover()` of this image, or commit it by `virsh blockcommit {name} \
         {target} --shallow --active --pivot`"
    )
}

/// The node on top of those that lie over `node`.
fn top<'a>(edges: &'a [BlockEdge], node: &'a str) -> &'a str {
    let mut top = node;
    // Bounded, should QEMU's answer hold a circle.
    for _ in edges {
        let above = edges.iter().find_map(|e| e.parent.as_deref().filter(|_| e.child == top));
        match above {
            Some(above) => top = above,
            None => break,
        }
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
