//! The way back, step by step.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::ResetError;
use super::obstacles::{Machine, Resettable};
use super::state_file::StateFile;
use super::tracker::Tracker;
use crate::guest::RESET_POINT;
use crate::image::Sections;
use crate::qmp::{Qmp, QmpError};

/// The descriptor set by which QEMU opens the state file: below those of overlays.
const SET: u64 = 899_999;

/// The names of the node of the state file, and of the job.
const NODE: &str = "snapback-state";
const JOB: &str = "snapback-reset";

/// How long QEMU may take for one step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes a guest back to the moment of its image: memory, devices and disks. It runs then if it
/// did at the moment. Returns how many host pages were written back.
///
/// Memory is written back twice. Before the devices' state is loaded, since some look at their
/// rings there while they load; and behind it, since QEMU resets the machine first, which writes
/// firmware and the like to memory.
///
/// # Errors
/// [`ResetError::Obstacle`]: nothing was touched. Any other once the guest has been stopped: it
/// does not run, and must not be run.
pub(crate) async fn rewind(
    qmp: &Qmp,
    machine: &Machine,
    tracker: &Arc<Tracker>,
    state: (&StateFile, &Sections),
    runs: bool,
) -> Result<u64, ResetError> {
    tracker.ready().await?;
    let qmp = &qmp.with_timeout(PATIENCE);
    let resettable = machine.check(qmp).await?;
    // What an earlier reset has left in QEMU is taken away behind it: here it would cost time.
    let (stopped, opened) = tokio::join!(biased; stop(qmp, &resettable), open(qmp, state));
    stopped?;
    opened?;
    let mut pages = restore(tracker).await?;
    load(qmp, &resettable).await?;
    pages += restore(tracker).await?;
    if runs {
        qmp.cont().await?;
    }
    if let Err(error) = close(qmp).await {
        // The guest is right all the same; the next reset finds the name taken, and says so.
        tracing::warn!("QEMU still has the state of the devices open: {error}");
    }
    Ok(pages)
}

/// Has the guest stand still.
async fn stop(qmp: &Qmp, resettable: &Resettable) -> Result<(), QmpError> {
    qmp.stop().await?;
    match resettable.needs_reset {
        true => qmp.system_reset().await,
        false => Ok(()),
    }
}

/// Has QEMU open the state file.
async fn open(qmp: &Qmp, (file, sections): (&StateFile, &Sections)) -> Result<(), ResetError> {
    let node = json!({
        "driver": "qcow2",
        "node-name": NODE,
        "cache": { "direct": false, "no-flush": true },
        "file": {
            "driver": "file",
            "filename": format!("/dev/fdset/{SET}"),
            "auto-read-only": false,
            "locking": "off",
            "cache": { "direct": false, "no-flush": true },
        },
    });
    let fd = file.write(sections)?;
    let (added, opened) = tokio::join!(biased; qmp.add_fd(SET, fd), qmp.blockdev_add(&node));
    added?;
    Ok(opened?)
}

/// Has QEMU close it.
async fn close(qmp: &Qmp) -> Result<(), QmpError> {
    let (deleted, removed) = tokio::join!(biased; qmp.blockdev_del(NODE), qmp.remove_fds(SET));
    deleted?;
    removed
}

/// Writes memory back.
async fn restore(tracker: &Arc<Tracker>) -> Result<u64, ResetError> {
    let tracker = Arc::clone(tracker);
    let restored = tokio::task::spawn_blocking(move || tracker.restore()).await;
    restored.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// Has QEMU load the devices' state, and go back to the disks' snapshots.
async fn load(qmp: &Qmp, resettable: &Resettable) -> Result<(), ResetError> {
    let overlays = resettable.overlays.iter().map(String::as_str);
    let devices: Vec<&str> = [NODE].into_iter().chain(overlays).collect();
    match qmp.snapshot_load(JOB, RESET_POINT, NODE, &devices, PATIENCE).await {
        Err(QmpError::Command { desc, .. }) => Err(ResetError::Load(desc)),
        loaded => Ok(loaded?),
    }
}
