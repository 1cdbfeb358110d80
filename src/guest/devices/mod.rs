//! Devices that were plugged in and out since QEMU started, of which its command line does
//! not tell.
//!
//! They are recorded as options: what was plugged in gets a `-device`, with a `-netdev`,
//! `-chardev`, `-object` or `-blockdev` for what stands behind it; the options of what was
//! plugged out go. A QEMU that waits for the state of a machine (`-incoming`) loads the state
//! of a hot-plugged device into a device of its command line, if that has the same address
//! and properties: libvirt migrates guests in this way. So nothing in a revert has to know of
//! hot-plugging: the rules for paths, sockets, disks and isolation are those for any option,
//! and `serve` works with a QEMU that was started by the recorded command line.

mod backends;
mod disk;
mod peripherals;
mod pinned;
mod properties;
mod refused;
mod removed;

use serde_json::{Map, Value, json};

use self::backends::Backends;
pub use self::peripherals::device_paths;
use self::peripherals::{Peripheral, in_order, peripherals};
use self::properties::Properties;
use self::refused::Refused;
use self::removed::Present;
use crate::guest::GuestError;
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::disks::attached::FoundDisk;
use crate::machine::{Hotplug, Machine, PluggedDevice};
use crate::qmp::{Qmp, QmpError};

/// Brings a record up to date with the machine as it is: the command line, the list of what
/// was plugged in and out, and the nodes by which plugged disks are found on the command
/// line. `allow_missing` names devices that may be left out if no option can give them.
/// Returns the devices of the machine, as [`device_paths`] does.
///
/// # Errors
/// [`GuestError::NotReplayable`] names the devices that no option can give,
/// [`GuestError::NoSuchPlugged`] a name in `allow_missing` of no plugged device and no disk.
pub async fn record_hotplug(
    qmp: &Qmp,
    machine: &mut Machine,
    disks: &mut [FoundDisk],
    allow_missing: &[String],
) -> Result<Vec<String>, GuestError> {
    let (program, args) = machine.argv.split_first().ok_or(GuestError::EmptyCommandLine)?;
    let mut line = CommandLine::parse(args);
    let paths = device_paths(qmp).await?;
    let devices = peripherals(qmp, &paths).await?;
    let plugged: Vec<Peripheral> = in_order(devices.iter().filter(|device| device.hotplugged));
    refused::check_names(allow_missing, &plugged, disks)?;

    let present = Present::ask(qmp, devices).await?;
    let (there, gone) = split(removed::devices(&line, &present));
    if !gone.is_empty() {
        line = pinned::pinned(qmp, &line, &there).await?;
    }
    let removed = removed::leave_out(&mut line, &present, &gone);
    let mut hotplug = Hotplug { removed, ..Hotplug::default() };

    let mut refused = Vec::new();
    let backends = Backends::ask(qmp).await?;
    let networks = backends.user_networks(|id| is_given(&line, &["netdev", "nic", "net"], id));
    for option in networks.into_iter().flat_map(|id| backends.netdev(id)) {
        hotplug.backends.push(option.to_string());
        line.push(option);
    }
    for device in &plugged {
        let disk = disks.iter_mut().find(|disk| device.has_disk(disk));
        match replayed(qmp, &backends, &line, device, disk, &refused).await? {
            Ok(Replayed { record, option, backends }) => {
                hotplug.backends.extend(backends.iter().map(CommandOption::to_string));
                hotplug.added.push(record);
                backends.into_iter().chain([option]).for_each(|option| line.push(option));
            }
            Err(reason) => refused.push(Refused { device, reason }),
        }
    }
    hotplug.missing = refused::allowed(&refused, allow_missing)?;
    hotplug.missing.extend(refused::disks(&line, &machine.cwd, disks, allow_missing));
    if !hotplug.is_empty() {
        let program = program.clone();
        machine.argv = std::iter::once(program).chain(line.into_args()).collect();
        machine.hotplug = hotplug;
    }
    Ok(paths)
}

/// Tells the options whose devices are there from those whose devices are gone.
fn split(options: Vec<(usize, Option<&Peripheral>)>) -> (Vec<(usize, &Peripheral)>, Vec<usize>) {
    let (mut there, mut gone) = (Vec::new(), Vec::new());
    for (at, device) in options {
        match device {
            Some(device) => there.push((at, device)),
            None => gone.push(at),
        }
    }
    (there, gone)
}

/// A plugged device as a command line gives it.
struct Replayed {
    record: PluggedDevice,
    /// Its `-device`.
    option: CommandOption,
    /// The options of what stands behind it, which come first.
    backends: Vec<CommandOption>,
}

/// Puts a plugged device into options, or tells why that can't be done.
async fn replayed(
    qmp: &Qmp,
    backends: &Backends,
    line: &CommandLine,
    device: &Peripheral,
    disk: Option<&mut FoundDisk>,
    refused: &[Refused<'_>],
) -> Result<Result<Replayed, String>, QmpError> {
    if let Some(parent) = refused.iter().find(|parent| device.is_plugged_into(parent.device)) {
        return Ok(Err(format!("it is plugged into {}", parent.device.name())));
    }
    let Properties { mut values, objects, is_usb } = match backends.cpu(device) {
        Some(place) => Properties::of_cpu(place.clone()),
        None => Properties::ask(qmp, device).await?,
    };
    let mut options = Vec::new();
    let text = |key: &str| values.get(key).and_then(Value::as_str).map(str::to_owned);
    let netdev = text("netdev").filter(|id| !is_given(line, &["netdev", "nic"], id));
    let chardev = text("chardev").filter(|id| !is_given(line, &["chardev"], id));
    let objects = objects.into_iter().filter(|id| !is_given(line, &["object"], id));
    for object in objects {
        options.push(backends.object(qmp, &object).await?);
    }
    if let Some(chardev) = chardev {
        options.push(backends.chardev(qmp, &chardev).await?);
    }
    options.extend(netdev.map(|netdev| backends.netdev(&netdev)));
    if let Some(disk) = disk {
        match disk::option(line, disk) {
            Ok((name, option)) => {
                values.insert("drive".into(), json!(name));
                options.extend(option.map(Ok));
            }
            Err(reason) => return Ok(Err(reason)),
        }
    }
    if is_usb {
        match backends.usb_port(device) {
            Ok(port) => values.insert("port".into(), json!(port)),
            Err(reason) => return Ok(Err(reason)),
        };
    }
    let backends: Result<Vec<CommandOption>, String> = options.into_iter().collect();
    Ok(backends.map(|backends| {
        let option = device_option(device, &values);
        let (id, driver) = (device.name().to_owned(), device.driver.clone());
        Replayed { record: PluggedDevice { id, driver, properties: values }, option, backends }
    }))
}

/// The `-device` of a plugged device. JSON, because it keeps the types of values.
fn device_option(device: &Peripheral, properties: &Map<String, Value>) -> CommandOption {
    let mut arguments = Map::new();
    arguments.insert("driver".into(), json!(device.driver));
    arguments.extend(device.id.iter().map(|id| ("id".into(), json!(id))));
    arguments.extend(device.bus_name().map(|bus| ("bus".into(), json!(bus))));
    arguments.extend(properties.clone());
    CommandOption::new("device", Value::Object(arguments).to_string())
}

/// Whether one of these options gives something with this id.
fn is_given(line: &CommandLine, options: &[&str], id: &str) -> bool {
    line.options()
        .filter(|option| options.contains(&option.name()))
        .any(|option| removed::id(option).as_deref() == Some(id))
}
