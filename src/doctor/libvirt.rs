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

/// What AppArmor lets all guests of libvirt do: as shipped, and what this host adds.
const APPARMOR: &str = "/etc/apparmor.d/abstractions/libvirt-qemu";
const APPARMOR_LOCAL: &str = "/etc/apparmor.d/local/abstractions/libvirt-qemu";

/// The rule there by which QEMU may use a socket that snapback has given it.
const SOCKET_RULE: &str = "unix (send, receive) type=stream addr=none peer=(label=unconfined),";

/// The rule there by which QEMU may use the device of userfaultfd.
const DEVICE_RULE: &str = "/dev/userfaultfd rw,";

/// Whether SELinux enforces its policy: `1`.
const SELINUX: &str = "/sys/fs/selinux/enforce";

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
    let Some(user) = user_of(&settings) else { return items };
    let lack = userfaultfd_lack(user.uid.as_raw(), false);
    let needs_device = lack.is_some() && shows_device(&settings);
    items.push(guests(&user.name, lack, &settings));
    if !is_confined(&settings) {
        return items;
    }
    if Path::new("/sys/module/apparmor").exists()
        && let Ok(rules) = fs::read_to_string(APPARMOR)
    {
        let local = fs::read_to_string(APPARMOR_LOCAL).unwrap_or_default();
        items.push(apparmor(&format!("{rules}\n{local}"), needs_device));
    }
    items.extend(fs::read_to_string(SELINUX).ok().and_then(|enforces| selinux(&enforces)));
    items
}

/// Whether guests are confined where the host can.
fn is_confined(settings: &str) -> bool {
    let driver = setting(settings, "security_driver").unwrap_or_default();
    !driver.trim_matches(['[', ']', ' ']).eq("\"none\"")
}

/// Whether guests see the device of userfaultfd.
fn shows_device(settings: &str) -> bool {
    setting(settings, "cgroup_device_acl").is_some_and(|list| list.contains(DEVICE))
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

/// Whether guests of that user may have userfaultfd; `lack` is why not by userfaultfd(2).
fn guests(user: &str, lack: Option<Lack>, settings: &str) -> Item {
    let name = "libvirt's guests";
    let Some(Lack { why, remedies }) = lack else {
        let says = format!("user {user} may call userfaultfd(2): saved and reverted at once");
        return Item::new(name, State::Ok, says);
    };
    let allow = format!("`setfacl -m u:{user}:rw {DEVICE}`");
    let device = match shows_device(settings) {
        true => format!(
            "QEMU 8.0 and later may use {DEVICE}, which {SETTINGS} shows them, once {allow} is done"
        ),
        false => {
            format!("or, for QEMU 8.0 and later, {allow} and in {SETTINGS}: {SHOW_DEVICE}")
        }
    };
    let says = format!("{why}: no save, and reverts are eager; {device}");
    Item::new(name, State::Degraded, says).remedied(remedies.into_iter().next())
}

/// Whether AppArmor lets guests use the socket of a save, and the device if that is what they have.
fn apparmor(rules: &str, needs_device: bool) -> Item {
    let name = "AppArmor for libvirt's guests";
    let add = |rule: &str| format!("echo '  {rule}' >>{APPARMOR_LOCAL}");
    if !rules.contains("peer=(label=unconfined)") {
        let says = "where the kernel mediates Unix sockets (Ubuntu's does), a guest can't be \
                    saved: QEMU may not write to the socket that it is given";
        return Item::new(name, State::Degraded, says).remedied(add(SOCKET_RULE));
    }
    if needs_device && !rules.lines().any(|line| line.trim() == DEVICE_RULE) {
        let says = format!("QEMU may not open {DEVICE}, which {SETTINGS} shows it");
        return Item::new(name, State::Degraded, says).remedied(add(DEVICE_RULE));
    }
    Item::new(name, State::Ok, "QEMU may use the sockets that it is given")
}

/// What SELinux does, if it does something. No policy is known by name to stand in the way.
fn selinux(enforces: &str) -> Option<Item> {
    let says = "enforces its policy; should it deny QEMU (svirt_t) something, `ausearch -m avc -ts \
                recent` tells what, and `ausearch -m avc -ts recent | audit2allow -M snapback && \
                semodule -i snapback.pp` allows it";
    let name = "SELinux for libvirt's guests";
    (enforces.trim() == "1").then(|| Item::new(name, State::Ok, says))
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
        assert!(apparmor(SOCKET_RULE, false).remedy.is_none());
        let remedy = apparmor("unix (send) peer=(label=libvirtd),", true).remedy.unwrap();
        assert!(remedy.contains(SOCKET_RULE) && remedy.contains(APPARMOR_LOCAL));
        let item = apparmor(SOCKET_RULE, true);
        assert!(item.says.contains("qemu.conf shows it"), "{item:?}");
        assert!(item.remedy.unwrap().contains("  /dev/userfaultfd rw,'"));
        let both = format!("{SOCKET_RULE}\n  {DEVICE_RULE}\n");
        assert!(apparmor(&both, true).remedy.is_none());
        assert!(selinux("0").is_none());
        assert!(selinux("1\n").unwrap().says.contains("audit2allow"));
    }

    #[test]
    fn guests_are_told_what_they_lack() {
        assert_eq!(guests("u", None, "").state, State::Ok);
        let lack = || {
            let remedies = vec!["sysctl vm.unprivileged_userfaultfd=1".to_owned()];
            Some(Lack { why: "not allowed".into(), remedies })
        };
        let item = guests("libvirt-qemu", lack(), "user = \"x\"\n");
        assert_eq!(item.state, State::Degraded);
        assert_eq!(item.remedy.unwrap(), "sysctl vm.unprivileged_userfaultfd=1");
        let allow = "setfacl -m u:libvirt-qemu:rw /dev/userfaultfd";
        assert!(item.says.contains(allow) && item.says.contains(SHOW_DEVICE), "{}", item.says);
        let item = guests("qemu", lack(), SHOW_DEVICE);
        assert!(item.says.contains("once `setfacl -m u:qemu:rw"), "{}", item.says);
        assert!(!item.says.contains("cgroup_device_acl"), "{}", item.says);
    }

    #[test]
    fn guests_that_nothing_confines_are_known() {
        assert!(is_confined(""));
        assert!(is_confined("security_driver = \"selinux\""));
        assert!(!is_confined("security_driver = \"none\""));
        assert!(!is_confined("security_driver = [ \"none\" ]\n"));
    }
}
