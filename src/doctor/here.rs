//! Whether this host can run the guest of a snapshot: its QEMU, its processor, its memory, and what
//! the guest's command line names.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::unistd::{AccessFlags, access, geteuid};
use serde_json::{Value, json};

use super::host::{kvm, lacking};
use super::qemu::{LIMIT, answers, version};
use super::{Item, State};
use crate::cancel::Cancellation;
use crate::guest::{FarDisks, FileNeed, InterfaceNeed, Needs, RewriteOptions, needs, rewrite};
use crate::host::procfs::MemInfo;
use crate::host::program::answer;
use crate::host::rights::userfaultfd_lack;
use crate::image::Image;
use crate::libvirt::Definition;
use crate::machine::{Machine, QemuVersion};
use crate::revert::{RevertError, RevertOptions};

/// Where the kernel lists network interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Looks whether this host can run the guest that these options would bring back: its QEMU with the
/// machine type and the processor's model, memory, rights, and the files and networks that its command
/// line names. An item that is [`Missing`](State::Missing) keeps it from running. Nothing is changed,
/// and no guest is started. Blocks.
///
/// # Errors
/// When the image can't be opened, or the profile that came with a snapshot can't be used.
pub fn check_here(options: &RevertOptions) -> Result<Vec<Item>, RevertError> {
    let mut rewrite = options.rewrite.clone();
    let image = match &options.far {
        None => Image::open(&options.image)?,
        Some(far) => {
            rewrite.add_profile(far.profile())?;
            // They would be served: from where does not matter here.
            let names = far.disks().iter().map(|disk| (disk.path.clone(), disk.export.clone()));
            let (socket, names) = (PathBuf::from("/"), names.collect());
            rewrite.overlays.far = Some(FarDisks { socket, names });
            Arc::clone(far.image())
        }
    };
    let manifest = image.manifest();
    let memory = manifest.blocks.iter().map(|block| block.len).sum();
    Ok(suits(&manifest.machine, memory, &rewrite))
}

/// Looks at everything that a guest with so many bytes of memory takes, changed by these options. What
/// is missing keeps it from running, what is degraded need not. Nothing is started but QEMU without a
/// machine. Blocks.
fn suits(machine: &Machine, memory: u64, options: &RewriteOptions) -> Vec<Item> {
    let needs = match needs(machine, options) {
        Ok(needs) => needs,
        Err(error) => return vec![Item::new("command line", State::Missing, error.to_string())],
    };
    let qemu = ask(&needs);
    let mut items = vec![program(&needs, &qemu, machine)];
    if let Ok(qemu) = &qemu {
        items.push(machine_type(qemu, &machine.machine_type));
        items.extend(needs.cpu.as_deref().map(|model| processor(qemu, model)));
    }
    items.push(accelerator(&needs));
    items.push(room(memory, MemInfo::read().ok()));
    items.push(rights(qemu.as_ref().ok()));
    if let Some(xml) = &machine.libvirt_xml {
        // Of its command line, everything that is not the machine is libvirt's to make anew.
        items.extend(domain(xml, Path::new(INTERFACES)));
        return items;
    }
    items.extend(files(&needs));
    items.extend(needs.interfaces.iter().map(|need| interface(need, Path::new(INTERFACES))));
    // Who takes ports, sockets, files and disks is known once it is to be started.
    items.push(match rewrite(machine, options) {
        Ok(_) => Item::new("start", State::Ok, "nothing that it takes is in use or has changed"),
        Err(error) => Item::new("start", State::Missing, error.to_string()),
    });
    items
}

/// What a QEMU knows.
struct Known {
    version: QemuVersion,
    /// Machine types, with their other names.
    machines: Vec<String>,
    /// Models of processors, each with what this host lacks for it.
    cpus: Vec<(String, Vec<String>)>,
}

/// Starts QEMU without a machine and asks it.
fn ask(needs: &Needs) -> Result<Known, String> {
    let mut command = Command::new(&needs.binary);
    command.envs(needs.env.iter().map(|(name, value)| (name, value)));
    let accelerators = match needs.accelerators.is_empty() {
        true => "tcg:qtest:kvm".to_owned(),
        // What the host lacks for a processor depends on it. It is told which QEMU can't have itself.
        false => format!("{}:tcg:qtest", needs.accelerators.join(":")),
    };
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]);
    command.arg("-machine").arg(format!("none,accel={accelerators}"));
    let questions =
        ["qmp_capabilities", "query-version", "query-machines", "query-cpu-definitions"];
    let questions = questions.iter().chain(&["quit"]);
    let questions: String =
        questions.map(|name| format!("{}\n", json!({ "execute": name, "id": name }))).collect();
    let said = answer(command, questions.into(), LIMIT, &Cancellation::new())
        .map_err(|error| error.to_string())?;
    known(&String::from_utf8_lossy(&said.stdout)).ok_or_else(|| {
        let words = String::from_utf8_lossy(&said.stderr);
        format!("does not answer: {}", words.lines().last().unwrap_or("it says nothing"))
    })
}

fn known(said: &str) -> Option<Known> {
    let answers = answers(said);
    let list = |id: &str| answers.get(id).and_then(Value::as_array).cloned().unwrap_or_default();
    let text = |entry: &Value, key: &str| entry[key].as_str().map(str::to_owned);
    let machines = list("query-machines");
    let names = |entry: &Value| [text(entry, "name"), text(entry, "alias")];
    let cpu = |entry: &Value| {
        let lacks = entry["unavailable-features"].as_array().cloned().unwrap_or_default();
        let lacks = lacks.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        Some((text(entry, "name")?, lacks))
    };
    Some(Known {
        version: version(answers.get("query-version")?)?,
        machines: machines.iter().flat_map(names).flatten().collect(),
        cpus: list("query-cpu-definitions").iter().filter_map(cpu).collect(),
    })
}

fn program(needs: &Needs, qemu: &Result<Known, String>, machine: &Machine) -> Item {
    let (binary, saved) = (needs.binary.display(), &machine.qemu);
    let name = "qemu";
    match qemu {
        Err(problem) => {
            let says = format!(
                "{binary} {problem}: install QEMU {saved} or later there, or name another by \
                 `RewriteOptions::qemu`"
            );
            Item::new(name, State::Missing, says)
        }
        Ok(Known { version, .. }) => {
            let order = (version.major, version.minor).cmp(&(saved.major, saved.minor));
            let (state, says) = match order {
                std::cmp::Ordering::Less => {
                    let says = "older than the one that it was saved by, whose state it may not \
                                understand: a drill would show it";
                    (State::Degraded, says)
                }
                std::cmp::Ordering::Equal => (State::Ok, "as it was saved by"),
                std::cmp::Ordering::Greater => {
                    (State::Ok, "later than the one that it was saved by")
                }
            };
            Item::new(name, state, format!("{binary}, {version} (saved by {saved}): {says}"))
        }
    }
}

fn machine_type(qemu: &Known, machine_type: &str) -> Item {
    let name = "machine type";
    match qemu.machines.iter().any(|known| known == machine_type) || machine_type.is_empty() {
        true => Item::new(name, State::Ok, machine_type),
        false => {
            let version = &qemu.version;
            let says = format!(
                "QEMU {version} has no {machine_type}: take one that lists it with `-machine help`, \
                 by `RewriteOptions::qemu`"
            );
            Item::new(name, State::Missing, says)
        }
    }
}

fn processor(qemu: &Known, model: &str) -> Item {
    let name = "processor";
    let Some((_, lacks)) = qemu.cpus.iter().find(|(known, _)| known == model) else {
        let says = format!("QEMU {} knows no model {model} (`-cpu help` lists them)", qemu.version);
        return Item::new(name, State::Missing, says);
    };
    match lacks.as_slice() {
        [] if matches!(model, "host" | "max") => {
            let says = format!(
                "{model}: the guest saw the other host's processor, and expects all of its features \
                 here"
            );
            Item::new(name, State::Degraded, says)
        }
        [] => Item::new(name, State::Ok, model),
        lacks => {
            let says = format!("this host lacks of {model}: {}", lacks.join(", "));
            Item::new(name, State::Missing, says)
        }
    }
}

fn accelerator(needs: &Needs) -> Item {
    let name = "accelerator";
    match needs.accelerators.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => Item::new(name, State::Ok, "none is named"),
        // What QEMU tries next is another one than the guest may have had.
        ["kvm", others @ ..] => {
            let item = Item { name: name.into(), ..kvm() };
            match (item.state, others.is_empty()) {
                (State::Ok, _) => item,
                (_, true) => Item { state: State::Missing, ..item },
                (_, false) => Item { state: State::Degraded, ..item },
            }
        }
        [first, ..] => Item::new(name, State::Ok, *first),
    }
}

fn room(memory: u64, host: Option<MemInfo>) -> Item {
    let name = "memory";
    let wants = format!("the guest has {} MiB", memory >> 20);
    let Some(MemInfo { total, available, .. }) = host else {
        return Item::new(name, State::Degraded, format!("{wants}; /proc/meminfo can't be read"));
    };
    let has = format!("{} MiB of {} are available here", available >> 20, total >> 20);
    match (memory > total, memory > available) {
        (true, _) => Item::new(name, State::Missing, format!("{wants}, and {has}: too few")),
        (_, true) => {
            let says =
                format!("{wants}, and {has}: end something else before it needs all of its own");
            Item::new(name, State::Degraded, says)
        }
        _ => Item::new(name, State::Ok, format!("{wants}, and {has}")),
    }
}

fn rights(qemu: Option<&Known>) -> Item {
    let name = "userfaultfd";
    let by_device = qemu.is_some_and(|qemu| qemu.version.uses_userfaultfd_device());
    match userfaultfd_lack(geteuid().as_raw(), by_device) {
        None => Item::new(name, State::Ok, "the guest runs before its memory is there"),
        Some(lack) => {
            lacking(name, State::Degraded, lack, "all memory comes before the guest runs")
        }
    }
}

/// The files that are not there; one item where all are.
fn files(needs: &Needs) -> Vec<Item> {
    let name = "files";
    let missing = |need: &&FileNeed| !need.path.exists();
    let files = needs.files.iter().filter(missing).map(|need| {
        let FileNeed { option, path } = need;
        let path = path.display();
        format!("{option}: {path} is not here: copy it, or say by `RewriteOptions::paths` {path}=NEW where it is")
    });
    let no_place = |need: &&FileNeed| access(&need.path, AccessFlags::W_OK).is_err();
    let directories = needs.directories.iter().filter(no_place).map(|need| {
        let FileNeed { option, path } = need;
        let problem = if path.exists() { "can't be written" } else { "is not here" };
        let path = path.display();
        format!(
            "{option}: the directory {path} {problem}: make it, or say by `RewriteOptions::paths` {path}=NEW \
             which to take"
        )
    });
    let items: Vec<Item> =
        files.chain(directories).map(|says| Item::new(name, State::Missing, says)).collect();
    match items.is_empty() {
        true => {
            let count = needs.files.len() + needs.directories.len();
            let says =
                format!("all {count} files and directories that its command line names are here");
            vec![Item::new(name, State::Ok, says)]
        }
        false => items,
    }
}

/// Whether an interface is there, by the directory that lists them.
fn interface(need: &InterfaceNeed, interfaces: &Path) -> Item {
    let InterfaceNeed { option, name: interface, id, is_made } = need;
    let name = "network";
    let place: PathBuf = interfaces.join(interface);
    if place.exists() {
        return Item::new(name, State::Ok, format!("{interface} is here ({option})"));
    }
    let id = id.as_deref().unwrap_or("ID");
    let instead =
        format!("make it, or give the card another network by `RewriteOptions::netdevs` {id}=SPEC");
    match *is_made && geteuid().is_root() {
        true => {
            let says = format!(
                "{option}: QEMU makes {interface}; whatever it was connected to is for you"
            );
            Item::new(name, State::Degraded, says)
        }
        false => {
            let says = format!("{option}: there is no interface {interface} here: {instead}");
            Item::new(name, State::Missing, says)
        }
    }
}

/// What a domain of libvirt's takes, by its definition.
fn domain(xml: &str, interfaces: &Path) -> Vec<Item> {
    let definition = match Definition::parse(xml) {
        Ok(definition) => definition,
        Err(error) => return vec![Item::new("domain", State::Missing, error.to_string())],
    };
    let name = definition.name();
    let says = format!(
        "a domain of libvirt's, {name}: revert its image with `RevertOptions::domain` {name}; libvirt \
         tells which files are missing"
    );
    let mut items = vec![match cfg!(feature = "libvirt") {
        true => Item::new("domain", State::Ok, says),
        false => {
            let says = format!("{says}; this snapback was built without libvirt");
            Item::new("domain", State::Missing, says)
        }
    }];
    for (kind, name) in definition.networks() {
        items.push(match kind.as_str() {
            "network" => {
                let says = format!("libvirt's network {name} has to be active here");
                let remedy = format!("virsh net-start {name}");
                Item::new("network", State::Degraded, says).remedied(remedy)
            }
            _ if interfaces.join(&name).exists() => {
                Item::new("network", State::Ok, format!("{name} is here"))
            }
            _ => {
                let says = format!("there is no interface {name} here: make it");
                Item::new("network", State::Missing, says)
            }
        });
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(args: &[&str]) -> Machine {
        let binary = "/usr/bin/qemu-system-x86_64";
        let argv = [binary].iter().chain(args).map(|arg| arg.to_string()).collect();
        Machine {
            binary: binary.into(),
            argv,
            cwd: "/".into(),
            machine_type: "pc-i440fx-7.2".into(),
            qemu: QemuVersion { major: 7, minor: 2, ..QemuVersion::default() },
            ..Machine::default()
        }
    }

    fn missing(machine: &Machine, memory: u64) -> Vec<String> {
        let items = suits(machine, memory, &RewriteOptions::default());
        let missing = items.into_iter().filter(|item| item.state == State::Missing);
        missing.map(|item| format!("{}: {}", item.name, item.says)).collect()
    }

    #[test]
    fn a_guest_of_this_host_can_run_here() {
        assert_eq!(missing(&machine(&["-cpu", "qemu64", "-accel", "tcg"]), 1 << 20), [""; 0]);
    }

    #[test]
    fn each_thing_that_is_missing_is_said_with_what_to_do() {
        let found = missing(
            &Machine {
                machine_type: "pc-i440fx-99.9".into(),
                ..machine(&[
                    "-cpu",
                    "none-such",
                    "-kernel",
                    "/no/vmlinuz",
                    "-chardev",
                    "socket,id=c,path=/no/run/c,server=on,wait=off",
                    "-netdev",
                    "bridge,id=lan,br=no-such-br",
                ])
            },
            1 << 60,
        );
        let expected = [
            ("machine type", "pc-i440fx-99.9"),
            ("processor", "none-such"),
            ("memory", "too few"),
            ("files", "/no/vmlinuz=NEW"),
            ("files", "the directory /no/run is not here"),
            ("network", "netdevs` lan=SPEC"),
        ];
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, (name, says)) in found.iter().zip(expected) {
            assert!(found.starts_with(name) && found.contains(says), "{found}");
        }
    }

    #[test]
    fn without_its_qemu_it_can_not_run() {
        let found = missing(&Machine { binary: "/no/qemu".into(), ..machine(&[]) }, 0);
        assert!(found[0].starts_with("qemu: /no/qemu can't be run"), "{found:?}");
    }

    #[test]
    fn a_domains_networks_are_those_of_its_definition() {
        let xml = "<domain><name>web</name><devices>\
                   <interface type='network'><source network='default' bridge='virbr0'/></interface>\
                   <interface type='bridge'><source bridge='no-such-br'/></interface>\
                   <interface type='user'/></devices></domain>";
        let items = domain(xml, Path::new(INTERFACES));
        let found: Vec<(&str, State)> =
            items[1..].iter().map(|item| (item.says.as_str(), item.state)).collect();
        assert_eq!(
            found,
            [
                ("libvirt's network default has to be active here", State::Degraded),
                ("there is no interface no-such-br here: make it", State::Missing),
            ]
        );
        assert_eq!(domain("<x/>", Path::new("/"))[0].state, State::Missing);
    }

    #[test]
    fn a_host_without_kvm_runs_no_guest_of_kvm_alone() {
        let needs = |list: &[&str]| {
            let options = RewriteOptions::default();
            let mut needs = needs(&machine(&[]), &options).unwrap();
            needs.accelerators = list.iter().map(|name| name.to_string()).collect();
            needs
        };
        assert_eq!(accelerator(&needs(&["tcg", "kvm"])).state, State::Ok);
        let of_kvm = kvm().state;
        let alone = accelerator(&needs(&["kvm"])).state;
        assert_eq!(alone == State::Ok, of_kvm == State::Ok);
        assert_ne!(alone, State::Degraded);
        assert_ne!(accelerator(&needs(&["kvm", "tcg"])).state, State::Missing);
    }
}
