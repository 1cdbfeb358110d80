//! The commands that look at disks and put overlays on them (QEMU's "QMP Reference
//! Manual", "Block devices", and `docs/interop/live-block-operations`).

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Qmp, QmpError};

/// How often a job is asked for its state.
const ASK_EVERY: Duration = Duration::from_millis(5);

/// The command that commits an overlay to the node below it.
const BLOCK_COMMIT: &str = "block-commit";

/// A node of the block graph: a file, or a format over one (`query-named-block-nodes`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockNode {
    /// Its name; starts with `#` when QEMU made it up.
    pub name: String,
    /// Its driver: of a format such as `qcow2`, of a protocol such as `file`, or of a
    /// filter such as `throttle`.
    pub driver: String,
    /// Its file name as QEMU knows it (may be a `json:` description).
    pub file: String,
    /// Whether it was opened read-only.
    pub read_only: bool,
    /// Size of what it shows, in bytes.
    pub size: u64,
    /// Whether the host's page cache is passed by.
    pub direct: bool,
    /// Whether flushes are ignored.
    pub no_flush: bool,
    /// What happens to writes of zeros: `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// Whether its content is encrypted.
    pub encrypted: bool,
    /// Whether a qcow2 file keeps its data in another file.
    pub data_file: bool,
}

/// A connection in the block graph: who uses which node as what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockEdge {
    /// The node that uses the other; `None` for a user that is no node: a device or
    /// a job.
    pub parent: Option<String>,
    /// The node that is used.
    pub child: String,
    /// As what: `file`, `backing`, `root`, …
    pub role: String,
}

/// A job that runs in the background (`query-jobs`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Job {
    /// Its name.
    pub id: String,
    /// `running`, `ready`, `concluded`, …
    pub status: String,
    /// Why it failed, if it has.
    pub error: Option<String>,
}

impl Qmp {
    /// All nodes of the block graph.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; so for all commands below.
    pub async fn block_nodes(&self) -> Result<Vec<BlockNode>, QmpError> {
        let list: Vec<NodeInfo> =
            self.query("query-named-block-nodes", json!({ "flat": true })).await?;
        Ok(list.into_iter().map(BlockNode::from).collect())
    }

    /// Who uses which node of the block graph (`x-debug-query-block-graph`, QEMU 4.0
    /// and later: no other command shows the connections on all versions).
    pub async fn block_edges(&self) -> Result<Vec<BlockEdge>, QmpError> {
        let graph: Graph = self.query("x-debug-query-block-graph", ()).await?;
        let name = |id| {
            let vertex = graph.nodes.iter().find(|vertex| vertex.id == id)?;
            (vertex.kind == "block-driver").then(|| vertex.name.clone())
        };
        let edge = |edge: &GraphEdge| {
            let child = name(edge.child)?;
            Some(BlockEdge { parent: name(edge.parent), child, role: edge.name.clone() })
        };
        Ok(graph.edges.iter().filter_map(edge).collect())
    }

    /// Opens a node, as `-blockdev` does.
    pub async fn blockdev_add(&self, options: &Value) -> Result<(), QmpError> {
        self.execute("blockdev-add", options).await.map(drop)
    }

    /// Closes a node that nothing uses.
    pub async fn blockdev_del(&self, node: &str) -> Result<(), QmpError> {
        self.execute("blockdev-del", json!({ "node-name": node })).await.map(drop)
    }

    /// Puts overlays over nodes, all or none: pairs of the node and its overlay, which
    /// must have been opened with `"backing": null`.
    pub async fn put_overlays(&self, pairs: &[(&str, &str)]) -> Result<(), QmpError> {
        let action = |(node, overlay): &(&str, &str)| json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": overlay } });
        let actions: Vec<Value> = pairs.iter().map(action).collect();
        self.execute("transaction", json!({ "actions": actions })).await.map(drop)
    }

    /// Starts to commit an overlay to the node below it, whether the guest runs or not, as a job
    /// of that name. [`Qmp::end_commit`] ends it.
    pub async fn begin_commit(&self, job: &str, overlay: &str, base: &str) -> Result<(), QmpError> {
        let arguments = json!({
            "job-id": job, "device": overlay, "base-node": base, "auto-dismiss": false,
        });
        self.execute(BLOCK_COMMIT, arguments).await.map(drop)
    }

    /// Waits for a job of [`Qmp::begin_commit`], even one of another process, and removes the
    /// overlay from the chain. Its node stays open.
    pub async fn end_commit(&self, job: &str) -> Result<(), QmpError> {
        self.end_job(BLOCK_COMMIT, job).await
    }

    /// Waits for the end of a job that this command has started, and forgets it. One that is ready, and
    /// goes on until it is told, is told to complete.
    async fn end_job(&self, command: &str, job: &str) -> Result<(), QmpError> {
        let mut told = false;
        loop {
            match self.job(job).await? {
                None => return Ok(()),
                Some(Job { status, error, .. }) if status == "concluded" => {
                    self.dismiss(job).await?;
                    return concluded(command, error);
                }
                // All is copied but what the guest writes just now.
                Some(Job { status, .. }) if status == "ready" && !told => {
                    self.execute("job-complete", json!({ "id": job })).await?;
                    told = true;
                }
                Some(_) => tokio::time::sleep(ASK_EVERY).await,
            }
        }
    }

    /// Copies into a node all that lies in nodes below it, and takes those out of its chain. Returns
    /// once that is done. A job of this kind that is there already, of a process that has died, is waited for.
    pub async fn stream(&self, node: &str) -> Result<(), QmpError> {
        const BLOCK_STREAM: &str = "block-stream";
        // Jobs and nodes don't share names; a generated name (`#block123`) would be none for a job.
        let id = format!("stream-{}", node.trim_start_matches('#'));
        let arguments = json!({ "job-id": id, "device": node, "auto-dismiss": false });
        if self.job(&id).await?.is_none() {
            self.execute(BLOCK_STREAM, arguments).await?;
        }
        self.end_job(BLOCK_STREAM, &id).await
    }

    /// The job of that name, if there is one.
    pub async fn job(&self, id: &str) -> Result<Option<Job>, QmpError> {
        Ok(self.jobs().await?.into_iter().find(|job| job.id == id))
    }
}

/// The outcome of a job, as the outcome of the command that started it.
fn concluded(command: &str, error: Option<String>) -> Result<(), QmpError> {
    match error {
        None => Ok(()),
        Some(desc) => Err(QmpError::Command {
            command: command.to_owned(),
            class: "GenericError".to_owned(),
            desc,
        }),
    }
}

#[derive(Deserialize)]
struct NodeInfo {
    #[serde(rename = "node-name", default)]
    name: String,
    drv: String,
    #[serde(default)]
    file: String,
    ro: bool,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    detect_zeroes: String,
    cache: Cache,
    image: Image,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cache {
    direct: bool,
    no_flush: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    virtual_size: u64,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    format_specific: Value,
}

impl From<NodeInfo> for BlockNode {
    fn from(info: NodeInfo) -> BlockNode {
        BlockNode {
            name: info.name,
            driver: info.drv,
            file: info.file,
            read_only: info.ro,
            size: info.image.virtual_size,
            direct: info.cache.direct,
            no_flush: info.cache.no_flush,
            detect_zeroes: info.detect_zeroes,
            encrypted: info.encrypted || info.image.encrypted,
            data_file: !info.image.format_specific["data"]["data-file"].is_null(),
        }
    }
}

#[derive(Deserialize)]
struct Graph {
    nodes: Vec<Vertex>,
    edges: Vec<GraphEdge>,
}

#[derive(Deserialize)]
struct Vertex {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    name: String,
}

#[derive(Deserialize)]
struct GraphEdge {
    parent: u64,
    child: u64,
    name: String,
}
