//! Backends of recorded network cards replaced by others.
//!
//! The cards, which the guest sees, stay as they were.

use crate::guest::GuestError;
use crate::guest::command_line::backend;
use crate::guest::command_line::parameters::{Params, Spec};
use crate::guest::command_line::{Arg, CommandLine, CommandOption};
use crate::guest::start::plan::Note;

/// The parts of a `-nic` that describe its card, not its backend.
pub(super) const OF_THE_CARD: [&str; 5] = ["id", "model", "mac", "addr", "vectors"];

/// Replaces the backends of these ids.
///
/// # Errors
/// [`GuestError::NoSuchNetdev`] when no option has the id, [`GuestError::NetdevRule`] when the
/// new backend can't be spelled there.
pub(super) fn replace_in_line(
    line: &mut CommandLine,
    rules: &[(String, String)],
    notes: &mut Vec<Note>,
) -> Result<(), GuestError> {
    for (id, spec) in rules {
        let known: Vec<String> = line.options().filter_map(netdev_id).collect();
        let option = line.options_mut().find(|option| netdev_id(option).as_ref() == Some(id));
        let Some(option) = option else {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(GuestError::NoSuchNetdev { id: id.clone(), known });
        };
        let new = with_backend(option, id, spec)?;
        let what = format!("replaced {option} by {new}");
        notes.push(Note::new(what, format!("`RewriteOptions::netdevs` {id}={spec}")));
        let old = std::mem::replace(option, new);
        if is_user(&old) {
            keep_state_of_user_network(line, id);
        }
        drop_unused_chardev(line, &old);
    }
    Ok(())
}

/// The id of a network backend. One of `-nic` or `-net` without an id can't be named.
pub(super) fn netdev_id(option: &CommandOption) -> Option<String> {
    let is_backend = match option.name() {
        "netdev" | "nic" => true,
        "net" => !matches!(Params::parse(option.value()).implied(), Some("nic" | "none")),
        _ => false,
    };
    is_backend.then(|| Spec::parse(option.value()).get("id").map(str::to_owned)).flatten()
}

/// The option with another backend, and the id and the card that it has.
fn with_backend(option: &CommandOption, id: &str, spec: &str) -> Result<CommandOption, GuestError> {
    let refuse = |problem: &'static str| GuestError::NetdevRule {
        id: id.to_owned(),
        spec: spec.to_owned(),
        problem,
    };
    let mut new = Spec::parse(spec);
    if new.get_or_implied("type").is_none_or(str::is_empty) {
        return Err(refuse("it names no type of network, such as `user` or `tap`"));
    }
    if matches!(new, Spec::Json(_)) && option.name() != "netdev" {
        return Err(refuse("JSON can only replace a -netdev"));
    }
    new.set("id", id);
    if option.name() == "nic" {
        let old = Spec::parse(option.value());
        for key in OF_THE_CARD {
            if let Some(text) = old.get(key) {
                new.set(key, text);
            }
        }
    }
    Ok(CommandOption { value: Some(new.to_string()), ..option.clone() })
}

fn is_user(option: &CommandOption) -> bool {
    Spec::parse(option.value()).get_or_implied("type") == Some("user")
}

/// The state of a user network is part of the machine's: QEMU fails to load it where there is
/// none. One that leads nowhere, and to which no card is connected, takes it instead. It has the
/// old one's place, since several are told apart by their order.
fn keep_state_of_user_network(line: &mut CommandLine, id: &str) {
    let replaced = |arg: &Arg| match arg {
        Arg::Option(option) => netdev_id(option).as_deref() == Some(id),
        Arg::Image(_) => false,
    };
    let Some(at) = line.args.iter().position(replaced) else { return };
    if matches!(&line.args[at], Arg::Option(option) if is_user(option)) {
        return;
    }
    let mut unconnected = Params::parse("user,restrict=on");
    unconnected.set("id", &format!("snapback-{id}"));
    let option = CommandOption::new("netdev", unconnected.to_string());
    line.args.insert(at, Arg::Option(option));
}

/// Drops the `-chardev` of a backend that is replaced, such as that of `vhost-user`.
fn drop_unused_chardev(line: &mut CommandLine, old: &CommandOption) {
    let Some(id) = Spec::parse(old.value()).get("chardev").map(str::to_owned) else { return };
    let used = line.options().any(|option| {
        backend::uses_chardev(option, &id)
            || backend::monitors_chardev(option).as_ref() == Some(&id)
    });
    line.retain_options(|option| used || backend::chardev_id(option).as_ref() != Some(&id));
}
