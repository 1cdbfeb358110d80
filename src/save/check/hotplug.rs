//! The check of what was plugged in and out while the guest ran.

use crate::guest::{self, FoundDisk};
use crate::machine::{Hotplug, Machine};
use crate::qmp::Qmp;
use crate::save::error::SaveError;
use crate::save::options::SaveOptions;

/// The devices of a domain: libvirt knows them, whenever they were plugged in.
pub(super) async fn check_domain(qmp: &Qmp) -> Result<(Vec<String>, String), SaveError> {
    let devices = guest::device_paths(qmp).await?;
    Ok((devices, "libvirt knows what was plugged in".to_owned()))
}

/// Brings the machine's record up to date, and returns its devices. A device that a revert can't
/// bring back is an error, unless it may be left out.
pub(super) async fn check_hotplug(
    qmp: &Qmp,
    machine: &mut Machine,
    disks: &mut [FoundDisk],
    options: &SaveOptions,
) -> Result<(Vec<String>, String), SaveError> {
    let allowed = &options.allow_missing_devices;
    let devices = guest::record_hotplug(qmp, machine, disks, allowed).await?;
    let Hotplug { added, removed, missing, .. } = &machine.hotplug;
    let says = match machine.hotplug.is_empty() {
        true => "the machine is the one that QEMU was started with".to_owned(),
        false => format!(
            "{} device(s) plugged in, {} left out, {} option(s) without a device",
            added.len(),
            missing.len(),
            removed.len()
        ),
    };
    Ok((devices, says))
}
