//! Checks of the guest's disks: which are captured, and whether a revert will find them.

use super::error::CheckError;
use crate::guest::{self, FoundDisk};
use crate::machine::{DiskRole, Machine, PluggedDevice};
use crate::qmp::Qmp;
use crate::save::error::SaveError;
use crate::save::options::{DiskChoice, SaveOptions};

/// The disks, each with its role.
pub(super) async fn check_disks(
    pid: i32,
    qmp: &Qmp,
    machine: &Machine,
    options: &SaveOptions,
) -> Result<(Vec<FoundDisk>, String), SaveError> {
    let mut disks = guest::disks(pid, qmp, machine).await?;
    for name in &options.exclude_disks {
        if !disks.iter().any(|found| found.is_called(name)) {
            let disks = disks.iter().filter(|found| found.writable());
            let disks = disks.map(|found| found.disk.describe()).collect();
            return Err(CheckError::NoSuchDisk { name: name.clone(), disks }.into());
        }
    }
    for found in disks.iter_mut().filter(|found| found.writable()) {
        let excluded = options.exclude_disks.iter().any(|name| found.is_called(name));
        if options.disks == DiskChoice::None || excluded {
            continue;
        }
        if let Some(problem) = found.problem.take() {
            return Err(CheckError::Disk { disk: found.disk.describe(), problem }.into());
        }
        found.disk.role = DiskRole::Captured;
    }
    let count = |role| disks.iter().filter(|found| found.disk.role == role).count();
    let says = format!(
        "{} to capture, {} left out, {} read-only",
        count(DiskRole::Captured),
        count(DiskRole::Excluded),
        count(DiskRole::ReadOnly)
    );
    Ok((disks, says))
}

/// Why a revert will be refused: disks that it won't find where it looks for them, and devices
/// that were left out.
pub(super) fn check_revert(machine: &Machine, disks: &[FoundDisk]) -> Option<String> {
    let captured = disks.iter().filter(|found| found.disk.role == DiskRole::Captured);
    let problems = captured.filter_map(|found| guest::check_given(machine, &found.disk).err());
    let mut problems: Vec<String> = problems.map(|problem| problem.to_string()).collect();
    let missing = &machine.hotplug.missing;
    if !missing.is_empty() {
        let missing: Vec<String> = missing.iter().map(PluggedDevice::describe).collect();
        let missing = missing.join(", ");
        problems
            .push(format!("QEMU will refuse it unless it is given what was left out: {missing}"));
    }
    (!problems.is_empty()).then(|| problems.join("; "))
}
