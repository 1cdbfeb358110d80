//! libvirt: whether it is there, and which of its daemons listen.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Item, State};
use crate::cancel::Cancellation;
use crate::host::program::answer;

/// How long `virsh` may take to tell its version.
const LIMIT: Duration = Duration::from_secs(10);

/// Sockets of the daemons that serve `qemu:///system`, the modular one and the old one
/// (<https://libvirt.org/daemons.html>).
const SYSTEM: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];

/// Asks for libvirt. It is needed by nothing else than guests that it has.
pub(super) fn examine() -> Item {
    let name = "libvirt";
    let mut virsh = Command::new("virsh");
    virsh.arg("--version");
    let version = match answer(virsh, Vec::new(), LIMIT, &Cancellation::new()) {
        Ok(answer) if answer.status.success() => {
            String::from_utf8_lossy(&answer.stdout).trim().to_owned()
        }
        _ => return Item::new(name, State::Ok, "not installed; only its own guests need it"),
    };
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).map(|runtime| {
        ["virtqemud-sock", "libvirt-sock"].map(|socket| runtime.join("libvirt").join(socket))
    });
    let listens = |sockets: &[PathBuf]| match sockets.iter().any(|socket| socket.exists()) {
        true => "listens",
        false => "does not listen",
    };
    let system = listens(&SYSTEM.map(|socket| Path::new(socket).to_owned()));
    let session = listens(session.as_ref().map_or(&[], |sockets| &sockets[..]));
    let says =
        format!("{version}; qemu:///system {system}, qemu:///session {session} (it may on demand)");
    Item::new(name, State::Ok, says)
}
