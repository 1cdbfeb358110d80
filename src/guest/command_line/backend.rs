//! Character backends of serial ports, monitors and the like, in each of QEMU's three
//! spellings.

use super::CommandOption;
use super::parameters::{Params, Spec};
use crate::host::in_use::Address;

/// Options that define the character backend of a guest device.
const DEVICES: &[&str] = &["serial", "parallel", "debugcon"];

/// Options that define the character backend of a monitor.
const MONITORS: &[&str] = &["monitor", "qmp", "qmp-pretty"];

/// The old spelling's backends that use TCP.
pub(super) const OVER_TCP: &[&str] = &["tcp", "telnet", "tn3270", "websocket"];

/// What an option's character backend is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::guest) enum Use {
    /// A device that the guest sees.
    Device,
    /// A monitor.
    Monitor,
    /// The debugger's stub.
    Debugger,
    /// The option that refers to the `-chardev`.
    Chardev,
}

/// What the `use` of an option's backend is; `None` for all other options.
pub(in crate::guest) fn usage(option: &CommandOption) -> Option<Use> {
    match option.name() {
        name if DEVICES.contains(&name) => Some(Use::Device),
        name if MONITORS.contains(&name) => Some(Use::Monitor),
        "gdb" => Some(Use::Debugger),
        "chardev" => Some(Use::Chardev),
        _ => None,
    }
}

/// The old spelling `unix:PATH,…`, without the `mon:` that shares the backend
/// with a monitor (`qemu_chr_parse_compat`).
pub(super) fn old_spelling(option: &CommandOption) -> &str {
    option.value().strip_prefix("mon:").unwrap_or(option.value())
}

/// The kind of a `-chardev`, such as `socket`.
pub(super) fn kind(spec: &Spec) -> Option<&str> {
    match spec {
        Spec::Params(_) => spec.get_or_implied("backend"),
        Spec::Json(_) => spec.get("backend.type"),
    }
}

/// Where a property of a `-chardev` stands in either spelling.
pub(super) fn key(spec: &Spec, name: &str) -> String {
    match spec {
        Spec::Params(_) => name.to_owned(),
        Spec::Json(_) => format!("backend.data.{name}"),
    }
}

fn property<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.get(&key(spec, name))
}

/// Whether the option's backend is the terminal.
pub(in crate::guest) fn is_stdio(option: &CommandOption) -> bool {
    match usage(option) {
        Some(Use::Chardev) => kind(&Spec::parse(option.value())) == Some("stdio"),
        Some(_) => old_spelling(option) == "stdio",
        None => false,
    }
}

/// Replaces the option's backend by a null backend.
pub(in crate::guest) fn to_null(option: &mut CommandOption) {
    let value = match usage(option) {
        Some(Use::Chardev) => match Spec::parse(option.value()) {
            Spec::Params(mut params) => {
                params.remove("signal");
                if params.implied().is_some() {
                    params.items_mut()[0] = "null".to_owned();
                } else {
                    params.set("backend", "null");
                }
                params.to_string()
            }
            Spec::Json(mut value) => {
                value["backend"]["type"] = "null".into();
                if let Some(data) = value["backend"]["data"].as_object_mut() {
                    data.remove("signal");
                }
                value.to_string()
            }
        },
        _ => "null".to_owned(),
    };
    option.value = Some(value);
}

/// Where the option's backend listens, if it does.
pub(in crate::guest) fn listens_at(option: &CommandOption) -> Option<Address> {
    if usage(option)? == Use::Chardev {
        return chardev_listens_at(&Spec::parse(option.value()));
    }
    let params = Params::parse(old_spelling(option));
    if params.flag("server") != Some(true) {
        return None;
    }
    let (scheme, place) = params.items()[0].split_once(':')?;
    match scheme {
        "unix" if params.flag("abstract") == Some(true) => Some(Address::Abstract(place.into())),
        "unix" => Some(Address::Unix(place.to_owned())),
        scheme if OVER_TCP.contains(&scheme) => {
            let (host, port) = place.rsplit_once(':')?;
            Some(Address::Tcp { host: host.to_owned(), port: port.to_owned() })
        }
        _ => None,
    }
}

fn chardev_listens_at(spec: &Spec) -> Option<Address> {
    if kind(spec) != Some("socket") {
        return None;
    }
    // In a list `server` is off unless given, in JSON it is on.
    let json = matches!(spec, Spec::Json(_));
    if !spec.flag(&key(spec, "server")).unwrap_or(json) {
        return None;
    }
    let part = |name: &str| address_key(spec, name);
    if let Some(path) = spec.get(&part("path")) {
        let is_abstract = spec.flag(&part("abstract")) == Some(true);
        let address = if is_abstract { Address::Abstract } else { Address::Unix };
        return Some(address(path.to_owned()));
    }
    let host = spec.get(&part("host")).unwrap_or_default().to_owned();
    spec.get(&part("port")).map(|port| Address::Tcp { host, port: port.to_owned() })
}

/// Where a part of a socket's address stands in either spelling.
pub(super) fn address_key(spec: &Spec, name: &str) -> String {
    match spec {
        Spec::Params(_) => name.to_owned(),
        Spec::Json(_) => format!("backend.data.addr.data.{name}"),
    }
}

/// Whether QEMU's start would wait for a client of the backend.
pub(in crate::guest) fn waits_for_client(option: &CommandOption) -> bool {
    if listens_at(option).is_none() {
        return false;
    }
    match usage(option) {
        Some(Use::Chardev) => {
            let spec = Spec::parse(option.value());
            // In a list `wait` is on unless given, in JSON it is off.
            spec.flag(&key(&spec, "wait")).unwrap_or(matches!(spec, Spec::Params(_)))
        }
        _ => Params::parse(option.value()).flag("wait").unwrap_or(true),
    }
}

/// Makes the option's backend listen without waiting for a client.
pub(in crate::guest) fn without_waiting(option: &mut CommandOption) {
    let mut spec = match usage(option) {
        Some(Use::Chardev) => Spec::parse(option.value()),
        _ => Spec::Params(Params::parse(option.value())),
    };
    let wait = key(&spec, "wait");
    spec.set_flag(&wait, false);
    option.value = Some(spec.to_string());
}

/// The files that the option's backend writes.
pub(in crate::guest) fn writes_to(option: &CommandOption) -> Vec<String> {
    let mut files = Vec::new();
    match usage(option) {
        Some(Use::Chardev) => {
            let spec = Spec::parse(option.value());
            let file = match kind(&spec) {
                // JSON calls a file's path `out`.
                Some("file") => property(&spec, "path").or_else(|| property(&spec, "out")),
                _ => None,
            };
            files.extend(file.map(str::to_owned));
            files.extend(property(&spec, "logfile").map(str::to_owned));
        }
        Some(_) => {
            let value = old_spelling(option);
            // Of `file:` all that follows is the path, commas too.
            match value.strip_prefix("file:") {
                Some(path) => files.push(path.to_owned()),
                None => files.extend(Params::parse(value).get("logfile").map(str::to_owned)),
            }
        }
        None => {}
    }
    files
}

/// Has the option's backend append to the files that it writes, and returns those that it would
/// have truncated. `file:PATH` of the old spelling can't say that, and is left as it is.
pub(in crate::guest) fn append(option: &mut CommandOption) -> Vec<String> {
    let mut spec = match usage(option) {
        Some(Use::Chardev) => Spec::parse(option.value()),
        Some(_) if old_spelling(option).starts_with("file:") => return Vec::new(),
        Some(_) => Spec::Params(Params::parse(option.value())),
        None => return Vec::new(),
    };
    let is_file = usage(option) == Some(Use::Chardev) && kind(&spec) == Some("file");
    let outputs = [("path", "append"), ("out", "append"), ("logfile", "logappend")];
    let mut appended = Vec::new();
    for (file, switch) in outputs.into_iter().filter(|(file, _)| *file == "logfile" || is_file) {
        let switch = key(&spec, switch);
        let path = property(&spec, file).filter(|path| !path.starts_with("/dev/"));
        // Given as off, it was meant.
        if let (Some(path), None) = (path.map(str::to_owned), spec.flag(&switch)) {
            spec.set_flag(&switch, true);
            appended.push(path);
        }
    }
    if !appended.is_empty() {
        option.value = Some(spec.to_string());
    }
    appended
}

/// The id of a `-chardev`.
pub(in crate::guest) fn chardev_id(option: &CommandOption) -> Option<String> {
    (usage(option)? == Use::Chardev)
        .then(|| Spec::parse(option.value()).get("id").map(str::to_owned))
        .flatten()
}

/// The `-chardev` that an option uses as a monitor's.
pub(in crate::guest) fn monitors_chardev(option: &CommandOption) -> Option<String> {
    match option.name() {
        "mon" => Params::parse(option.value())
            .get("chardev")
            .or(Params::parse(option.value()).implied())
            .map(str::to_owned),
        name if MONITORS.contains(&name) => {
            option.value().strip_prefix("chardev:").map(str::to_owned)
        }
        _ => None,
    }
}

/// Whether an option that is not a monitor uses the `-chardev` of this id.
pub(in crate::guest) fn uses_chardev(option: &CommandOption, id: &str) -> bool {
    if monitors_chardev(option).is_some() || option.name() == "chardev" {
        return false;
    }
    if old_spelling(option).strip_prefix("chardev:") == Some(id) {
        return true;
    }
    let uses =
        |(key, value): &(String, String)| key.rsplit('.').next() == Some("chardev") && value == id;
    Spec::parse(option.value()).leaves().iter().any(uses)
}
