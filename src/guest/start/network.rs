//! Ports, tap interfaces and vsock addresses that somebody uses already. QEMU would fail to
//! start, in words that name no way out.

use crate::guest::GuestError;
use crate::guest::command_line::parameters::Spec;
use crate::guest::command_line::{CommandLine, CommandOption, ports};
use crate::guest::start::netdevs::netdev_id;
use crate::host::in_use::{self, Attached, Owner};
use crate::host::procfs;

/// The key of a vhost-vsock device's address.
const GUEST_CID: &str = "guest-cid";

/// Refuses what is in use, by name.
///
/// A vsock address is looked for on the command lines of other processes only: the kernel
/// doesn't tell which addresses are taken, or by whom. One of a device that was plugged in
/// later is not seen, and QEMU fails by itself.
pub(super) fn refuse_in_use(line: &CommandLine) -> Result<(), GuestError> {
    for option in line.options() {
        for port in ports::bound(option) {
            if let Some(bound) = in_use::bound_over(&port)? {
                return Err(GuestError::PortInUse {
                    option: option.to_string(),
                    protocol: port.protocol,
                    port: port.number,
                    who: who(bound.owner),
                });
            }
        }
        if let Some(tap) = tap(option)
            && let Some(attached) = in_use::attached(&tap)
        {
            let who = who(match attached {
                Attached::To(owner) => Some(owner),
                Attached::Unseen => None,
            });
            let id = netdev_id(option).unwrap_or_else(|| "ID".to_owned());
            return Err(GuestError::TapInUse { option: option.to_string(), tap, who, id });
        }
    }
    refuse_vsock_addresses(line)
}

/// A process in words.
fn who(owner: Option<Owner>) -> String {
    match owner {
        Some(Owner { pid, name }) => format!("process {pid} ({name})"),
        None => "another process".to_owned(),
    }
}

/// The tap interface that an option names. QEMU makes a new one where it names none.
fn tap(option: &CommandOption) -> Option<String> {
    if !["netdev", "nic", "net"].contains(&option.name()) {
        return None;
    }
    let spec = Spec::parse(option.value());
    let is_tap = spec.get_or_implied("type") == Some("tap");
    // A name with %d in it is a pattern (`tun_alloc` in Linux's drivers/net/tun.c).
    is_tap.then(|| spec.get("ifname").filter(|name| !name.contains('%')).map(str::to_owned))?
}

fn refuse_vsock_addresses(line: &CommandLine) -> Result<(), GuestError> {
    let wanted = vsock_devices(line);
    if wanted.is_empty() {
        return Ok(());
    }
    let us = std::process::id() as i32;
    for pid in procfs::processes().filter(|pid| *pid != us) {
        let arguments = procfs::arguments(pid);
        // Few processes are looked into further.
        if !arguments.iter().any(|argument| argument.contains(GUEST_CID)) {
            continue;
        }
        let others = vsock_devices(&CommandLine::parse(arguments.into_iter().skip(1)));
        for (option, cid) in &wanted {
            if others.iter().any(|(_, other)| other == cid) {
                let id = Spec::parse(option.value()).get("id").map(str::to_owned);
                return Err(GuestError::VsockInUse {
                    option: option.to_string(),
                    cid: *cid,
                    who: who(Some(Owner::of(pid))),
                    advice: vsock_advice(option, id.as_deref()),
                });
            }
        }
    }
    Ok(())
}

/// How a vsock device is given another address. QEMU's `-set` works on a device that has an id
/// and is not written as JSON.
fn vsock_advice(option: &CommandOption, id: Option<&str>) -> String {
    match id.filter(|_| !option.value().starts_with('{')) {
        Some(id) => {
            format!("give it another in `RewriteOptions::extra`: -set device.{id}.{GUEST_CID}=N")
        }
        None => "end that process, or start QEMU yourself with another address, -incoming defer, \
                 and use `snapback serve`"
            .to_owned(),
    }
}

/// The vsock devices of a command line, with their addresses as `-set` leaves them.
fn vsock_devices(line: &CommandLine) -> Vec<(CommandOption, u32)> {
    let set = |id: &str| {
        let key = format!("device.{id}.{GUEST_CID}=");
        let sets = line.options().filter(|option| option.name() == "set");
        sets.filter_map(|option| option.value().strip_prefix(&key)?.parse().ok()).last()
    };
    let device = |option: &CommandOption| {
        let spec = Spec::parse(option.value());
        let is_vsock = option.name() == "device"
            && spec
                .get_or_implied("driver")
                .is_some_and(|driver| driver.starts_with("vhost-vsock"));
        if !is_vsock {
            return None;
        }
        let given = || {
            let leaves = spec.leaves().into_iter();
            leaves.filter(|(key, _)| key == GUEST_CID).find_map(|(_, cid)| cid.parse().ok())
        };
        let cid: u32 = spec.get("id").and_then(set).or_else(given)?;
        Some((option.clone(), cid))
    };
    line.options().filter_map(device).collect()
}
