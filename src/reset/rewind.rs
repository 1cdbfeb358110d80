//! The way back, step by step.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::ResetError;
use super::obstacles::{Machine, Resettable};
use super::state_file::StateFile;
use super::undo::Undo;
use crate::guest::RESET_POINT;
use crate::image::Sections;
use crate::qmp::{Events, Qmp, QmpError};

/// The descriptor set by which QEMU opens the state file: below those of overlays.
const SET: u64 = 899_999;

/// The names of the node of the state file, and of the job.
const NODE: &str = "snapback-state";
const JOB: &str = "snapback-reset";

/// How long QEMU may take for one step.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes a guest back to the moment of its image, again and again. It keeps no connection to QEMU:
/// one with a single monitor for all may need it for others in between.
pub(crate) struct Rewinder {
    machine: Machine,
    memory: Arc<Undo>,
    state: StateFile,
    /// Whether QEMU has the state file open.
    is_open: bool,
    /// Whether the guest ran at the moment.
    runs: bool,
    /// What QEMU has told since the last time, or will have been asked for; none where nobody has
    /// listened all the time.
    events: Option<Events>,
}

impl Rewinder {
    /// Looks at a machine that is as its image says, and whose memory can be taken back.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn new(
        qmp: &Qmp,
        memory: Arc<Undo>,
        state: StateFile,
        runs: bool,
    ) -> Result<Rewinder, ResetError> {
        let qmp = qmp.with_timeout(PATIENCE);
        let events = Some(qmp.events());
        let machine = Machine::look(&qmp).await?;
        // One that another process has left, which went back to another image.
        if qmp.block_nodes().await?.iter().any(|node| node.name == NODE) {
            close(&qmp).await?;
        }
        Ok(Rewinder { machine, memory, state, is_open: false, runs, events })
    }

    /// Nobody listens to QEMU any more until the next time.
    pub fn hang_up(&mut self) {
        self.events = None;
    }

    /// Has QEMU close what it has been given, once nobody wants to go back any more.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn tidy_up(&mut self, qmp: &Qmp) -> Result<(), ResetError> {
        match std::mem::take(&mut self.is_open) {
            true => Ok(close(&qmp.with_timeout(PATIENCE)).await?),
            false => Ok(()),
        }
    }

    /// What takes the guest's memory back.
    pub fn memory(&self) -> &Arc<Undo> {
        &self.memory
    }

    /// Makes ready for the next time to go back, while the guest runs. The devices' state is that of
    /// these sections, where they are known by now.
    ///
    /// # Errors
    /// When QEMU refuses. It is tried again when it is needed.
    pub async fn prepare(
        &mut self,
        qmp: &Qmp,
        sections: Option<&Sections>,
    ) -> Result<(), ResetError> {
        self.blocking(Undo::expect_the_same).await?;
        match sections {
            Some(sections) => self.open(&qmp.with_timeout(PATIENCE), sections).await,
            None => Ok(()),
        }
    }

    /// Has QEMU open a file with the devices' state of these sections, in the place of the one that
    /// it has been given before.
    async fn open(&mut self, qmp: &Qmp, sections: &Sections) -> Result<(), ResetError> {
        if std::mem::take(&mut self.is_open) {
            close(qmp).await?;
        }
        open(qmp, self.state.write(sections)?).await?;
        self.is_open = true;
        Ok(())
    }

    /// Takes the guest back: memory, devices and disks. It stands still then, until
    /// [`Rewinder::run`]. Returns how many host pages were written back. The devices' state is that of the last
    /// [`Rewinder::prepare`], or else that of `sections`.
    ///
    /// Memory is written back twice. Before the devices' state is loaded, since some look at their
    /// rings there while they load; and behind it, since QEMU resets the machine first, which
    /// writes firmware and the like to memory.
    ///
    /// # Errors
    /// [`ResetError::Obstacle`]: nothing was touched. Any other: the guest may stand still between
    /// two moments, and must not be run.
    pub async fn rewind(&mut self, qmp: &Qmp, sections: &Sections) -> Result<u64, ResetError> {
        let qmp = &qmp.with_timeout(PATIENCE);
        let ready = self.make_ready(qmp, sections).await;
        let resettable = ready.map_err(ResetError::into_refusal)?;
        stop(qmp, &resettable).await?;
        if self.has_given_memory_back(qmp).await {
            self.blocking(Undo::find_given_back).await?;
        }
        let mut pages = self.blocking(Undo::restore).await?;
        load(qmp, &resettable).await?;
        pages += self.blocking(Undo::restore_again).await?;
        Ok(pages)
    }

    /// Lets a guest that has gone back run, if it did at the moment.
    ///
    /// # Errors
    /// When QEMU does not.
    pub async fn run(&self, qmp: &Qmp) -> Result<(), ResetError> {
        match self.runs {
            true => Ok(qmp.cont().await?),
            false => Ok(()),
        }
    }

    /// Looks whether all is there that is needed, while the guest runs. Nothing of it is touched.
    async fn make_ready(
        &mut self,
        qmp: &Qmp,
        sections: &Sections,
    ) -> Result<Resettable, ResetError> {
        self.memory.ready().await?;
        let resettable = self.machine.check(qmp).await?;
        if !self.is_open {
            self.open(qmp, sections).await?;
        }
        Ok(resettable)
    }

    /// Whether the guest may have given memory back to the host by its balloon since the last time:
    /// what was there is gone, and nobody has written to it. QEMU tells of each change of a
    /// balloon's size.
    async fn has_given_memory_back(&mut self, qmp: &Qmp) -> bool {
        let Rewinder { events, machine, .. } = self;
        // What it tells further belongs to this time as well.
        let Some(mut events) = events.replace(qmp.events()) else { return machine.has_balloon };
        let told = async {
            loop {
                match events.next().await {
                    Ok(event) if event.name == "BALLOON_CHANGE" => return,
                    Ok(_) => {}
                    // It may be among those that are lost.
                    Err(_) => return,
                }
            }
        };
        let has_told = tokio::time::timeout(Duration::ZERO, told).await.is_ok();
        has_told || machine.reports_free
    }

    /// Works on memory, on a thread that may block.
    async fn blocking(
        &self,
        work: fn(&Undo) -> Result<u64, ResetError>,
    ) -> Result<u64, ResetError> {
        let memory = Arc::clone(&self.memory);
        let done = tokio::task::spawn_blocking(move || work(&memory)).await;
        done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }
}

/// Has the guest stand still.
async fn stop(qmp: &Qmp, resettable: &Resettable) -> Result<(), QmpError> {
    qmp.stop().await?;
    match resettable.needs_reset {
        true => qmp.system_reset().await,
        false => Ok(()),
    }
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

/// Has QEMU open the state file. Nothing of it need ever reach a disk.
async fn open(qmp: &Qmp, file: std::os::fd::BorrowedFd<'_>) -> Result<(), QmpError> {
    let cache = json!({ "direct": false, "no-flush": true });
    let node = json!({
        "driver": "qcow2",
        "node-name": NODE,
        "cache": cache,
        "file": {
            "driver": "file",
            "filename": format!("/dev/fdset/{SET}"),
            "auto-read-only": false,
            "locking": "off",
            "cache": cache,
        },
    });
    let (added, opened) = tokio::join!(biased; qmp.add_fd(SET, file), qmp.blockdev_add(&node));
    added.and(opened)
}

/// Has QEMU close it.
async fn close(qmp: &Qmp) -> Result<(), QmpError> {
    let (deleted, removed) = tokio::join!(biased; qmp.blockdev_del(NODE), qmp.remove_fds(SET));
    deleted.and(removed)
}
