//! What a recorded command line takes of the host that it is started on: programs, files,
//! directories, network interfaces. Only read from the command line; nothing is asked here.

use std::path::{Path, PathBuf};

use crate::guest::GuestError;
use crate::guest::command_line::backend;
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::guest::described::find;
use crate::guest::disks::drives;
use crate::guest::start::netdevs::{self, netdev_id};
use crate::guest::start::paths::{self, PLAIN_PATHS};
use crate::guest::start::rewrite::{RewriteOptions, drop_own_options, program_and_environment};
use crate::guest::start::{collisions, own};
use crate::host::in_use::Address;
use crate::machine::{DiskRole, Machine};

/// The bridge that `-netdev bridge` uses where it names none (qemu(1)).
const DEFAULT_BRIDGE: &str = "br0";

/// What a guest takes of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// QEMU: an absolute path, or a name that is in no directory of PATH.
    pub binary: PathBuf,
    /// Variables that QEMU is started with.
    pub env: Vec<(String, String)>,
    /// Accelerators, in the order in which QEMU tries them; none where it takes its default.
    pub accelerators: Vec<String>,
    /// The model of its processors, where one is named.
    pub cpu: Option<String>,
    /// Files, directories and devices that have to be there, but those of captured disks.
    pub files: Vec<FileNeed>,
    /// Directories in which QEMU makes a socket or a file.
    pub directories: Vec<FileNeed>,
    /// Network interfaces of the host.
    pub interfaces: Vec<InterfaceNeed>,
}

/// A file that an option names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileNeed {
    /// The option.
    pub option: String,
    /// The file, absolute.
    pub path: PathBuf,
}

/// A network interface that an option names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceNeed {
    /// The option.
    pub option: String,
    /// The interface.
    pub name: String,
    /// The id of the network backend, where it has one.
    pub id: Option<String>,
    /// Whether QEMU makes it if it isn't there: a tap, with the right to.
    pub is_made: bool,
}

/// What a record takes, with these options.
///
/// # Errors
/// When a rule of the options can't be followed.
pub fn needs(machine: &Machine, options: &RewriteOptions) -> Result<Needs, GuestError> {
    let moves = match &options.own {
        Some(own) => own::path_rules(machine, &options.paths, own)?,
        None => options.paths.clone(),
    };
    let rules = paths::rules(&moves)?;
    let mut line = CommandLine::parse(machine.argv.get(1..).unwrap_or_default());
    drop_own_options(&mut line);
    leave_out_captured(&mut line, machine);
    paths::replace_in_line(&mut line, &rules);
    netdevs::replace_in_line(&mut line, &options.netdevs, &mut Vec::new())?;
    line.args.extend(CommandLine::parse(&options.extra).args);

    let cwd = PathBuf::from(paths::replace(&machine.cwd, &rules));
    let (binary, env) = program_and_environment(machine, options, &rules)?;
    let binary = find(&binary, &cwd).unwrap_or(binary);

    let mut files = vec![FileNeed { option: "its working directory".into(), path: cwd.clone() }];
    let mut directories = Vec::new();
    for arg in &line.args {
        let (option, made, named) = match arg {
            Arg::Image(path) => (path.clone(), Vec::new(), vec![path.clone()]),
            Arg::Option(option) => (option.to_string(), made(option), named(option)),
        };
        let need = |path: PathBuf| FileNeed { option: option.clone(), path };
        let in_directories = made.iter().filter(|path| !path.starts_with("/dev/"));
        let in_directories =
            in_directories.filter_map(|path| Some(cwd.join(path).parent()?.into()));
        directories.extend(in_directories.map(need));
        files.extend(
            named.iter().filter(|path| !made.contains(path)).map(|path| cwd.join(path)).map(need),
        );
    }
    Ok(Needs {
        binary,
        env,
        accelerators: accelerators(&line),
        cpu: cpu(&line),
        files,
        directories,
        interfaces: line.options().filter_map(interface).collect(),
    })
}

/// Leaves out the options of captured disks, which get overlays in their place.
fn leave_out_captured(line: &mut CommandLine, machine: &Machine) {
    let captured = machine.disks.iter().filter(|disk| disk.role == DiskRole::Captured);
    // One that is not found is told when the command line is rewritten.
    let places = drives::find_each(line, captured, Path::new(&machine.cwd));
    let mut places = places.unwrap_or_default();
    places.sort_unstable();
    let mut above = Vec::new();
    for place in places.into_iter().rev() {
        if let Arg::Option(option) = line.args.remove(place) {
            above.push(option);
        }
    }
    drives::take_unused(line, &above);
}

/// The files and sockets that an option has QEMU make.
fn made(option: &CommandOption) -> Vec<String> {
    let mut made = collisions::outputs(option);
    match backend::listens_at(option).or_else(|| collisions::other_socket(option)) {
        Some(Address::Unix(path)) => made.push(path),
        Some(Address::Abstract(_) | Address::Tcp { .. }) | None => {}
    }
    made.retain(|path| !path.is_empty());
    made
}

/// The files that an option names, whatever for.
fn named(option: &CommandOption) -> Vec<String> {
    match option.name() {
        // Files of the guest, of the first start, or none at all.
        "append" | "pidfile" | "name" | "D" | "trace" | "incoming" => return Vec::new(),
        name if PLAIN_PATHS.contains(&name) => return vec![option.value().to_owned()],
        _ => {}
    }
    let is_file = |(key, value): &(String, String)| match value.starts_with('/') {
        // An object of QEMU's own, by its place in the tree of them.
        true => !value.starts_with("/machine/") && !value.starts_with("/objects/"),
        false => {
            let last = key.rsplit('.').next().unwrap_or_default();
            matches!(last, "file" | "filename") && !value.is_empty() && !value.contains(':')
        }
    };
    let leaves = Spec::parse(option.value()).leaves().into_iter();
    // A JSON `file` can be the name of another node.
    let is_node = option.value().starts_with('{') || option.name() == "blockdev";
    leaves
        .filter(is_file)
        .filter(|(_, value)| !is_node || value.starts_with('/'))
        .map(|(_, value)| value)
        .collect()
}

/// The accelerators that a command line names.
fn accelerators(line: &CommandLine) -> Vec<String> {
    let mut found = Vec::new();
    for option in line.options() {
        let params = Params::parse(option.value());
        match option.name() {
            "enable-kvm" => found.push("kvm".into()),
            "accel" => found.extend(params.get("accel").or(params.implied()).map(str::to_owned)),
            // The last one that names any counts.
            "machine" | "M" => {
                if let Some(list) = params.get("accel") {
                    found = list.split(':').map(str::to_owned).collect();
                }
            }
            _ => {}
        }
    }
    found
}

fn cpu(line: &CommandLine) -> Option<String> {
    let option = line.options().filter(|option| option.name() == "cpu").last()?;
    Params::parse(option.value()).implied().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// The network interface that an option names.
fn interface(option: &CommandOption) -> Option<InterfaceNeed> {
    if !["netdev", "nic", "net"].contains(&option.name()) {
        return None;
    }
    let spec = Spec::parse(option.value());
    let (name, is_made) = match spec.get_or_implied("type")? {
        "bridge" => (spec.get("br").unwrap_or(DEFAULT_BRIDGE), false),
        // Its helper makes the tap and connects it to the bridge.
        "tap" if spec.get("br").is_some() => (spec.get("br")?, false),
        "tap" => (spec.get("ifname").filter(|name| !name.contains('%'))?, true),
        "af-xdp" => (spec.get("ifname")?, false),
        _ => return None,
    };
    let (option, id) = (option.to_string(), netdev_id(option));
    Some(InterfaceNeed { option, name: name.to_owned(), id, is_made })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{Disk, DiskFile};

    fn of(args: &[&str]) -> Needs {
        let argv = ["/no/qemu"].iter().chain(args).map(|arg| arg.to_string()).collect();
        let chain = vec![DiskFile { path: "/vm/disk.qcow2".into(), ..DiskFile::default() }];
        let disk = Disk { role: DiskRole::Captured, chain, ..Disk::default() };
        let (binary, cwd) = ("/no/qemu".into(), "/vm".into());
        let machine = Machine { binary, cwd, argv, disks: vec![disk], ..Machine::default() };
        let paths = vec![("/vm".to_owned(), "/there".to_owned())];
        needs(&machine, &RewriteOptions { paths, ..RewriteOptions::default() }).unwrap()
    }

    #[test]
    fn files_are_told_apart_from_what_qemu_makes() {
        let needs = of(&[
            "-kernel",
            "vmlinuz",
            "-append",
            "root=/dev/vda",
            "-drive",
            "file=/vm/disk.qcow2,if=virtio",
            "-drive",
            "file=cd.iso,media=cdrom",
            "-blockdev",
            r#"{"driver":"raw","file":"node","filename":"/iso/a.iso"}"#,
            "-chardev",
            "socket,id=c,path=/run/vm/c,server=on,wait=off",
            "-serial",
            "file:/var/log/vm/serial",
            "-qmp",
            "unix:/vm/qmp,server=on",
            "-drive",
            "file=nbd:localhost:10809,if=none",
        ]);
        let paths = |needs: &[FileNeed]| -> Vec<String> {
            needs.iter().map(|need| need.path.display().to_string()).collect()
        };
        assert_eq!(
            paths(&needs.files),
            ["/there", "/there/vmlinuz", "/there/cd.iso", "/iso/a.iso"]
        );
        assert_eq!(paths(&needs.directories), ["/run/vm", "/var/log/vm", "/there"]);
    }

    #[test]
    fn what_runs_the_guest_is_found_in_every_spelling() {
        assert_eq!(of(&[]).accelerators, [""; 0]);
        assert_eq!(of(&["-enable-kvm"]).accelerators, ["kvm"]);
        assert_eq!(of(&["-machine", "q35,accel=kvm:tcg"]).accelerators, ["kvm", "tcg"]);
        assert_eq!(
            of(&["-accel", "tcg,thread=multi", "-accel", "kvm"]).accelerators,
            ["tcg", "kvm"]
        );
        assert_eq!(of(&["-cpu", "host,+vmx"]).cpu.as_deref(), Some("host"));
        assert_eq!(of(&["-m", "1G"]).cpu, None);
    }

    #[test]
    fn interfaces_of_the_host_are_found() {
        let of = |value: &str| {
            let found = of(&["-netdev", value]).interfaces.pop();
            found.map(|need| (need.name, need.is_made))
        };
        assert_eq!(of("bridge,id=n"), Some(("br0".into(), false)));
        assert_eq!(of("tap,id=n,ifname=tap7,script=no"), Some(("tap7".into(), true)));
        assert_eq!(of("tap,id=n,br=lan,helper=/h"), Some(("lan".into(), false)));
        assert_eq!(of("user,id=n"), None);
        assert_eq!(of("tap,id=n"), None);
        assert_eq!(of(r#"{"type":"bridge","id":"n","br":"lan"}"#), Some(("lan".into(), false)));
    }
}
