//! Collisions of a recorded command line with running processes: Unix sockets, files and shared
//! memory in use, often by the very guest that was recorded. Monitors are dropped; everything
//! else is refused, and the caller decides.

use std::path::{Path, PathBuf};

use crate::guest::GuestError;
use crate::guest::command_line::backend::{self, Use};
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::start::plan::Note;
use crate::host::in_use::{self, Address, Holder};
use crate::machine::Machine;

/// Resolves or refuses all collisions. `asked` is the control socket that the caller
/// requested, an absolute path.
pub(in crate::guest) fn resolve(
    line: &mut CommandLine,
    cwd: &Path,
    asked: Option<&Path>,
    notes: &mut Vec<Note>,
) -> Result<(), GuestError> {
    if let Some(path) = asked {
        check_asked_socket(path)?;
    }
    yield_control_sockets(line, cwd, asked, notes)?;
    refuse_sockets_in_use(line, cwd)?;
    refuse_files_in_use(line, cwd)
}

/// The path of the requested control socket must be free: QEMU unlinks whatever is there
/// before it binds, even another process's socket or a file.
fn check_asked_socket(path: &Path) -> Result<(), GuestError> {
    use std::os::unix::fs::FileTypeExt;
    let refuse = |problem: &str| {
        Err(GuestError::ControlSocket { path: path.to_owned(), problem: problem.to_owned() })
    };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return refuse("something else is there"),
        Ok(_) => {}
        Err(_) => return Ok(()),
    }
    let address = Address::Unix(path.to_string_lossy().into_owned());
    match in_use::is_listening(&address, Path::new("/"))? {
        true => refuse("a living process listens there"),
        false => Ok(()),
    }
}

/// Drops monitors whose socket is in use, or is the one that the caller requested: a monitor is
/// not part of the guest, and the caller has a control socket.
fn yield_control_sockets(
    line: &mut CommandLine,
    cwd: &Path,
    asked: Option<&Path>,
    notes: &mut Vec<Note>,
) -> Result<(), GuestError> {
    let mut gone = Vec::new();
    for option in line.options().filter(|option| is_control(line, option)) {
        let Some(address) = backend::listens_at(option) else { continue };
        let is_asked = match &address {
            Address::Unix(path) => asked.is_some_and(|asked| cwd.join(path) == asked),
            _ => false,
        };
        let why = match is_asked {
            true => "the requested control socket replaces it",
            false if in_use::is_listening(&address, cwd)? => {
                "a living process listens there now; for a control socket set `RewriteOptions::qmp`"
            }
            false => continue,
        };
        notes.push(Note::new(format!("left out {option}"), why));
        gone.push(option.clone());
    }
    let chardevs: Vec<String> = gone.iter().filter_map(backend::chardev_id).collect();
    line.retain_options(|option| {
        let monitor = backend::monitors_chardev(option);
        !gone.contains(option) && !monitor.is_some_and(|id| chardevs.contains(&id))
    });
    Ok(())
}

/// Whether a backend serves monitors and nothing else.
fn is_control(line: &CommandLine, option: &CommandOption) -> bool {
    match backend::usage(option) {
        Some(Use::Monitor) => true,
        Some(Use::Chardev) => backend::chardev_id(option).is_some_and(|id| {
            line.options().any(|other| backend::monitors_chardev(other).as_ref() == Some(&id))
                && !line.options().any(|other| backend::uses_chardev(other, &id))
        }),
        _ => false,
    }
}

/// Refuses Unix sockets of guest devices (a serial port, a display) on which another process
/// listens: QEMU would unlink them and cut that process off.
fn refuse_sockets_in_use(line: &CommandLine, cwd: &Path) -> Result<(), GuestError> {
    for option in line.options() {
        let address = backend::listens_at(option).or_else(|| other_socket(option));
        let (Some(address @ (Address::Unix(path) | Address::Abstract(path))), option) =
            (&address, option)
        else {
            continue;
        };
        if in_use::is_listening(address, cwd)? {
            let (option, path) = (option.to_string(), path.clone());
            return Err(GuestError::SocketInUse { option, path });
        }
    }
    Ok(())
}

/// The Unix sockets in the file system on which a QEMU with this command line listens.
pub(in crate::guest) fn sockets(line: &CommandLine, cwd: &Path) -> Vec<PathBuf> {
    let address = |option| backend::listens_at(option).or_else(|| other_socket(option));
    let path = |address| match address {
        Address::Unix(path) => Some(cwd.join(path)),
        Address::Abstract(_) | Address::Tcp { .. } => None,
    };
    line.options().filter_map(address).filter_map(path).collect()
}

/// The Unix socket on which an option that is no character backend listens.
pub(super) fn other_socket(option: &CommandOption) -> Option<Address> {
    let spec = Spec::parse(option.value());
    let unix = |text: &str| Some(Address::Unix(text.strip_prefix("unix:")?.to_owned()));
    match option.name() {
        "vnc" => unix(spec.get_or_implied("vnc")?),
        "display" => unix(spec.get("vnc")?),
        "spice" if spec.flag("unix") == Some(true) => {
            spec.get("addr").map(|path| Address::Unix(path.to_owned()))
        }
        "netdev" if spec.flag("server") == Some(true) && spec.get("addr.type") == Some("unix") => {
            spec.get("addr.path").map(|path| Address::Unix(path.to_owned()))
        }
        _ => None,
    }
}

/// The paths in a record's command line, as written there, that no two QEMUs can share: Unix sockets that it listens on, and files that it writes. Devices below
/// /dev are not among them.
pub fn exclusive_paths(machine: &Machine) -> Vec<String> {
    let line = CommandLine::parse(machine.argv.get(1..).unwrap_or_default());
    let mut paths = Vec::new();
    for option in line.options() {
        if let Some(Address::Unix(path)) = backend::listens_at(option).or(other_socket(option)) {
            paths.push(path);
        }
        paths.extend(outputs(option));
    }
    paths.retain(|path| !path.is_empty() && !path.starts_with("/dev/"));
    paths.sort();
    paths.dedup();
    paths
}

/// A file of an option that no other process may have open.
struct FileUse {
    option: String,
    path: PathBuf,
    purpose: &'static str,
    /// Whether processes that only read it count.
    readers_too: bool,
}

/// Refuses output files that another process writes, and shared memory that another process
/// uses: two guests in one memory would destroy each other.
fn refuse_files_in_use(line: &CommandLine, cwd: &Path) -> Result<(), GuestError> {
    let uses: Vec<FileUse> = line.options().flat_map(|option| file_uses(option, cwd)).collect();
    if uses.is_empty() {
        return Ok(());
    }
    let paths: Vec<PathBuf> = uses.iter().map(|file| file.path.clone()).collect();
    let holders = in_use::holders(&paths);
    for FileUse { option, path, purpose, readers_too } in uses {
        let counts = |holder: &&Holder| holder.writes || readers_too;
        if let Some(holder) = holders.get(&path).and_then(|list| list.iter().find(counts)) {
            let (pid, process) = (holder.pid, holder.name.clone());
            return Err(GuestError::FileInUse { option, purpose, path, pid, process });
        }
    }
    Ok(())
}

/// The files that an option writes.
pub(super) fn outputs(option: &CommandOption) -> Vec<String> {
    let mut outputs = backend::writes_to(option);
    match option.name() {
        "D" => outputs.extend(option.value.clone()),
        "trace" => outputs.extend(Params::parse(option.value()).get("file").map(str::to_owned)),
        _ => {}
    }
    outputs
}

fn file_uses(option: &CommandOption, cwd: &Path) -> Vec<FileUse> {
    let file = |path: String, purpose, readers_too| FileUse {
        option: option.to_string(),
        path: cwd.join(path),
        purpose,
        readers_too,
    };
    let mut uses: Vec<FileUse> =
        outputs(option).into_iter().map(|path| file(path, "writes to", false)).collect();
    if let Some(path) = shared_memory_file(option) {
        uses.push(file(path, "keeps the guest's memory, shared, in", true));
    }
    uses
}

/// The file in which a memory backend keeps guest memory that others see change.
fn shared_memory_file(option: &CommandOption) -> Option<String> {
    let spec = Spec::parse(option.value());
    let shared = option.name() == "object"
        && spec.get_or_implied("qom-type") == Some("memory-backend-file")
        && spec.flag("share") == Some(true)
        && spec.flag("readonly") != Some(true);
    shared.then(|| spec.get("mem-path").map(str::to_owned)).flatten()
}
