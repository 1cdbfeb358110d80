//! Checks of the guest's disks: which are captured, and whether a revert will find them.

use super::error::CheckError;
use crate::guest::{self, FoundDisk};
use crate::libvirt::DomainDisk;
use crate::machine::{DiskRole, Machine, PluggedDevice};
use crate::qmp::Qmp;
use crate::save::checked::target;
use crate::save::copies;
use crate::save::error::SaveError;
use crate::save::options::{DiskChoice, SaveOptions};

/// The disks, each with its role. Where the guest is a domain of libvirt's, `domain_disks` are those
/// that libvirt knows, by which alone they can be captured.
pub(super) async fn check_disks(
    pid: i32,
    qmp: &Qmp,
    machine: &Machine,
    domain_disks: Option<&[DomainDisk]>,
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
        if domain_disks.is_some_and(|known| target(known, found).is_none()) {
            found.problem = Some("libvirt doesn't know it as a disk of this domain".to_owned());
        }
        if let Some(problem) = found.problem.take() {
            return Err(CheckError::Disk { disk: found.disk.describe(), problem }.into());
        }
        found.disk.role = DiskRole::Captured;
    }
    let captured = disks.iter().filter(|found| found.disk.role == DiskRole::Captured);
    let files = captured.filter_map(|found| found.disk.chain.first());
    copies::check(options, files.map(|file| file.path.as_str()))?;
    let count = |role| disks.iter().filter(|found| found.disk.role == role).count();
    let says = format!(
        "{} to capture, {} left out, {} read-only",
        count(DiskRole::Captured),
        count(DiskRole::Excluded),
        count(DiskRole::ReadOnly)
    );
    Ok((disks, says))
}

/// Whether a revert will find all that is captured. Returns why it will fail all the same: because
/// of devices and disks that may be missing.
///
/// # Errors
/// [`CheckError::Irrevertible`] for a disk that may not.
pub(super) fn check_revert(
    machine: &Machine,
    disks: &[FoundDisk],
    options: &SaveOptions,
) -> Result<Option<String>, SaveError> {
    let may_be_missing =
        |found: &FoundDisk| options.allow_missing_devices.iter().any(|name| found.is_called(name));
    let captured = disks
        .iter()
        .filter(|found| found.disk.role == DiskRole::Captured && !may_be_missing(found))
        .map(|found| &found.disk);
    guest::check_given(machine, captured)
        .map_err(|problem| CheckError::Irrevertible { problem })?;
    let missing: Vec<String> =
        machine.hotplug.missing.iter().map(PluggedDevice::describe).collect();
    Ok((!missing.is_empty()).then(|| {
        let missing = missing.join(", ");
        format!("a revert will fail unless QEMU is given what was left out: {missing}")
    }))
}
