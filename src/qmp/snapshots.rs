//! The commands that go back to internal snapshots (QEMU's "QMP Reference Manual", "Migration" and
//! "Block devices"; `snapshot-load` is there since QEMU 6.0).

use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde_json::json;

use super::{Event, Job, Qmp, QmpError};

impl Qmp {
    /// Goes back to the internal snapshot `tag` of these nodes, by a job of that name; `vmstate` is
    /// the one whose snapshot holds the state of the machine. The guest stands still then.
    ///
    /// # Errors
    /// As [`Qmp::execute`]. What the job fails with comes as if the command had failed.
    pub async fn snapshot_load(
        &self,
        job: &str,
        tag: &str,
        vmstate: &str,
        devices: &[&str],
        patience: Duration,
    ) -> Result<(), QmpError> {
        const LOAD: &str = "snapshot-load";
        let mut events = self.events();
        let arguments = json!({
            "job-id": job, "tag": tag, "vmstate": vmstate, "devices": devices,
        });
        self.execute(LOAD, arguments).await?;
        let mut failed = false;
        let concluded = |event: &Event| {
            let is_ours = event.name == "JOB_STATUS_CHANGE" && event.data["id"] == job;
            failed |= is_ours && event.data["status"] == "aborting";
            is_ours && event.data["status"] == "concluded"
        };
        events.wait(concluded, patience).await?;
        let error = match failed {
            true => self.job(job).await?.and_then(|job| job.error).or(Some("it failed".into())),
            false => None,
        };
        self.dismiss(job).await?;
        match error {
            None => Ok(()),
            Some(desc) => {
                let class = "GenericError".to_owned();
                Err(QmpError::Command { command: LOAD.to_owned(), class, desc })
            }
        }
    }

    /// Forgets a job that has concluded.
    pub async fn dismiss(&self, job: &str) -> Result<(), QmpError> {
        self.execute("job-dismiss", json!({ "id": job })).await.map(drop)
    }

    /// Puts a copy of a descriptor in a set, by which QEMU opens it as `/dev/fdset/SET`.
    pub async fn add_fd(&self, set: u64, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.execute_with_fd("add-fd", json!({ "fdset-id": set }), fd).await.map(drop)
    }

    /// Closes the descriptors of a set, once nothing has them open.
    pub async fn remove_fds(&self, set: u64) -> Result<(), QmpError> {
        self.execute("remove-fd", json!({ "fdset-id": set })).await.map(drop)
    }

    /// Has QEMU write the state of all devices, without memory, to the descriptor in a set, which
    /// must have been opened for writing alone. The guest has to stand still, and goes on standing.
    pub async fn save_devices(&self, set: u64) -> Result<(), QmpError> {
        // With `live` QEMU would let go of the disks.
        let arguments = json!({ "filename": format!("/dev/fdset/{set}"), "live": false });
        self.execute("xen-save-devices-state", arguments).await.map(drop)
    }

    /// Resets the machine, as its button would.
    pub async fn system_reset(&self) -> Result<(), QmpError> {
        self.execute("system_reset", ()).await.map(drop)
    }

    /// All jobs that run in the background.
    pub async fn jobs(&self) -> Result<Vec<Job>, QmpError> {
        self.query("query-jobs", ()).await
    }
}
