//! Recorded paths replaced by others, wherever an option's value names them.

use crate::guest::GuestError;
use crate::guest::command_line::parameters::Spec;
use crate::guest::command_line::{Arg, CommandLine};

/// The rules `(OLD, NEW)` without their trailing slashes.
///
/// # Errors
/// [`GuestError::PathRule`] when a side is empty or `/`.
pub(super) fn rules(rules: &[(String, String)]) -> Result<Vec<(&str, &str)>, GuestError> {
    let rule = |(old, new): &'_ (String, String)| GuestError::PathRule {
        old: old.clone(),
        new: new.clone(),
    };
    rules
        .iter()
        .map(|pair| match (pair.0.trim_end_matches('/'), pair.1.trim_end_matches('/')) {
            ("", _) | (_, "") => Err(rule(pair)),
            trimmed => Ok(trimmed),
        })
        .collect()
}

/// What replaces the paths in a text by such rules, as [`RewriteOptions::paths`] has them.
///
/// # Errors
/// [`GuestError::PathRule`] when a side is empty or `/`.
///
/// [`RewriteOptions::paths`]: crate::RewriteOptions::paths
pub fn moved(pairs: &[(String, String)]) -> Result<impl Fn(&str) -> String, GuestError> {
    let rules = rules(pairs)?;
    Ok(move |text: &str| replace(text, &rules))
}

/// Replaces the paths that a command line names: files may lie elsewhere on this host.
/// The guest kernel's own command line (`-append`) names files of the guest and stays.
pub(super) fn replace_in_line(line: &mut CommandLine, rules: &[(&str, &str)]) {
    for arg in &mut line.args {
        match arg {
            Arg::Image(path) => *path = replace(path, rules),
            Arg::Option(option) if option.name() == "append" => {}
            Arg::Option(option) => {
                let Some(value) = &option.value else { continue };
                let replaced = replace_in_value(option.name(), value, rules);
                option.value = Some(replaced);
            }
        }
    }
}

/// Options whose whole value is one path, in which commas are not doubled.
pub(super) const PLAIN_PATHS: &[&str] = &[
    "D",
    "L",
    "bios",
    "cdrom",
    "chroot",
    "dtb",
    "fda",
    "fdb",
    "hda",
    "hdb",
    "hdc",
    "hdd",
    "initrd",
    "kernel",
    "mem-path",
    "mtdblock",
    "pflash",
    "pidfile",
    "readconfig",
    "sd",
];

fn replace_in_value(name: &str, value: &str, rules: &[(&str, &str)]) -> String {
    if PLAIN_PATHS.contains(&name) {
        return replace(value, rules);
    }
    match Spec::parse(value) {
        Spec::Params(mut params) => {
            params.items_mut().iter_mut().for_each(|item| *item = replace(item, rules));
            params.to_string()
        }
        Spec::Json(json) => {
            let mut replaced = json.clone();
            replace_in_json(&mut replaced, rules);
            // Unchanged JSON keeps its spelling.
            if replaced == json { value.to_owned() } else { replaced.to_string() }
        }
    }
}

fn replace_in_json(value: &mut serde_json::Value, rules: &[(&str, &str)]) {
    use serde_json::Value;
    match value {
        Value::String(text) => *text = replace(text, rules),
        Value::Array(items) => items.iter_mut().for_each(|item| replace_in_json(item, rules)),
        Value::Object(members) => {
            members.values_mut().for_each(|member| replace_in_json(member, rules));
        }
        _ => {}
    }
}

/// Replaces each path in `text` that is a rule's old path, or lies below it. The result
/// is not replaced again, so two rules can swap two directories.
pub(super) fn replace(text: &str, rules: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut before = None;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let starts = before.is_none_or(|c: char| !is_in_path(c));
        let rule = rules.iter().find(|(old, _)| {
            let after = rest.strip_prefix(old).map(|after| after.chars().next());
            starts && after.is_some_and(|next| next.is_none_or(|c| c == '/' || !is_in_name(c)))
        });
        let taken = match rule {
            Some((old, new)) => {
                out.push_str(new);
                old.len()
            }
            None => {
                out.push(c);
                c.len_utf8()
            }
        };
        before = rest[..taken].chars().next_back();
        rest = &rest[taken..];
    }
    out
}

/// Whether a character can continue a path component, so that the path doesn't end before it.
fn is_in_name(c: char) -> bool {
    c.is_alphanumeric() || "._-+~@%=".contains(c)
}

/// Whether a path that follows this character is only the rest of a longer path.
fn is_in_path(c: char) -> bool {
    c == '/' || (c != '=' && is_in_name(c))
}
