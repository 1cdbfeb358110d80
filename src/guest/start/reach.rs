//! How others reach a guest on this host.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::guest::command_line::backend;
use crate::guest::command_line::parameters::Spec;
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::control::control_sockets_of;
use crate::host::in_use::Address;

/// The name of the channel by which QEMU's guest agent is reached.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// How others reach a guest on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Ports that were replaced, by their recorded ones.
    pub ports: BTreeMap<u16, u16>,
    /// Its control socket (QMP) for others, absolute.
    pub qmp: Option<PathBuf>,
    /// The socket of its agent's channel, absolute.
    pub agent: Option<PathBuf>,
}

impl Reach {
    /// What a command line says. Of several control sockets the last counts, which is the one that
    /// was asked for.
    pub(super) fn new(line: &CommandLine, cwd: &Path, ports: BTreeMap<u16, u16>) -> Reach {
        let qmp = control_sockets_of(line).pop();
        let agent = line.options().find_map(|option| chardev_socket(line, &agent_chardev(option)?));
        let absolute = |path: String| cwd.join(path);
        Reach { ports, qmp: qmp.map(absolute), agent: agent.map(absolute) }
    }
}

/// The `-chardev` of the port that is the agent's channel.
fn agent_chardev(option: &CommandOption) -> Option<String> {
    let spec = Spec::parse(option.value());
    let is_channel = option.name() == "device"
        && spec.get_or_implied("driver") == Some("virtserialport")
        && spec.get("name") == Some(AGENT_CHANNEL);
    is_channel.then(|| spec.get("chardev").map(str::to_owned)).flatten()
}

/// The socket in the file system on which a `-chardev` listens.
fn chardev_socket(line: &CommandLine, id: &str) -> Option<String> {
    let mut options = line.options();
    let chardev = options.find(|option| backend::chardev_id(option).as_deref() == Some(id))?;
    match backend::listens_at(chardev)? {
        Address::Unix(path) => Some(path),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(args: &[&str]) -> (Option<String>, Option<String>) {
        let reach = Reach::new(
            &CommandLine::parse(args.iter().copied()),
            Path::new("/vm"),
            BTreeMap::new(),
        );
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        (reach.qmp.map(text), reach.agent.map(text))
    }

    #[test]
    fn a_control_socket_is_found_in_every_spelling() {
        let chardev = ["-chardev", "socket,id=c,path=/q,server=on,wait=off"];
        let json = r#"{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/q"}}}}}"#;
        for args in [
            &["-qmp", "unix:/q,server=on,wait=off"][..],
            &[chardev[0], chardev[1], "-mon", "chardev=c,mode=control"],
            &[chardev[0], chardev[1], "-qmp", "chardev:c"],
            &["-chardev", json, "-mon", "c,mode=control"],
            &["-qmp", "unix:/first,server=on", "-qmp", "unix:/q,server=on"],
        ] {
            assert_eq!(reach(args), (Some("/q".into()), None), "{args:?}");
        }
        let relative = reach(&["-qmp", "unix:q,server=on"]);
        assert_eq!(relative.0.as_deref(), Some("/vm/q"));
        for args in [
            &["-monitor", "unix:/q,server=on"][..],
            &[chardev[0], chardev[1], "-mon", "c"],
            &["-qmp", "unix:/q"],
            &["-qmp", "tcp::4444,server=on"],
            &[chardev[0], chardev[1], "-serial", "chardev:c"],
        ] {
            assert_eq!(reach(args), (None, None), "{args:?}");
        }
    }

    #[test]
    fn the_agents_channel_is_known_by_its_name() {
        let chardev = ["-chardev", "socket,id=a,path=ga,server=on,wait=off"];
        let port = |name: &str| format!("virtserialport,chardev=a,name={name}");
        let json = r#"{"driver":"virtserialport","chardev":"a","name":"org.qemu.guest_agent.0"}"#;
        for device in [&port(AGENT_CHANNEL), json] {
            let found = reach(&[chardev[0], chardev[1], "-device", device]);
            assert_eq!(found.1.as_deref(), Some("/vm/ga"), "{device}");
        }
        let other = reach(&[chardev[0], chardev[1], "-device", &port("com.redhat.spice.0")]);
        assert_eq!(other.1, None);
    }
}
