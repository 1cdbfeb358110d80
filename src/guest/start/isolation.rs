//! A command line without network, files, sockets and disk writes: for a guest that is
//! discarded and must not leave a trace.
//!
//! The devices that the guest sees stay as they were; their backends are replaced.

use crate::guest::GuestError;
use crate::guest::command_line::backend::{self, Use};
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{CommandLine, CommandOption};
use crate::guest::start::netdevs::OF_THE_CARD;

/// Number of the first hub used, far above any that a command line would use. Each network card
/// gets a hub of its own.
const FIRST_HUB: u32 = 900_000;

/// Isolates the command line from network, files, sockets and disks.
///
/// # Errors
/// [`GuestError::NotIsolated`] when writes to a disk can't be prevented.
pub(in crate::guest) fn isolate(
    line: &mut CommandLine,
    writable_disks: &[String],
) -> Result<(), GuestError> {
    if !writable_disks.is_empty() && line.has("blockdev") {
        return Err(GuestError::NotIsolated { disks: writable_disks.join(", ") });
    }
    line.retain_options(|option| {
        let watches = matches!(backend::usage(option), Some(Use::Monitor | Use::Debugger));
        let leads_out = option.name() == "net" && is_old_backend(option) && !is_user(option);
        !watches && !leads_out
    });
    let cards = paravirtual_cards(line);
    let mut hub = FIRST_HUB;
    for option in line.options_mut() {
        match option.name() {
            "netdev" | "nic" | "net" if is_user(option) => {
                option.value = Some(restricted(&Spec::parse(option.value())));
            }
            "netdev" | "nic" => {
                if let Some(value) = unplugged(option, hub, &cards) {
                    option.value = Some(value);
                    hub += 1;
                }
            }
            "serial" | "parallel" | "debugcon" if is_backend(option) => {
                option.value = Some("null".to_owned());
            }
            "spice" => without_port(option),
            "vnc" => option.value = Some("none".to_owned()),
            "display" if Params::parse(option.value()).get("vnc").is_some() => {
                option.value = Some("vnc=none".to_owned());
            }
            "chardev" => {
                let mux = if Spec::parse(option.value()).flag("mux") == Some(true) {
                    ",mux=on"
                } else {
                    ""
                };
                let id = backend::chardev_id(option).unwrap_or_default().replace(',', ",,");
                option.value = Some(format!("null,id={id}{mux}"));
            }
            _ => {}
        }
    }
    if !line.has("nic") && !line.has("net") && !line.has("netdev") && !line.has("nodefaults") {
        // QEMU would create a network card with a user network.
        line.push(CommandOption::new("net", "nic"));
        line.push(CommandOption::new("net", "user,restrict=on"));
    }
    // Writes to disks go to temporary files (qemu(1)).
    line.push(CommandOption::flag("snapshot"));
    Ok(())
}

/// Spice without anything to connect to. Its displays are the guest's, so it stays.
fn without_port(option: &mut CommandOption) {
    let mut params = Params::parse(option.value());
    ["tls-port", "addr", "unix"].into_iter().for_each(|key| params.remove(key));
    params.set("port", "0");
    option.value = Some(params.to_string());
}

/// Whether a device's option defines its backend, rather than naming a `-chardev` or none.
fn is_backend(option: &CommandOption) -> bool {
    !option.value().starts_with("chardev:") && option.value() != "none"
}

/// Whether a `-net` is a backend, not a card.
fn is_old_backend(option: &CommandOption) -> bool {
    !matches!(Params::parse(option.value()).implied(), Some("nic" | "none"))
}

/// Whether an option makes a user network.
fn is_user(option: &CommandOption) -> bool {
    Spec::parse(option.value()).get_or_implied("type") == Some("user")
}

/// The value of an option that makes a user network, from which no packet gets to the host or
/// beyond (`restrict` in qemu(1)). It stays a user network, because its state is part of the
/// machine's: QEMU loads it into nothing else.
fn restricted(spec: &Spec) -> String {
    const LEADS_OUT: [&str; 6] = ["hostfwd", "guestfwd", "smb", "smbserver", "tftp", "bootfile"];
    match spec {
        Spec::Params(params) => {
            let mut params = params.clone();
            LEADS_OUT.iter().for_each(|key| params.remove(key));
            params.set("restrict", "on");
            params.to_string()
        }
        Spec::Json(value) => {
            let mut value = value.clone();
            if let Some(members) = value.as_object_mut() {
                members.retain(|key, _| !LEADS_OUT.contains(&key.as_str()));
                members.insert("restrict".into(), true.into());
            }
            value.to_string()
        }
    }
}

/// The ids of backends that virtio network cards use.
fn paravirtual_cards(line: &CommandLine) -> Vec<String> {
    let cards = line.options().filter(|option| option.name() == "device");
    cards
        .map(|card| Spec::parse(card.value()))
        .filter(|card| card.get_or_implied("driver").is_some_and(|d| d.starts_with("virtio-net")))
        .filter_map(|card| card.get("netdev").map(str::to_owned))
        .collect()
}

/// The value of a `-netdev` or `-nic`, connected to a hub of its own instead, or to a new tap
/// that is on no bridge. A `-nic` keeps its card's properties; `None` for one without a card.
fn unplugged(option: &CommandOption, hub: u32, paravirtual: &[String]) -> Option<String> {
    const OF_A_TAP: [&str; 2] = ["queues", "vnet_hdr"];
    let spec = Spec::parse(option.value());
    let kind = spec.get_or_implied("type");
    if kind == Some("none") {
        return None;
    }
    let is_virtio = match option.name() {
        "nic" => spec.get("model").is_some_and(|model| model.starts_with("virtio")),
        _ => spec.get("id").is_some_and(|id| paravirtual.iter().any(|card| card == id)),
    };
    // A virtio card whose driver has found a tap's offloads is loaded on nothing else. The tap
    // goes with QEMU.
    let is_tap = is_virtio && matches!(kind, Some("tap" | "bridge"));
    let mut value = Params::parse(&match is_tap {
        true => "tap,ifname=snapback%d,script=no,downscript=no".to_owned(),
        false => format!("hubport,hubid={hub}"),
    });
    for key in OF_THE_CARD.iter().chain(OF_A_TAP.iter().filter(|_| is_tap)) {
        if let Some(text) = spec.get(key) {
            value.set(key, text);
        }
    }
    Some(value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn isolated(text: &str) -> String {
        let mut line = CommandLine::parse(text.split_whitespace());
        isolate(&mut line, &[]).unwrap();
        line.into_args().join(" ")
    }

    #[test]
    fn nothing_leads_out() {
        let line = isolated(
            "-nodefaults -netdev tap,id=n0,ifname=t0 -device e1000,netdev=n0 \
             -nic user,model=e1000,mac=52:54:00:11:22:33,hostfwd=tcp::22-:22 -nic none \
             -serial unix:/s,server=on -serial chardev:c0 -parallel none \
             -chardev socket,id=c0,path=/p,server=on,mux=on -qmp unix:/q,server=on",
        );
        assert_eq!(
            line,
            "-nodefaults -netdev hubport,hubid=900000,id=n0 -device e1000,netdev=n0 \
             -nic user,model=e1000,mac=52:54:00:11:22:33,restrict=on -nic none \
             -serial null -serial chardev:c0 -parallel none -chardev null,id=c0,mux=on -snapshot"
        );
        assert_eq!(
            isolated("-net none -vnc :1,to=9 -display vnc=:1"),
            "-net none -vnc none -display vnc=none -snapshot"
        );
        assert_eq!(
            isolated("-net none -spice unix=on,addr=/s,tls-port=7,disable-ticketing=on"),
            "-net none -spice disable-ticketing=on,port=0 -snapshot"
        );
        assert_eq!(
            isolated("-netdev tap,id=t,fd=3,queues=2 -device virtio-net-pci,netdev=t"),
            "-netdev tap,ifname=snapback%d,script=no,downscript=no,id=t,queues=2 \
             -device virtio-net-pci,netdev=t -snapshot"
        );
        assert_eq!(
            isolated("-net nic,model=e1000 -net user,smb=/d -net tap"),
            "-net nic,model=e1000 -net user,restrict=on -snapshot"
        );
        assert_eq!(isolated(""), "-net nic -net user,restrict=on -snapshot");
        assert_eq!(
            isolated(r#"-netdev {"type":"user","id":"n","hostfwd":[{"str":"tcp::1-:1"}]}"#),
            r#"-netdev {"id":"n","restrict":true,"type":"user"} -snapshot"#
        );
    }

    #[test]
    fn a_disk_that_would_be_written_is_refused() {
        let mut line = CommandLine::parse(["-blockdev", "file,node-name=d,filename=/d"]);
        let error = isolate(&mut line, &["virtio0 (/d)".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("virtio0 (/d)"), "{error}");
    }
}
