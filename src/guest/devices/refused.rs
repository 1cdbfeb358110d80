//! Plugged devices, and disks, that no option can give.

use std::path::Path;

use super::peripherals::Peripheral;
use crate::guest::GuestError;
use crate::guest::command_line::CommandLine;
use crate::guest::disks::attached::FoundDisk;
use crate::guest::disks::drives::find;
use crate::machine::{DiskRole, PluggedDevice};

/// A device, and why it can't be given.
pub(super) struct Refused<'a> {
    /// The device.
    pub device: &'a Peripheral,
    /// Why, in words that follow its name.
    pub reason: String,
}

impl Refused<'_> {
    fn record(&self) -> PluggedDevice {
        let (id, driver) = (self.device.name().to_owned(), self.device.driver.clone());
        PluggedDevice { id, driver, ..PluggedDevice::default() }
    }
}

/// That every name is one of a plugged device, or of a disk, which may be on no option without
/// having been plugged in.
pub(super) fn check_names(
    names: &[String],
    plugged: &[Peripheral],
    disks: &[FoundDisk],
) -> Result<(), GuestError> {
    let is_known = |name: &str| {
        plugged.iter().any(|device| device.name() == name)
            || disks.iter().any(|disk| disk.is_called(name))
    };
    match names.iter().find(|name| !is_known(name)) {
        None => Ok(()),
        Some(name) => {
            let known: Vec<&str> = plugged.iter().map(Peripheral::name).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            Err(GuestError::NoSuchPlugged { name: name.clone(), known })
        }
    }
}

/// The devices that are left out, if all of them may be.
pub(super) fn allowed(
    refused: &[Refused<'_>],
    names: &[String],
) -> Result<Vec<PluggedDevice>, GuestError> {
    let is_allowed = |one: &&Refused<'_>| names.iter().any(|name| name == one.device.name());
    let (allowed, rest): (Vec<_>, Vec<_>) = refused.iter().partition(is_allowed);
    if rest.is_empty() {
        return Ok(allowed.into_iter().map(Refused::record).collect());
    }
    let told: Vec<String> =
        rest.iter().map(|one| format!("{}: {}", one.record().describe(), one.reason)).collect();
    let advice: Vec<String> = rest
        .iter()
        .map(|one| format!("`SaveOptions::allow_missing_devices` {}", one.device.name()))
        .collect();
    Err(GuestError::NotReplayable { devices: told.join("; "), advice: advice.join(" ") })
}

/// The captured disks that no option defines, as far as they may be missing.
pub(super) fn disks(
    line: &CommandLine,
    cwd: &str,
    disks: &[FoundDisk],
    names: &[String],
) -> Vec<PluggedDevice> {
    let captured = disks.iter().filter(|found| found.disk.role == DiskRole::Captured);
    let missing = captured.filter(|found| find(line, &found.disk, Path::new(cwd)).is_err());
    let named = |found: &FoundDisk| {
        let id = names.iter().find(|name| found.is_called(name))?.clone();
        Some(PluggedDevice { id, driver: "disk".into(), ..PluggedDevice::default() })
    };
    missing.filter_map(named).collect()
}
