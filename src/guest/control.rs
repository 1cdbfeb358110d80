//! Where a QEMU listens for QMP.

use std::path::PathBuf;

use super::command_line::CommandLine;
use super::command_line::backend::{chardev_id, listens_at, monitors_chardev};
use super::command_line::parameters::Params;
use crate::host::in_use::Address;
use crate::host::procfs::{arguments, path};

/// The Unix sockets on which a QEMU process listens for QMP, as its command line says.
pub fn control_sockets(pid: i32) -> Vec<PathBuf> {
    let line = CommandLine::parse(arguments(pid).into_iter().skip(1));
    // Relative paths start from its working directory, and as it sees them.
    let absolute = |socket| path(pid, "cwd").join(socket);
    control_sockets_of(&line).into_iter().map(absolute).collect()
}

/// The same for a command line, as the paths are written there.
pub(super) fn control_sockets_of(line: &CommandLine) -> Vec<String> {
    let is_control = |value: &str| Params::parse(value).get("mode") == Some("control");
    let chardevs: Vec<String> = line
        .options()
        .filter(|option| match option.name() {
            "mon" => is_control(option.value()),
            name => name.starts_with("qmp"),
        })
        .filter_map(monitors_chardev)
        .collect();
    let sockets = line.options().filter(|option| {
        option.name().starts_with("qmp")
            || chardev_id(option).is_some_and(|id| chardevs.contains(&id))
    });
    let unix = sockets.filter_map(|option| match listens_at(option)? {
        Address::Unix(socket) => Some(socket),
        _ => None,
    });
    unix.collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn control_sockets_are_found_in_either_spelling() {
        let mut other = Command::new("sh");
        other.args(["-c", "read line", "-qmp", "unix:/one,server=on,wait=off"]);
        other.args(["-chardev", "socket,id=c,path=two,server=on", "-mon", "c,mode=control"]);
        other.args(["-monitor", "unix:/human,server=on", "-serial", "unix:/serial,server=on"]);
        let mut other = other.stdin(std::process::Stdio::piped()).spawn().unwrap();
        // For a moment behind its start it has none.
        while arguments(other.id() as i32).is_empty() {
            std::thread::yield_now();
        }
        let found = control_sockets(other.id() as i32);
        other.kill().unwrap();
        other.wait().unwrap();
        let cwd = path(other.id() as i32, "cwd");
        assert_eq!(found, [PathBuf::from("/one"), cwd.join("two")]);
    }
}
