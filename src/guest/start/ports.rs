//! Ports of the recorded command line replaced by others, since a host has each only once.

use std::collections::{BTreeMap, BTreeSet};

use crate::guest::GuestError;
use crate::guest::command_line::{CommandLine, ports};
use crate::guest::start::plan::Note;
use crate::host::in_use::{self, ReservedPort};

/// What replaces a recorded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NewPort {
    /// This port.
    Number(u16),
    /// A port that is free, for TCP and for UDP.
    Free,
}

impl NewPort {
    /// Reads a rule `OLD=NEW`, where `NEW` may be `auto`, or 0, for a free one.
    pub(crate) fn read_rule(text: &str) -> Option<(u16, NewPort)> {
        let number = |text: &str| text.parse().ok().filter(|number| *number != 0);
        let (old, new) = text.split_once('=')?;
        let new = match new {
            "auto" | "0" => NewPort::Free,
            new => NewPort::Number(number(new)?),
        };
        Some((number(old)?, new))
    }
}

/// Ports that replace others.
#[derive(Debug, Default)]
pub(super) struct Replaced {
    /// The new port for each old one.
    pub ports: BTreeMap<u16, u16>,
    /// Those of them that are kept free for QEMU to bind.
    pub reserved: Vec<ReservedPort>,
}

/// Replaces ports by these rules.
///
/// # Errors
/// [`GuestError::PortRule`] when a rule can't be followed, [`GuestError::NoSuchPort`] when no
/// option binds its port.
pub(super) fn replace_in_line(
    line: &mut CommandLine,
    rules: &[(u16, NewPort)],
    notes: &mut Vec<Note>,
) -> Result<Replaced, GuestError> {
    if rules.is_empty() {
        return Ok(Replaced::default());
    }
    let bound = line.options().flat_map(ports::bound).map(|port| port.number);
    let replaced = choose(rules, &bound.collect())?;
    for option in line.options_mut() {
        let mut used = Vec::new();
        let new = ports::replaced(option, &mut |port| {
            let new = replaced.ports.get(&port.number).copied()?;
            used.push(format!("{}={new}", port.number));
            Some(new)
        })?;
        if let Some(new) = new {
            let why = format!("`RewriteOptions::ports` {}", used.join(", "));
            notes.push(Note::new(format!("replaced {option} by {new}"), why));
            *option = new;
        }
    }
    Ok(replaced)
}

/// The new port for each old one. `bound` are those that the command line binds.
fn choose(rules: &[(u16, NewPort)], bound: &BTreeSet<u16>) -> Result<Replaced, GuestError> {
    let Replaced { mut ports, mut reserved } = Replaced::default();
    let mut taken: Vec<u16> = bound.iter().copied().collect();
    taken.extend(rules.iter().filter_map(|(_, new)| match new {
        NewPort::Number(new) => Some(*new),
        NewPort::Free => None,
    }));
    for (old, new) in rules {
        let refuse = |new: &str, problem: String| GuestError::PortRule {
            old: *old,
            new: new.to_owned(),
            problem,
        };
        if !bound.contains(old) {
            let known: Vec<String> = bound.iter().map(u16::to_string).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(GuestError::NoSuchPort { port: *old, known });
        }
        let new = match new {
            NewPort::Number(0) => return Err(refuse("0", "0 is no port".to_owned())),
            NewPort::Number(new) => *new,
            NewPort::Free => {
                let port = in_use::reserve_port(&taken)
                    .map_err(|error| refuse("auto", format!("no port is free: {error}")))?;
                let number = port.number;
                reserved.push(port);
                number
            }
        };
        taken.push(new);
        if ports.insert(*old, new).is_some() {
            return Err(refuse(&new.to_string(), "the port has another rule".to_owned()));
        }
    }
    Ok(Replaced { ports, reserved })
}
