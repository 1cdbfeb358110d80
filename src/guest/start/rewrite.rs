//! A recorded command line turned into that of a guest to be reverted.
//!
//! The devices that the guest sees stay exactly as they were. What belongs to QEMU's first
//! start, its terminal or its memory is removed. Each rule is one function that gives the
//! reason.

use std::path::{Path, PathBuf};

use crate::guest::GuestError;
use crate::guest::command_line::backend::{self, Use};
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::disks::captured::absolute;
use crate::guest::disks::overlay::{Overlay, OverlayOptions};
use crate::guest::disks::{captured, drives};
use crate::guest::start::isolation::isolate;
use crate::guest::start::mapping::MappedMemory;
use crate::guest::start::plan::{CONTROL_ID, Note, StartPlan};
use crate::guest::start::ports::NewPort;
use crate::guest::start::reach::Reach;
use crate::guest::start::{collisions, identity, logs, netdevs, network, own, paths, ports};
use crate::machine::Machine;

/// How a guest is started differently from its record.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RewriteOptions {
    /// Another QEMU binary than the recorded one; the recorded environment, which
    /// belongs to the recorded binary, is then left out.
    pub qemu: Option<PathBuf>,
    /// Path of a control socket to create for the caller.
    pub qmp: Option<PathBuf>,
    /// `(OLD, NEW)`: `NEW` replaces the path `OLD` in the recorded command line, alone or at the
    /// beginning of a longer path.
    pub paths: Vec<(String, String)>,
    /// Ports of this host that other ones replace, wherever the recorded command line has QEMU
    /// bind the old one: host forwards, sockets of character backends and networks that listen,
    /// the gdb stub, VNC (display `:N` is port 5900 + N) and Spice. TCP and UDP are not told
    /// apart.
    pub ports: Vec<(u16, NewPort)>,
    /// `(ID, SPEC)`: `SPEC`, as QEMU's `-netdev` takes it, is the backend of the network card
    /// whose recorded backend has this id.
    pub netdevs: Vec<(String, String)>,
    /// Whether QEMU truncates the log files of serial ports and other character backends, as it
    /// does unless told otherwise. A revert appends to them by default.
    pub truncate_logs: bool,
    /// Arguments to append. The same rules apply to them.
    pub extra: Vec<String>,
    /// Whether the guest stays paused after the revert (`-S`).
    pub paused: bool,
    /// Whether the guest is cut off from networks, disks, files and sockets.
    pub isolated: bool,
    /// Where the overlays of captured disks are created.
    pub overlays: OverlayOptions,
    /// `(NAME, FILE)`: `FILE` is a copy of the frozen file of the disk `NAME`.
    pub disks: Vec<(String, PathBuf)>,
    /// A directory of the guest's own, made if it isn't there: the sockets and output files of the
    /// recorded command line go there unless `paths` has a rule for them, the overlays of its
    /// disks unless [`OverlayOptions::directory`] says otherwise, and each recorded port without a
    /// rule in `ports` is replaced by a free one. So any number of guests run side by side.
    pub own: Option<PathBuf>,
    /// Whether the guest gets a new generation ID (device `vmgenid`), which tells it that it is one
    /// of several now. It must have been saved with such a device.
    pub new_generation: bool,
    /// Blocks of memory that QEMU is to map from a file.
    pub mapped: Option<MappedMemory>,
}

impl RewriteOptions {
    /// Whether the guest stays paused until its user resumes it: by [`paused`], or by `-S` in
    /// [`extra`].
    ///
    /// [`paused`]: RewriteOptions::paused
    /// [`extra`]: RewriteOptions::extra
    pub fn stays_paused(&self) -> bool {
        self.paused || CommandLine::parse(&self.extra).has("S")
    }
}

/// Turns the record of a machine into a plan to start it, waiting for its state
/// (`-incoming defer`). Reads what this host has in use, changes nothing.
///
/// # Errors
/// When a recorded option can't work a second time, or would take a socket or file from a
/// running process; the error names the option and the remedy.
pub fn rewrite(machine: &Machine, options: &RewriteOptions) -> Result<StartPlan, GuestError> {
    let (program, recorded) = machine.argv.split_first().ok_or(GuestError::EmptyCommandLine)?;
    let own = options.own.as_deref().map(|path| absolute("own directory", path)).transpose()?;
    let moves = match &own {
        Some(own) => own::path_rules(machine, &options.paths, own)?,
        None => options.paths.clone(),
    };
    let rules = paths::rules(&moves)?;
    let mut notes = Vec::new();

    let mut line = CommandLine::parse(recorded);
    drop_own_options(&mut line);
    let disks = captured_disks(machine, options, &line, &rules)?;
    paths::replace_in_line(&mut line, &rules);
    netdevs::replace_in_line(&mut line, &options.netdevs, &mut notes)?;
    let ports = match &own {
        Some(_) => own::port_rules(&line, &options.ports),
        None => options.ports.clone(),
    };
    let ports = ports::replace_in_line(&mut line, &ports, &mut notes)?;
    if options.new_generation {
        identity::renew_generation(&mut line, &mut notes)?;
    }
    pin_machine_type(&mut line, &machine.machine_type);
    line.args.extend(CommandLine::parse(&options.extra).args);

    let cwd = PathBuf::from(paths::replace(&machine.cwd, &rules));
    let qmp = options.qmp.as_deref().map(|path| absolute("control socket", path)).transpose()?;
    let paused = options.stays_paused();

    drop_own_options(&mut line);
    refuse_inherited_descriptors(&line)?;
    drives::put(&mut line, &disks)?;
    drop_start_options(&mut line, &mut notes);
    take_no_memory_ahead(&mut line, &mut notes);
    leave_the_terminal(&mut line, &mut notes);
    wait_for_nobody(&mut line);
    if options.isolated {
        isolate(&mut line, &machine.uncaptured_disks)?;
    }
    let mapped = match &options.mapped {
        Some(memory) => memory.put(&mut line)?,
        None => Vec::new(),
    };
    collisions::resolve(&mut line, &cwd, qmp.as_deref(), &mut notes)?;
    network::refuse_in_use(&line)?;
    if !options.truncate_logs {
        logs::append(&mut line, &mut notes);
    }

    if let Some(path) = &qmp {
        line.push(control_socket(path)?);
    }
    if paused {
        line.push(CommandOption::flag("S"));
    }
    line.push(CommandOption::new("incoming", "defer"));

    let sockets = collisions::sockets(&line, &cwd);
    let reach = Reach::new(&line, &cwd, ports.ports);
    let (binary, env) = program_and_environment(machine, options, &rules)?;
    let program = options.qemu.as_ref().map_or(program.clone(), |_| binary.display().to_string());
    let mut argv = vec![program];
    argv.extend(line.into_args());
    Ok(StartPlan {
        binary,
        argv,
        cwd,
        env,
        sockets,
        paused,
        reach,
        reserved: ports.reserved,
        own,
        notes,
        mapped,
        overlays: disks.into_iter().map(|(_, overlay)| overlay).collect(),
        label: String::new(),
        inherit: Vec::new(),
    })
}

/// The overlays of captured disks, each with the disk's position on the recorded command line.
/// Their frozen files are located and checked.
fn captured_disks(
    machine: &Machine,
    options: &RewriteOptions,
    line: &CommandLine,
    rules: &[(&str, &str)],
) -> Result<Vec<(usize, Overlay)>, GuestError> {
    let moved = |path: &str| paths::replace(path, rules);
    let overlays = captured::overlays(&machine.disks, &options.disks, &options.overlays, moved)?;
    let disks = overlays.iter().map(|(at, _)| &machine.disks[*at]);
    let places = drives::find_each(line, disks, Path::new(&machine.cwd))?;
    Ok(places.into_iter().zip(overlays.into_iter().map(|(_, overlay)| overlay)).collect())
}

/// The recorded environment names the modules of the recorded binary, which another binary
/// must not load: it is used with the recorded binary only.
pub(super) fn program_and_environment(
    machine: &Machine,
    options: &RewriteOptions,
    rules: &[(&str, &str)],
) -> Result<(PathBuf, Vec<(String, String)>), GuestError> {
    match &options.qemu {
        // A bare name is for PATH to find.
        Some(binary) if binary.components().count() == 1 && !binary.is_absolute() => {
            Ok((binary.clone(), Vec::new()))
        }
        Some(binary) => Ok((absolute("QEMU binary", binary)?, Vec::new())),
        None => {
            let replaced =
                |(name, value): &(String, String)| (name.clone(), paths::replace(value, rules));
            let env = machine.env.iter().map(replaced).collect();
            Ok((PathBuf::from(paths::replace(&machine.binary, rules)), env))
        }
    }
}

/// The option for the control socket that the caller requested.
fn control_socket(path: &Path) -> Result<CommandOption, GuestError> {
    let text = path.to_str().ok_or_else(|| GuestError::Path {
        what: "control socket",
        path: path.to_owned(),
        problem: "it is not UTF-8".to_owned(),
    })?;
    let escaped = text.replace(',', ",,");
    Ok(CommandOption::new("qmp", format!("unix:{escaped},server=on,wait=off")))
}

/// Aliases such as `pc`, and a missing `-machine`, mean another machine in each version of
/// QEMU: they are replaced by the recorded type.
fn pin_machine_type(line: &mut CommandLine, machine_type: &str) {
    if machine_type.is_empty() {
        return;
    }
    let mut pinned = false;
    for option in line.options_mut().filter(|o| ["machine", "M"].contains(&o.name())) {
        let mut params = Params::parse(option.value());
        if params.get("type").is_some() {
            params.set("type", machine_type);
        } else if params.implied().is_some_and(|name| !name.is_empty()) {
            params.items_mut()[0] = machine_type.to_owned();
        } else {
            continue;
        }
        option.value = Some(params.to_string());
        pinned = true;
    }
    if !pinned {
        line.push(CommandOption::new("machine", format!("type={machine_type}")));
    }
}

/// A guest that was reverted before has snapback's control socket of that time on its command
/// line, by a descriptor that no longer exists.
pub(super) fn drop_own_options(line: &mut CommandLine) {
    line.retain_options(|option| {
        backend::chardev_id(option).as_deref() != Some(CONTROL_ID)
            && backend::monitors_chardev(option).as_deref() != Some(CONTROL_ID)
    });
}

/// Options that matter to the first start only: the source of its state, going to the
/// background, the file for its process id.
fn drop_start_options(line: &mut CommandLine, notes: &mut Vec<Note>) {
    line.retain_options(|option| {
        let why = match option.name() {
            "incoming" | "S" => return false,
            "daemonize" => "snapback supervises the reverted guest's process",
            "pidfile" => "it may belong to another running process",
            "loadvm" => "the state comes from the image",
            "preconfig" => "the machine would wait for further configuration",
            _ => return true,
        };
        notes.push(Note::new(format!("left out {option}"), why));
        false
    });
}

/// Refuses options that use a descriptor which QEMU inherited: it doesn't exist any more.
fn refuse_inherited_descriptors(line: &CommandLine) -> Result<(), GuestError> {
    const MAY_PASS: &[&str] = &[
        "blockdev", "chardev", "device", "drive", "fsdev", "net", "netdev", "nic", "object",
        "virtfs",
    ];
    const KEYS: &[&str] = &["fd", "fds", "vhostfd", "vhostfds", "sock_fd"];
    let passes = |(key, value): &(String, String)| {
        let last = key.rsplit('.').next().unwrap_or_default();
        KEYS.contains(&last) || (last == "type" && value == "fd")
    };
    let refused = line.options().find(|option| match option.name() {
        "append" => false,
        "add-fd" => true,
        _ if option.value().contains("/dev/fdset/") => true,
        name if MAY_PASS.contains(&name) => Spec::parse(option.value()).leaves().iter().any(passes),
        _ => false,
    });
    match refused {
        Some(option) => {
            let remedy = match netdevs::netdev_id(option) {
                Some(id) => format!(
                    "give the card another backend with `RewriteOptions::netdevs` {id}=SPEC, or "
                ),
                None => String::new(),
            };
            Err(GuestError::InheritedDescriptor { option: option.to_string(), remedy })
        }
        None => Ok(()),
    }
}

/// A revert begins without any memory: allocating and locking it first would take longer than
/// the rest of the revert.
fn take_no_memory_ahead(line: &mut CommandLine, notes: &mut Vec<Note>) {
    const WHY: &str = "a reverted guest gets its memory while it runs";
    line.retain_options(|option| {
        let keep = option.name() != "mem-prealloc";
        if !keep {
            notes.push(Note::new(format!("left out {option}"), WHY));
        }
        keep
    });
    for option in line.options_mut() {
        let key = match option.name() {
            "object" => "prealloc",
            "overcommit" => "mem-lock",
            _ => continue,
        };
        let mut spec = Spec::parse(option.value());
        if spec.flag(key) == Some(true) {
            notes.push(Note::new(format!("turned off {key} in {option}"), WHY));
            spec.set_flag(key, false);
            option.value = Some(spec.to_string());
        }
    }
}

/// The terminal belonged to the first start. Guest devices get a null backend; monitors and
/// the gdb stub, which the guest doesn't see, are removed.
fn leave_the_terminal(line: &mut CommandLine, notes: &mut Vec<Note>) {
    const WHY: &str = "the terminal belongs to the first start";
    replace_default_serial(line, notes);
    line.retain_options(|option| {
        let keep = !backend::is_stdio(option)
            || !matches!(backend::usage(option), Some(Use::Monitor | Use::Debugger));
        if !keep {
            notes.push(Note::new(format!("left out {option}"), WHY));
        }
        keep
    });
    for option in line.options_mut() {
        if backend::is_stdio(option) {
            notes.push(Note::new(format!("replaced {option} by a null backend"), WHY));
            backend::to_null(option);
        }
        if option.name() == "display" && Params::parse(option.value()).implied() == Some("curses") {
            notes.push(Note::new(format!("left out {option}"), WHY));
            option.value = Some("none".to_owned());
        }
    }
}

/// With `-nographic` QEMU gives the default serial port and the default monitor
/// to the terminal (`qemu_create_default_devices` in QEMU's vl.c). `-nographic`
/// itself stays, because the guest's firmware sees it. snapback's control socket already keeps
/// QEMU from creating a default monitor, and a default parallel port has a null backend.
fn replace_default_serial(line: &mut CommandLine, notes: &mut Vec<Note>) {
    let is_serial = |option: &CommandOption| {
        let spec = Spec::parse(option.value());
        match option.name() {
            "serial" | "nodefaults" => true,
            "device" => spec.get_or_implied("driver") == Some("isa-serial"),
            // QEMU takes any property given for a driver as a sign of it.
            "global" => {
                spec.get("driver") == Some("isa-serial")
                    || option.value().starts_with("isa-serial.")
            }
            _ => false,
        }
    };
    if line.has("nographic") && !line.options().any(is_serial) {
        notes.push(Note::new(
            "replaced the serial port of -nographic by a null backend",
            "the terminal belongs to the first start",
        ));
        line.push(CommandOption::new("serial", "null"));
    }
}

/// A listening socket that waits for a client (the default) would block QEMU's start.
/// Clients can connect later.
fn wait_for_nobody(line: &mut CommandLine) {
    line.options_mut()
        .filter(|option| backend::waits_for_client(option))
        .for_each(backend::without_waiting);
}
