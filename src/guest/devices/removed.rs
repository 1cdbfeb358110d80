//! Options of a command line whose device or backend is not in the machine any more.

use std::collections::{HashMap, HashSet};

use super::peripherals::Peripheral;
use crate::guest::command_line::parameters::Spec;
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::guest::disks::drives;
use crate::qmp::{Qmp, QmpError};

/// What a machine has now, by the names that a command line knows.
#[derive(Debug, Default)]
pub(super) struct Present {
    devices: Vec<Peripheral>,
    /// By the name of the option that gives them: ids.
    backends: HashMap<&'static str, HashSet<String>>,
}

impl Present {
    /// Asks for it.
    pub async fn ask(qmp: &Qmp, devices: Vec<Peripheral>) -> Result<Present, QmpError> {
        let networks = qmp.networks().await?.into_iter().map(|network| network.name);
        let chardevs = qmp.chardevs().await?.into_iter().map(|chardev| chardev.label);
        let objects = qmp.qom_children("/objects").await?.into_iter().map(|object| object.name);
        let drives = qmp.block_devices().await?.into_iter().map(|drive| drive.device);
        let nodes = qmp.block_nodes().await?.into_iter().map(|node| node.name);
        let backends = HashMap::from([
            ("netdev", networks.collect()),
            ("chardev", chardevs.collect()),
            ("object", objects.collect()),
            ("drive", drives.collect()),
            ("blockdev", nodes.collect()),
        ]);
        Ok(Present { devices, backends })
    }

    /// The device with this id that QEMU was started with, if it is there and not another that
    /// was plugged in under that id.
    fn device(&self, id: &str) -> Option<&Peripheral> {
        self.cold().find(|device| device.id.as_deref() == Some(id))
    }

    /// The devices that QEMU was started with.
    fn cold(&self) -> impl Iterator<Item = &Peripheral> {
        self.devices.iter().filter(|device| !device.hotplugged)
    }

    /// Whether a backend is there; of other options, and of a hub's ports, nothing is known.
    fn has_backend(&self, option: &CommandOption) -> bool {
        let spec = Spec::parse(option.value());
        if option.name() == "netdev" && spec.get_or_implied("type") == Some("hubport") {
            return true;
        }
        match (self.backends.get(option.name()), id(option)) {
            (Some(ids), Some(id)) => ids.contains(&id),
            _ => true,
        }
    }
}

/// The id that an option gives, or the name of its node.
pub(super) fn id(option: &CommandOption) -> Option<String> {
    let key = if option.name() == "blockdev" { "node-name" } else { "id" };
    Spec::parse(option.value()).get(key).map(str::to_owned)
}

/// The options of a command line that give devices, by their places among its arguments, each
/// with its device, if that is still there.
pub(super) fn devices<'a>(
    line: &CommandLine,
    present: &'a Present,
) -> Vec<(usize, Option<&'a Peripheral>)> {
    let numbered = |number| {
        let mut cold = present.cold().filter(|device| device.id.is_none());
        cold.find(|device| device.number() == Some(number))
    };
    let anonymous = anonymous_devices(line);
    // A number beyond those means a device that we don't know of: then none can be told.
    let numbers = present.cold().filter(|device| device.id.is_none());
    let are_known = numbers.filter_map(Peripheral::number).all(|number| number < anonymous.len());
    let mut found: Vec<_> = anonymous
        .into_iter()
        .enumerate()
        .filter(|_| are_known)
        .map(|(number, at)| (at, numbered(number)))
        .collect();
    for (at, arg) in line.args.iter().enumerate() {
        if let Arg::Option(option) = arg
            && option.name() == "device"
            && let Some(id) = id(option)
        {
            found.push((at, present.device(&id)));
        }
    }
    found
}

/// Leaves out what is not there any more: these devices, the disks that belonged to them, and
/// backends that nothing uses. Gives the options that went.
pub(super) fn leave_out(
    line: &mut CommandLine,
    present: &Present,
    devices: &[usize],
) -> Vec<String> {
    let mut gone = take_out(line, |at, _| devices.contains(&at));
    // QEMU leaves the node of a disk open when its device goes, and a revert would have to
    // open a file that the guest doesn't use.
    let disks: Vec<String> = gone
        .iter()
        .filter(|option| option.name() == "device")
        .filter_map(|option| Spec::parse(option.value()).get("drive").map(str::to_owned))
        .filter(|name| !drives::is_used(line, name))
        .collect();
    let of_a_gone_device = |_, option: &CommandOption| {
        ["drive", "blockdev"].contains(&option.name())
            && id(option).is_some_and(|id| disks.contains(&id))
    };
    let nodes = take_out(line, of_a_gone_device);
    gone.extend(drives::take_unused(line, &nodes));
    gone.extend(nodes);
    loop {
        let used: Vec<bool> = line
            .args
            .iter()
            .map(|arg| matches!(arg, Arg::Option(o) if is_needed(line, o)))
            .collect();
        let unused = take_out(line, |at, option| !present.has_backend(option) && !used[at]);
        if unused.is_empty() {
            return gone.iter().map(CommandOption::to_string).collect();
        }
        gone.extend(unused);
    }
}

/// Whether another option names what this one gives.
fn is_needed(line: &CommandLine, option: &CommandOption) -> bool {
    id(option).is_some_and(|id| drives::is_used(line, &id))
}

/// Takes out the options for which `is_gone` holds, given their places.
fn take_out(
    line: &mut CommandLine,
    is_gone: impl Fn(usize, &CommandOption) -> bool,
) -> Vec<CommandOption> {
    let mut gone = Vec::new();
    let args = std::mem::take(&mut line.args);
    for (at, arg) in args.into_iter().enumerate() {
        match arg {
            Arg::Option(option) if is_gone(at, &option) => gone.push(option),
            kept => line.args.push(kept),
        }
    }
    gone
}

/// The places of options that give a device without an id, in the order in which QEMU makes
/// and counts these devices: those of `-device` lists, of `-drive if=virtio`, and of
/// `-device` as JSON (`qemu_create_cli_devices` in QEMU's vl.c). Empty where other options
/// make such devices as well.
fn anonymous_devices(line: &CommandLine) -> Vec<usize> {
    const OTHERS: [&str; 4] = ["readconfig", "virtfs", "watchdog", "virtioconsole"];
    if line.options().any(|option| OTHERS.contains(&option.name())) {
        return Vec::new();
    }
    let places = |wanted: &dyn Fn(&CommandOption, &Spec) -> bool| -> Vec<usize> {
        let is_wanted = |arg: &Arg| match arg {
            Arg::Option(option) => wanted(option, &Spec::parse(option.value())),
            Arg::Image(_) => false,
        };
        (0..line.args.len()).filter(|at| is_wanted(&line.args[*at])).collect()
    };
    let is_device =
        |option: &CommandOption, spec: &Spec| option.name() == "device" && spec.get("id").is_none();
    let is_json = |spec: &Spec| matches!(spec, Spec::Json(_));
    let mut devices = places(&|option, spec| is_device(option, spec) && !is_json(spec));
    devices.extend(places(&|option, spec| {
        option.name() == "drive" && spec.get("if") == Some("virtio")
    }));
    devices.extend(places(&|option, spec| is_device(option, spec) && is_json(spec)));
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn present(devices: &[(&str, bool)], backends: &[(&'static str, &[&str])]) -> Present {
        let device = |(name, hotplugged): &(&str, bool)| Peripheral {
            path: format!("/machine/peripheral/{name}"),
            id: (!name.contains('[')).then(|| (*name).to_owned()),
            hotplugged: *hotplugged,
            ..Peripheral::default()
        };
        let ids = |ids: &[&str]| ids.iter().map(|id| id.to_string()).collect();
        Present {
            devices: devices.iter().map(device).collect(),
            backends: backends.iter().map(|(name, list)| (*name, ids(list))).collect(),
        }
    }

    #[track_caller]
    fn check(text: &str, present: &Present, left: &str, removed: &[&str]) {
        let mut line = CommandLine::parse(text.split_whitespace());
        let is_gone = |(at, device): (usize, Option<&Peripheral>)| device.is_none().then_some(at);
        let gone: Vec<usize> = devices(&line, present).into_iter().filter_map(is_gone).collect();
        assert_eq!(leave_out(&mut line, present, &gone), removed);
        assert_eq!(line.into_args().join(" "), left);
    }

    #[test]
    fn a_device_that_is_gone_takes_its_disk_with_it() {
        let text = "-netdev user,id=n0 -device e1000,netdev=n0,id=nic0 \
                    -blockdev driver=file,node-name=f,filename=/d \
                    -blockdev driver=raw,node-name=d,file=f -device virtio-blk-pci,drive=d,id=vda \
                    -m 64 -device usb-ehci,id=usb";
        let nodes: (&str, &[&str]) = ("blockdev", &["f", "d"]);
        let all = present(
            &[("nic0", false), ("vda", false), ("usb", false)],
            &[("netdev", &["n0"]), nodes],
        );
        let all_args = text.split_whitespace().collect::<Vec<_>>().join(" ");
        check(text, &all, &all_args, &[]);
        // A backend stays as long as QEMU has it.
        let without = present(&[("usb", false)], &[("netdev", &["n0"]), nodes]);
        let removed = [
            "-device e1000,netdev=n0,id=nic0",
            "-device virtio-blk-pci,drive=d,id=vda",
            "-blockdev driver=file,node-name=f,filename=/d",
            "-blockdev driver=raw,node-name=d,file=f",
        ];
        check(text, &without, "-netdev user,id=n0 -m 64 -device usb-ehci,id=usb", &removed);
        // Plugged in again under the same id, it is another one.
        let again =
            present(&[("nic0", true), ("vda", false), ("usb", false)], &[("netdev", &[]), nodes]);
        let left = all_args
            .replace("-netdev user,id=n0 ", "")
            .replace("-device e1000,netdev=n0,id=nic0 ", "");
        check(text, &again, &left, &["-device e1000,netdev=n0,id=nic0", "-netdev user,id=n0"]);
    }

    #[test]
    fn devices_without_an_id_are_told_by_their_number() {
        let text = r#"-device {"driver":"e1000"} -device vmxnet3 -drive if=virtio,file=/d -device rtl8139"#;
        let numbers = |list: &[usize]| {
            let names: Vec<String> = list.iter().map(|n| format!("device[{n}]")).collect();
            let devices: Vec<(&str, bool)> = names.iter().map(|n| (n.as_str(), false)).collect();
            present(&devices, &[])
        };
        check(text, &numbers(&[0, 1, 2, 3]), text, &[]);
        let left = r#"-device {"driver":"e1000"} -device vmxnet3 -drive if=virtio,file=/d"#;
        check(text, &numbers(&[0, 2, 3]), left, &["-device rtl8139"]);
        let left = text.replace("-drive if=virtio,file=/d ", "");
        check(text, &numbers(&[0, 1, 3]), &left, &["-drive if=virtio,file=/d"]);
        // There is one that no option gives: nothing is known of any.
        check(text, &numbers(&[0, 7]), text, &[]);
    }
}
