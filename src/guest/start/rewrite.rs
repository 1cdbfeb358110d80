//! A recorded command line turned into that of a guest to be reverted.
//!
//! The devices that the guest sees stay exactly as they were; what tied QEMU to
//! its first start, its terminal or its memory goes. Each rule is one function
//! that says why it is there.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use super::collisions;
use crate::guest::VmError;
use crate::guest::command_line::backend::{self, Use};
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::guest::disks::overlay::{Overlay, OverlayOptions, Overlays};
use crate::guest::disks::{drives, frozen};
use crate::guest::start::isolation::isolate;
use crate::guest::start::mapping::MappedMemory;
use crate::machine::{DiskRole, Machine};

/// The id of the character backend that our own control socket hangs on.
pub(in crate::guest) const CONTROL_ID: &str = "snapback-control";

/// What the caller wants otherwise than recorded.
#[derive(Debug, Clone, Default)]
pub struct RewriteOptions {
    /// Another QEMU binary than the recorded one; the recorded environment, which
    /// belongs to the recorded binary, is then left out.
    pub qemu: Option<PathBuf>,
    /// Where a control socket of the caller's shall listen.
    pub qmp: Option<PathBuf>,
    /// `(OLD, NEW)`: where the path `OLD` stands in the recorded command line,
    /// itself or as the beginning of a longer path, `NEW` takes its place.
    pub paths: Vec<(String, String)>,
    /// Arguments to add at the end. They are subject to the same rules.
    pub extra: Vec<String>,
    /// Whether the guest shall not run until it is told to.
    pub paused: bool,
    /// Whether the guest is cut off from networks, disks, files and sockets.
    pub isolated: bool,
    /// Where the changes go that the guest makes to its captured disks.
    pub overlays: OverlayOptions,
    /// `(NAME, FILE)`: the frozen file of the disk that is called so is this copy.
    pub disks: Vec<(String, PathBuf)>,
    /// Blocks of memory that QEMU is to map from a file.
    pub mapped: Option<MappedMemory>,
}

impl RewriteOptions {
    /// Whether the guest shall not run until its user says so.
    pub fn stays_paused(&self) -> bool {
        self.paused || CommandLine::parse(&self.extra).has("S")
    }
}

/// Something that differs from the record, for the caller to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What was changed.
    pub what: String,
    /// Why.
    pub why: String,
}

impl Note {
    pub(in crate::guest) fn new(what: impl Into<String>, why: impl Into<String>) -> Note {
        Note { what: what.into(), why: why.into() }
    }
}

/// How to start QEMU.
#[derive(Debug)]
pub struct StartPlan {
    /// The program.
    pub binary: PathBuf,
    /// Its command line, `argv[0]` included, our control socket not.
    pub argv: Vec<String>,
    /// Its working folder.
    pub cwd: PathBuf,
    /// Variables to set on top of our own environment.
    pub env: Vec<(String, String)>,
    /// The control socket that the caller asked for, absolute.
    pub qmp: Option<PathBuf>,
    /// All Unix sockets on which QEMU will listen, absolute.
    pub sockets: Vec<PathBuf>,
    /// Whether the guest waits to be told to run.
    pub paused: bool,
    /// What differs from the record.
    pub notes: Vec<Note>,
    /// Names of the blocks that it maps from a file.
    pub mapped: Vec<String>,
    /// The overlays that starting it makes, one for each captured disk.
    pub overlays: Vec<Overlay>,
    /// Descriptors to pass on, under the numbers they have here.
    pub(in crate::guest) inherit: Vec<OwnedFd>,
}

impl StartPlan {
    /// Makes the overlays that the plan speaks of.
    pub(in crate::guest) fn make_overlays(&mut self) -> Result<Overlays, VmError> {
        let StartPlan { overlays, inherit, argv, .. } = self;
        Overlays::make(overlays, |fd, set| {
            argv.extend(["-add-fd".into(), format!("fd={},set={set}", fd.as_raw_fd())]);
            inherit.push(fd);
        })
    }

    /// Has QEMU inherit a descriptor. Gives its number there, as in
    /// `migrate-incoming fd:NUMBER`.
    pub fn inherit(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.inherit.push(fd);
        number
    }
}

/// Turns the record of a machine into a plan to start it, waiting for its state
/// (`-incoming defer`). Looks at what this host has in use, changes nothing.
///
/// # Errors
/// When a recorded option can't work a second time, or would take from a living
/// process what that uses; the error names the option and what to do.
pub fn rewrite(machine: &Machine, options: &RewriteOptions) -> Result<StartPlan, VmError> {
    let (program, recorded) = machine.argv.split_first().ok_or(VmError::EmptyCommandLine)?;
    let paths = path_rules(&options.paths)?;
    let mut notes = Vec::new();

    let mut line = CommandLine::parse(recorded);
    drop_own_options(&mut line);
    let disks = captured_disks(machine, options, &line, &paths)?;
    replace_paths(&mut line, &paths);
    pin_machine_type(&mut line, &machine.machine_type);
    line.args.extend(CommandLine::parse(&options.extra).args);

    let cwd = PathBuf::from(replace_path(&machine.cwd, &paths));
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

    if let Some(path) = &qmp {
        line.push(control_socket(path)?);
    }
    if paused {
        line.push(CommandOption::flag("S"));
    }
    line.push(CommandOption::new("incoming", "defer"));

    let sockets = collisions::sockets(&line, &cwd);
    let (binary, env) = program_and_environment(machine, options, &paths)?;
    let program = options.qemu.as_ref().map_or(program.clone(), |_| binary.display().to_string());
    let mut argv = vec![program];
    argv.extend(line.into_args());
    Ok(StartPlan {
        binary,
        argv,
        cwd,
        env,
        qmp,
        sockets,
        paused,
        notes,
        mapped,
        overlays: disks.into_iter().map(|(_, overlay)| overlay).collect(),
        inherit: Vec::new(),
    })
}

/// The captured disks' overlays, each with the disk's place on the recorded command line.
/// The frozen files are looked up and checked.
fn captured_disks(
    machine: &Machine,
    options: &RewriteOptions,
    line: &CommandLine,
    paths: &[(&str, &str)],
) -> Result<Vec<(usize, Overlay)>, VmError> {
    let moved = |path: &str| replace_path(path, paths);
    frozen::check_names(&machine.disks, &options.disks)?;
    let mut found: Vec<(usize, Overlay)> = Vec::new();
    for (at, disk) in machine.disks.iter().enumerate() {
        match disk.role {
            DiskRole::Captured => {
                let given = options.disks.iter().find(|(name, _)| disk.is_called(name));
                let given = given.map(|(_, path)| absolute("disk", path)).transpose()?;
                let chain = frozen::chain(disk, given.as_deref(), moved)?;
                let place = drives::find(line, disk, Path::new(&machine.cwd))?;
                if let Some((_, other)) = found.iter().find(|(taken, _)| *taken == place) {
                    let (disk, other) = (disk.describe(), other.disk.clone());
                    return Err(VmError::DisksGivenAsOne { disk, other });
                }
                found.push((place, Overlay::new(disk, at, chain, &options.overlays)?));
            }
            DiskRole::ReadOnly => frozen::check_read_only(disk, moved)?,
            DiskRole::Excluded | DiskRole::Empty => {}
        }
    }
    Ok(found)
}

/// The recorded environment tells the recorded binary where its modules are:
/// another binary must not load them.
fn program_and_environment(
    machine: &Machine,
    options: &RewriteOptions,
    paths: &[(&str, &str)],
) -> Result<(PathBuf, Vec<(String, String)>), VmError> {
    match &options.qemu {
        // A bare name is for PATH to find.
        Some(binary) if binary.components().count() == 1 && !binary.is_absolute() => {
            Ok((binary.clone(), Vec::new()))
        }
        Some(binary) => Ok((absolute("QEMU binary", binary)?, Vec::new())),
        None => {
            let replaced =
                |(name, value): &(String, String)| (name.clone(), replace_path(value, paths));
            let env = machine.env.iter().map(replaced).collect();
            Ok((PathBuf::from(replace_path(&machine.binary, paths)), env))
        }
    }
}

/// The caller's relative paths start from our working folder, not from QEMU's.
fn absolute(what: &'static str, path: &Path) -> Result<PathBuf, VmError> {
    std::path::absolute(path).map_err(|source| VmError::Path {
        what,
        path: path.to_owned(),
        problem: source.to_string(),
    })
}

/// The control socket that the caller asked for.
fn control_socket(path: &Path) -> Result<CommandOption, VmError> {
    let text = path.to_str().ok_or_else(|| VmError::Path {
        what: "control socket",
        path: path.to_owned(),
        problem: "it is not UTF-8".to_owned(),
    })?;
    let escaped = text.replace(',', ",,");
    Ok(CommandOption::new("qmp", format!("unix:{escaped},server=on,wait=off")))
}

/// The rules for paths, without closing slashes.
fn path_rules(rules: &[(String, String)]) -> Result<Vec<(&str, &str)>, VmError> {
    let rule =
        |(old, new): &'_ (String, String)| VmError::PathRule { old: old.clone(), new: new.clone() };
    rules
        .iter()
        .map(|pair| match (pair.0.trim_end_matches('/'), pair.1.trim_end_matches('/')) {
            ("", _) | (_, "") => Err(rule(pair)),
            trimmed => Ok(trimmed),
        })
        .collect()
}

/// Files may lie elsewhere on this host. The guest's own command line
/// (`-append`) speaks of the guest's files and stays.
fn replace_paths(line: &mut CommandLine, rules: &[(&str, &str)]) {
    for arg in &mut line.args {
        match arg {
            Arg::Image(path) => *path = replace_path(path, rules),
            Arg::Option(option) if option.name() == "append" => {}
            Arg::Option(option) => {
                let Some(value) = &option.value else { continue };
                let replaced = replace_in_value(option.name(), value, rules);
                option.value = Some(replaced);
            }
        }
    }
}

/// Options whose value is a path and nothing else: a comma needs no doubling.
const PLAIN_PATHS: &[&str] = &[
    "D",
    "L",
    "bios",
    "cdrom",
    "chroot",
    "dtb",
    "fda",
    "fdb",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "initrd",
    "kernel",
    "mem-path",
    "mtdblock",
    "pflash",
    "pidfile",
    "readconfig",
    "sd",
];

fn replace_in_value(name: &str, value: &str, rules: &[(&str, &str)]) -> String {
    if PLAIN_PATHS.contains(&name) {
        return replace_path(value, rules);
    }
    match Spec::parse(value) {
        Spec::Params(mut params) => {
            params.items_mut().iter_mut().for_each(|item| *item = replace_path(item, rules));
            params.to_string()
        }
        Spec::Json(json) => {
            let mut replaced = json.clone();
            replace_in_json(&mut replaced, rules);
            // Unchanged JSON keeps its spelling.
            if replaced == json { value.to_owned() } else { replaced.to_string() }
        }
    }
}

fn replace_in_json(value: &mut serde_json::Value, rules: &[(&str, &str)]) {
    use serde_json::Value;
    match value {
        Value::String(text) => *text = replace_path(text, rules),
        Value::Array(items) => items.iter_mut().for_each(|item| replace_in_json(item, rules)),
        Value::Object(members) => {
            members.values_mut().for_each(|member| replace_in_json(member, rules));
        }
        _ => {}
    }
}

/// Replaces each path in `text` that is, or lies below, a rule's old path. What
/// has been replaced is not looked at again, so two rules can swap two folders.
fn replace_path(text: &str, rules: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut before = None;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let starts = before.is_none_or(|c: char| !is_in_path(c));
        let rule = rules.iter().find(|(old, _)| {
            let after = rest.strip_prefix(old).map(|after| after.chars().next());
            starts && after.is_some_and(|next| next.is_none_or(|c| c == '/' || !is_in_name(c)))
        });
        let taken = match rule {
            Some((old, new)) => {
                out.push_str(new);
                old.len()
            }
            None => {
                out.push(c);
                c.len_utf8()
            }
        };
        before = rest[..taken].chars().next_back();
        rest = &rest[taken..];
    }
    out
}

/// Whether a character belongs to a path's part, rather than ending the path.
fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || "._-+~@%=".contains(c)
}

/// Whether a path that starts behind this character would be part of a longer one.
fn is_in_path(c: char) -> bool {
    c == '/' || (c != '=' && is_in_name(c))
}

/// `pc` and the like, and no `-machine` at all, mean another machine in every
/// version of QEMU: the recorded type is named instead.
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

/// A guest that was reverted before carries the control socket of that time,
/// over a descriptor that was ours.
fn drop_own_options(line: &mut CommandLine) {
    line.retain_options(|option| {
        backend::chardev_id(option).as_deref() != Some(CONTROL_ID)
            && backend::monitors_chardev(option).as_deref() != Some(CONTROL_ID)
    });
}

/// Options that belong to the first start alone: where its state came from, how
/// it went to the background, who was to find it there.
fn drop_start_options(line: &mut CommandLine, notes: &mut Vec<Note>) {
    line.retain_options(|option| {
        let why = match option.name() {
            "incoming" | "S" => return false,
            "daemonize" => "the reverted guest's process is looked after here",
            "pidfile" => "it may name another living process",
            "loadvm" => "the state comes from the image",
            "preconfig" => "nobody would configure the machine further",
            _ => return true,
        };
        notes.push(Note::new(format!("left out {option}"), why));
        false
    });
}

/// Descriptors which whoever started QEMU had passed on are not there for us.
fn refuse_inherited_descriptors(line: &CommandLine) -> Result<(), VmError> {
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
        Some(option) => Err(VmError::InheritedDescriptor { option: option.to_string() }),
        None => Ok(()),
    }
}

/// A revert begins with no memory at all; to fill and lock it ahead of that
/// would take longer than everything else.
fn take_no_memory_ahead(line: &mut CommandLine, notes: &mut Vec<Note>) {
    const WHY: &str = "a reverted guest takes its memory as it goes";
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

/// The terminal was the first start's. Guest devices keep a backend, one that
/// leads nowhere; monitors and the debugger's stub, which the guest doesn't see,
/// go.
fn leave_the_terminal(line: &mut CommandLine, notes: &mut Vec<Note>) {
    const WHY: &str = "the terminal is not the guest's any more";
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
            notes.push(Note::new(format!("led {option} nowhere"), WHY));
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
/// itself stays, because the guest's firmware sees it. Our own control socket
/// already keeps QEMU from making a default monitor; a default parallel port
/// leads nowhere by itself.
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
            "led the serial port of -nographic nowhere",
            "the terminal is not the guest's any more",
        ));
        line.push(CommandOption::new("serial", "null"));
    }
}

/// A listening socket that waits for its client (the default) would hold up
/// QEMU's start until somebody comes. Clients may come later.
fn wait_for_nobody(line: &mut CommandLine) {
    line.options_mut()
        .filter(|option| backend::waits_for_client(option))
        .for_each(backend::without_waiting);
}
