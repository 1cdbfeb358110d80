//! libvirt: whether it is there, which of its daemons listen, and whether its guests may do what a
//! save and a revert take.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::User;

use super::{Item, State};
use crate::cancel::Cancellation;
use crate::host::program::answer;
use crate::host::rights::{Lack, userfaultfd_lack};
use crate::host::uffd::DEVICE;

/// How long `virsh` may take to tell its version.
const LIMIT: Duration = Duration::from_secs(10);

/// Sockets of the daemons that serve `qemu:///system`, the modular one and the old one
/// (<https://libvirt.org/daemons.html>).
const SYSTEM: [&str; 2] = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];

/// The settings of the QEMU driver of `qemu:///system`; only root may read them.
const SETTINGS: &str = "/etc/libvirt/qemu.conf";

/// The user as whom `qemu:///system` runs guests: Debian's and Ubuntu's, and everybody else's.
const USERS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// The line of [`SETTINGS`] that shows guests the device of userfaultfd: the list there, and the
/// device.
const SHOW_DEVICE: &str = r#"cgroup_device_acl = ["/dev/null", "/dev/full", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/ptmx", "/dev/kvm", "/dev/userfaultfd"]"#;

/// What AppArmor lets all guests of libvirt do.
const APPARMOR: &str = "/etc/apparmor.d/abstractions/libvirt-qemu";

/// The rule there by which QEMU may use a socket that snapback has given it.
const SOCKET_RULE: &str = "unix (send, receive) type=stream addr=none peer=(label=unconfined),";

/// Asks for libvirt. It is needed by nothing else than guests that it has.
pub(super) fn examine() -> Vec<Item> {
    let name = "libvirt";
    let mut virsh = Command::new("virsh");
    virsh.arg("--version");
    let version = match answer(virsh, Vec::new(), LIMIT, &Cancellation::new()) {
        Ok(answer) if answer.status.success() => {
            String::from_utf8_lossy(&answer.stdout).trim().to_owned()
        }
        _ => {
            let says = "not installed; only its own guests need it";
            return vec![Item::new(name, State::Ok, says)];
        }
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
    let mut items = vec![built_in(Item::new(name, State::Ok, says))];
    let settings = fs::read_to_string(SETTINGS).unwrap_or_default();
    items.extend(user_of(&settings).map(|user| guests(&user, &settings)));
    if Path::new("/sys/module/apparmor").exists() {
        items.extend(fs::read_to_string(APPARMOR).ok().map(|rules| apparmor(&rules)));
    }
    items
}

/// Whether this program can talk to it.
fn built_in(item: Item) -> Item {
    if cfg!(feature = "libvirt") {
        return item;
    }
    let says = format!("{}; this snapback was built without it: no `--domain`", item.says);
    let remedy = "cargo build --release --features libvirt".to_owned();
    Item { state: State::Degraded, says, ..item }.remedied(remedy)
}

/// The user as whom `qemu:///system` runs guests.
fn user_of(settings: &str) -> Option<User> {
    let found = |name: &str| User::from_name(name).ok().flatten();
    match setting(settings, "user") {
        Some(named) => found(named.trim_matches('"').trim_start_matches('+')),
        None => USERS.iter().find_map(|name| found(name)),
    }
}

/// Whether guests of that user may have userfaultfd.
fn guests(user: &User, settings: &str) -> Item {
    let name = "libvirt's guests";
    let Some(lack) = userfaultfd_lack(user.uid.as_raw(), false) else {
        let says =
            format!("user {} may call userfaultfd(2): saved and reverted at once", user.name);
        return Item::new(name, State::Ok, says);
    };
    let Lack { why, remedies } = lack;
    let shown = setting(settings, "cgroup_device_acl").is_some_and(|list| list.contains(DEVICE));
    let device = match shown {
        true => format!("QEMU 8.0 and later may use {DEVICE}, which {SETTINGS} shows them"),
        false => format!(
            "or, for QEMU 8.0 and later, `setfacl -m u:{}:rw {DEVICE}` and in {SETTINGS}: \
             {SHOW_DEVICE}",
            user.name
        ),
    };
    let says = format!("{why}: no save, and reverts are eager; {device}");
    Item::new(name, State::Degraded, says).remedied(remedies.into_iter().next())
}

/// Whether AppArmor lets guests use the socket of a save.
fn apparmor(rules: &str) -> Item {
    let name = "AppArmor for libvirt's guests";
    match rules.contains("peer=(label=unconfined)") {
        true => Item::new(name, State::Ok, "QEMU may use the sockets that it is given"),
        false => {
            let says = "where the kernel mediates Unix sockets (Ubuntu's does), a guest can't be \
                        saved: QEMU may not write to the socket that it is given";
            let remedy = format!("echo '  {SOCKET_RULE}' >>{APPARMOR}");
            Item::new(name, State::Degraded, says).remedied(remedy)
        }
    }
}

/// A setting of a libvirt configuration file. A list may go over several lines.
fn setting<'a>(settings: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = settings;
    while !rest.is_empty() {
        let line = rest.lines().next().unwrap_or_default();
        let value = line.strip_prefix(name).and_then(|line| line.trim_start().strip_prefix('='));
        if let Some(value) = value.map(str::trim) {
            let is_open = value.starts_with('[') && !value.contains(']');
            let end = rest.find(']').filter(|_| is_open);
            return Some(end.map_or(value, |end| &rest[..end]));
        }
        rest = rest.get(line.len()..).unwrap_or_default().trim_start();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_libvirt_writes_them() {
        let settings = "#user = \"a\"\nuser = \"root\"\n\ncgroup_device_acl = [\n  \"/dev/null\",\n  \
                        \"/dev/userfaultfd\"\n]\n";
        assert_eq!(setting(settings, "user"), Some("\"root\""));
        let list = setting(settings, "cgroup_device_acl").unwrap();
        assert!(list.contains(DEVICE), "{list}");
        assert_eq!(setting(settings, "group"), None);
        assert_eq!(user_of(settings).unwrap().uid.as_raw(), 0);
        assert!(SHOW_DEVICE.contains(DEVICE));
    }

    #[test]
    fn a_rule_that_is_missing_is_given() {
        assert!(apparmor(SOCKET_RULE).remedy.is_none());
        let remedy = apparmor("unix (send) peer=(label=libvirtd),").remedy.unwrap();
        assert!(remedy.contains(SOCKET_RULE) && remedy.contains(APPARMOR));
    }
}
