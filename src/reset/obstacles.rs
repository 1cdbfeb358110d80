//! What stands in the way of a reset in place: looked at before anything is touched.

use std::collections::BTreeSet;

use super::ResetError;
use crate::guest::RESET_POINT;
use crate::qmp::{Qmp, QmpError, QomChild};

/// Where devices are that were plugged in, or given on the command line.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// What a machine has been made of since its image: what a reset does not bring back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    devices: BTreeSet<String>,
    /// Whether it has a balloon, by which the guest gives memory back when it is told to.
    pub has_balloon: bool,
    /// Whether the guest tells of memory that it does not use, which QEMU then gives back.
    pub reports_free: bool,
}

/// What a reset needs to know of a machine that can be reset.
#[derive(Debug)]
pub(super) struct Resettable {
    /// The nodes of the disks' overlays.
    pub overlays: Vec<String>,
    /// Whether QEMU runs no guest before it has been told to reset the machine: the guest has
    /// powered off or panicked.
    pub needs_reset: bool,
}

impl Machine {
    /// Looks at a machine that is as its image says.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn look(qmp: &Qmp) -> Result<Machine, QmpError> {
        let [first, second] = DEVICES;
        let (first, second) = tokio::join!(qmp.qom_children(first), qmp.qom_children(second));
        let (first, second) = (first?, second?);
        let (mut has_balloon, mut reports_free) = (false, false);
        for (parent, children) in DEVICES.iter().zip([&first, &second]) {
            for balloon in children.iter().filter(|child| child.kind.contains("balloon")) {
                let path = format!("{parent}/{}", balloon.name);
                let reports = qmp.qom_value(&path, "free-page-reporting").await?;
                has_balloon = true;
                reports_free |= reports == Some(true.into());
            }
        }
        // Those without an id are numbered in their order.
        let name = |child: QomChild| format!("{} ({})", child.name, child.kind);
        let devices = first.into_iter().chain(second).map(name).collect();
        Ok(Machine { devices, has_balloon, reports_free })
    }

    /// Looks whether the machine can be reset in place now.
    ///
    /// # Errors
    /// [`ResetError::Obstacle`] says what is in the way.
    pub(super) async fn check(&self, qmp: &Qmp) -> Result<Resettable, ResetError> {
        let (now, disks, jobs, migration, status) = tokio::join!(
            Machine::look(qmp),
            qmp.block_devices(),
            qmp.jobs(),
            qmp.migration_info(),
            qmp.status(),
        );
        let refuse = |why: String| Err(ResetError::Obstacle(why));
        let now = now?;
        if let Some(device) = now.devices.difference(&self.devices).next() {
            return refuse(format!("the device `{device}` was plugged in since"));
        }
        if let Some(device) = self.devices.difference(&now.devices).next() {
            return refuse(format!("the device `{device}` was unplugged since"));
        }
        if let Some(job) = jobs?.first() {
            return refuse(format!("the block job `{}` is under way", job.id));
        }
        let under_way = ["active", "setup", "device", "pre-switchover", "cancelling"];
        match migration?.status {
            Some(status) if under_way.contains(&status.as_str()) => {
                return refuse(format!("a migration or a save is under way ({status})"));
            }
            _ => {}
        }
        let mut overlays = Vec::new();
        for disk in disks?.into_iter().filter(|disk| disk.writable) {
            if !disk.snapshots.iter().any(|name| name == RESET_POINT) {
                let name = disk.qdev.unwrap_or(disk.device);
                return refuse(format!(
                    "what is written to the disk `{name}` goes to no overlay that a revert has \
                     made for a reset"
                ));
            }
            overlays.extend(disk.node_name);
        }
        overlays.sort_unstable();
        overlays.dedup();
        let needs_reset = ["shutdown", "guest-panicked", "internal-error"];
        Ok(Resettable { overlays, needs_reset: needs_reset.contains(&status?.as_str()) })
    }
}
