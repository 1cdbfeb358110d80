//! The ports of this host that an option has QEMU bind, in each of QEMU's spellings: found, and
//! replaced by others.
//!
//! Ports that a client connects to are not among them, and neither are ranges (`to=`), of which
//! QEMU takes the first port that is free.

use super::CommandOption;
use super::backend;
use super::parameters::{Params, Spec};
use crate::guest::GuestError;
use crate::host::in_use::{Address, Port, Protocol};

/// The TCP port of the VNC display `:0` (qemu(1), `-vnc`).
const VNC: u16 = 5900;

/// The TCP port of its WebSocket (qemu(1), `-vnc`, `websocket=on`).
const VNC_WEBSOCKET: u16 = 5700;

/// The TCP port of `-s` (qemu(1)).
const DEBUGGER: u16 = 1234;

/// What an address without a host means where QEMU only takes IPv4.
const ANY_IPV4: &str = "0.0.0.0";

/// Chooses what replaces a port: `None` keeps it.
type Choose<'a> = &'a mut dyn FnMut(&Port) -> Option<u16>;

/// The ports that an option has QEMU bind.
pub(in crate::guest) fn bound(option: &CommandOption) -> Vec<Port> {
    let mut ports = Vec::new();
    let kept = replaced(option, &mut |port| {
        ports.push(port.clone());
        None
    });
    debug_assert!(matches!(kept, Ok(None)));
    ports
}

/// The option with other ports; `None` when it stays as it is.
///
/// # Errors
/// [`GuestError::PortRule`] when the option can't spell a port.
pub(in crate::guest) fn replaced(
    option: &CommandOption,
    choose: Choose<'_>,
) -> Result<Option<CommandOption>, GuestError> {
    let mut spec = Spec::parse(option.value());
    let changed = match option.name() {
        "s" => {
            let new = choose(&port(Protocol::Tcp, "", DEBUGGER));
            return Ok(new.map(|new| CommandOption::new("gdb", format!("tcp::{new}"))));
        }
        "netdev" | "nic" | "net" => network(&mut spec, choose),
        "vnc" | "display" => display(option.name(), &mut spec, choose)?,
        "spice" => {
            let plain = part(&mut spec, ("addr", "port"), Protocol::Tcp, choose);
            let encrypted = part(&mut spec, ("addr", "tls-port"), Protocol::Tcp, choose);
            plain || encrypted
        }
        "chardev" => chardev(option, &mut spec, choose),
        _ if backend::usage(option).is_some() => {
            spec = Spec::Params(Params::parse(option.value()));
            old_chardev(option, &mut spec, choose)
        }
        _ => false,
    };
    Ok(changed.then(|| CommandOption { value: Some(spec.to_string()), ..option.clone() }))
}

fn port(protocol: Protocol, host: &str, number: u16) -> Port {
    Port { protocol, host: host.to_owned(), number }
}

/// Replaces the port `key.1` beside its host `key.0`.
fn part(spec: &mut Spec, key: (&str, &str), protocol: Protocol, choose: Choose<'_>) -> bool {
    let number = |spec: &Spec| spec.get(key.1)?.parse().ok().filter(|number| *number != 0);
    let Some(number) = number(spec) else { return false };
    let host = spec.get(key.0).unwrap_or_default();
    let Some(new) = choose(&port(protocol, host, number)) else { return false };
    spec.set(key.1, &new.to_string());
    true
}

/// `HOST:PORT` with another port.
fn pair(text: &str, protocol: Protocol, all: &str, choose: Choose<'_>) -> Option<String> {
    let (host, number) = text.rsplit_once(':')?;
    let number = number.parse().ok().filter(|number| *number != 0)?;
    let address = if host.is_empty() { all } else { host };
    let new = choose(&port(protocol, address, number))?;
    Some(format!("{host}:{new}"))
}

/// The backends of `-netdev`, `-nic` and `-net`.
fn network(spec: &mut Spec, choose: Choose<'_>) -> bool {
    const TCP: Protocol = Protocol::Tcp;
    const UDP: Protocol = Protocol::Udp;
    match spec.get_or_implied("type") {
        Some("user") => texts(spec, &mut |key, text| {
            let forwards = key == "hostfwd" || key.starts_with("hostfwd.");
            if forwards { forward(text, choose) } else { None }
        }),
        Some("socket") => {
            // With `mcast=`, `localaddr=` names an interface.
            let multicast = spec.get("mcast").is_some();
            texts(spec, &mut |key, text| match key {
                "listen" => pair(text, TCP, ANY_IPV4, choose),
                "localaddr" if !multicast => pair(text, UDP, ANY_IPV4, choose),
                _ => None,
            })
        }
        Some("stream") if spec.flag("server") == Some(true) && is_one(spec, "addr") => {
            part(spec, ("addr.host", "addr.port"), TCP, choose)
        }
        // Who sends to a group shares its port.
        Some("dgram") if !is_multicast(spec) && is_one(spec, "local") => {
            part(spec, ("local.host", "local.port"), UDP, choose)
        }
        _ => false,
    }
}

/// Whether the socket address at `key` is one port of the Internet protocols.
fn is_one(spec: &Spec, key: &str) -> bool {
    spec.get(&format!("{key}.type")) == Some("inet") && spec.get(&format!("{key}.to")).is_none()
}

fn is_multicast(spec: &Spec) -> bool {
    let remote = spec.get("remote.host").and_then(|host| host.parse::<std::net::IpAddr>().ok());
    remote.is_some_and(|address| address.is_multicast())
}

/// Replaces texts by what `new` makes of them.
fn texts(spec: &mut Spec, new: &mut dyn FnMut(&str, &str) -> Option<String>) -> bool {
    let mut changed = false;
    spec.change_texts(&mut |key, text| {
        if let Some(new) = new(key, text) {
            *text = new;
            changed = true;
        }
    });
    changed
}

/// A host forward, `[tcp|udp]:[HOST]:PORT-[GUEST]:PORT` (qemu(1), `hostfwd=`).
fn forward(text: &str, choose: Choose<'_>) -> Option<String> {
    let (scheme, rest) = text.split_once(':')?;
    let (host, guest) = rest.split_once('-')?;
    let protocol = match scheme {
        "tcp" | "" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    Some(format!("{scheme}:{}-{guest}", pair(host, protocol, ANY_IPV4, choose)?))
}

/// `-vnc HOST:N` and `-display vnc=HOST:N`, the display N. Its WebSocket's port, unless it is
/// given, is counted from N too.
fn display(name: &str, spec: &mut Spec, choose: Choose<'_>) -> Result<bool, GuestError> {
    let Spec::Params(params) = spec else { return Ok(false) };
    let address = match (name, params.implied()) {
        ("vnc", Some(address)) => address,
        _ => params.get("vnc").unwrap_or_default(),
    };
    let given = address.rsplit_once(':').and_then(|(host, n)| Some((host, n.parse().ok()?)));
    let Some((host, n)) = given.map(|(host, n): (&str, u16)| (host.to_owned(), n)) else {
        return Ok(false);
    };
    if params.get("to").is_some() || params.flag("reverse") == Some(true) {
        return Ok(false);
    }
    let websocket = websocket(params, choose, &host, n);
    let Some(number) = VNC.checked_add(n) else { return Ok(websocket) };
    let Some(new) = choose(&port(Protocol::Tcp, &host, number)) else { return Ok(websocket) };
    let Some(n) = new.checked_sub(VNC) else {
        let problem = format!("a VNC display's port is {VNC} or above");
        return Err(GuestError::PortRule { old: number, new: new.to_string(), problem });
    };
    let address = format!("{host}:{n}");
    match (name, params.implied()) {
        ("vnc", Some(_)) => params.items_mut()[0] = address,
        _ => params.set("vnc", &address),
    }
    Ok(true)
}

/// The WebSocket of VNC's display `n`. Unless it has a port of its own it follows the display.
fn websocket(params: &mut Params, choose: Choose<'_>, host: &str, n: u16) -> bool {
    let text = params.get("websocket").unwrap_or_default().to_owned();
    let (own, number) = match text.rsplit_once(':').unwrap_or((host, &text)) {
        (own, number) if number.parse::<u16>().is_ok() => (own, number.parse().ok()),
        _ if params.flag("websocket") == Some(true) => (host, VNC_WEBSOCKET.checked_add(n)),
        _ => return false,
    };
    let new = number.and_then(|number| choose(&port(Protocol::Tcp, own, number)));
    let Some(new) = new else { return false };
    let text = match text.rsplit_once(':') {
        Some((own, _)) => format!("{own}:{new}"),
        None => new.to_string(),
    };
    params.set("websocket", &text);
    true
}

/// A `-chardev`.
fn chardev(option: &CommandOption, spec: &mut Spec, choose: Choose<'_>) -> bool {
    let key = |name: &str| backend::address_key(spec, name);
    let (host, number, range) = (key("host"), key("port"), key("to"));
    if backend::kind(spec) == Some("udp") {
        let (host, number) = match spec {
            Spec::Params(_) => ("localaddr".to_owned(), "localport".to_owned()),
            Spec::Json(_) => {
                (backend::key(spec, "local.data.host"), backend::key(spec, "local.data.port"))
            }
        };
        return part(spec, (&host, &number), Protocol::Udp, choose);
    }
    let listens = matches!(backend::listens_at(option), Some(Address::Tcp { .. }));
    if !listens || spec.get(&range).is_some() {
        return false;
    }
    part(spec, (&host, &number), Protocol::Tcp, choose)
}

/// The old spelling of a character backend: `tcp:HOST:PORT,server=on,…`, and
/// `udp:…@HOST:PORT`.
fn old_chardev(option: &CommandOption, spec: &mut Spec, choose: Choose<'_>) -> bool {
    let Spec::Params(params) = spec else { return false };
    let listens = match option.name() {
        // QEMU adds the rest (`gdbserver_start`).
        "gdb" => option.value().starts_with("tcp:"),
        _ => matches!(backend::listens_at(option), Some(Address::Tcp { .. })),
    };
    let text = backend::old_spelling(option);
    let before = option.value().len() - text.len();
    let (before, first) = params.items()[0].split_at(before);
    let new = match first.split_once(':') {
        Some((scheme, address)) if listens && backend::OVER_TCP.contains(&scheme) => {
            match params.get("to") {
                Some(_) => None,
                None => {
                    pair(address, Protocol::Tcp, "", choose).map(|new| format!("{scheme}:{new}"))
                }
            }
        }
        Some(("udp", address)) => address.split_once('@').and_then(|(remote, local)| {
            let local = pair(local, Protocol::Udp, "", choose)?;
            Some(format!("udp:{remote}@{local}"))
        }),
        _ => None,
    };
    let Some(new) = new else { return false };
    let new = format!("{before}{new}");
    params.items_mut()[0] = new;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(text: &str) -> CommandOption {
        let (flag, value) = text.split_once(' ').map_or((text, None), |(f, v)| (f, Some(v)));
        CommandOption { flag: flag.to_owned(), value: value.map(str::to_owned) }
    }

    /// Every port is found, and with 1000 added to it the option reads as expected.
    #[track_caller]
    fn check(text: &str, ports: &[&str], expected: &str) {
        let found: Vec<String> = bound(&option(text))
            .iter()
            .map(|port| format!("{} {}:{}", port.protocol, port.host, port.number))
            .collect();
        let mut sorted = found.clone();
        sorted.sort();
        assert_eq!(sorted, ports);
        let new = replaced(&option(text), &mut |port| Some(port.number + 1000)).unwrap();
        assert_eq!(new.map(|option| option.to_string()), Some(expected.to_owned()));
    }

    #[track_caller]
    fn binds_nothing(text: &str) {
        assert_eq!(bound(&option(text)), [], "{text}");
        assert_eq!(replaced(&option(text), &mut |_| Some(1)).unwrap(), None);
    }

    #[test]
    fn forwards_of_user_networks() {
        check(
            "-netdev user,id=n,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:5353-10.0.2.15:53",
            &["TCP 0.0.0.0:2222", "UDP 127.0.0.1:5353"],
            "-netdev user,id=n,hostfwd=tcp::3222-:22,hostfwd=udp:127.0.0.1:6353-10.0.2.15:53",
        );
        let nic = "-nic user,model=e1000,hostfwd=::80-:80";
        check(nic, &["TCP 0.0.0.0:80"], "-nic user,model=e1000,hostfwd=::1080-:80");
        check(
            "-net user,hostfwd=tcp::80-:80",
            &["TCP 0.0.0.0:80"],
            "-net user,hostfwd=tcp::1080-:80",
        );
        check(
            r#"-netdev {"hostfwd":[{"str":"tcp::80-:80"}],"id":"n","type":"user"}"#,
            &["TCP 0.0.0.0:80"],
            r#"-netdev {"hostfwd":[{"str":"tcp::1080-:80"}],"id":"n","type":"user"}"#,
        );
        for none in [
            "-netdev user,id=n",
            "-netdev user,id=n,hostfwd=tcp::0-:22",
            "-netdev user,id=n,hostfwd=unix:/tmp/s-:22",
            "-netdev user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:x",
            "-netdev tap,id=n,ifname=t0",
            "-append hostfwd=tcp::80-:80",
        ] {
            binds_nothing(none);
        }
    }

    #[test]
    fn sockets_of_networks() {
        check(
            "-netdev socket,id=n,listen=:4444",
            &["TCP 0.0.0.0:4444"],
            "-netdev socket,id=n,listen=:5444",
        );
        check(
            "-netdev socket,id=n,udp=10.0.0.1:1,localaddr=10.0.0.2:2",
            &["UDP 10.0.0.2:2"],
            "-netdev socket,id=n,udp=10.0.0.1:1,localaddr=10.0.0.2:1002",
        );
        check(
            "-netdev stream,id=n,server=on,addr.type=inet,addr.host=::1,addr.port=7",
            &["TCP ::1:7"],
            "-netdev stream,id=n,server=on,addr.type=inet,addr.host=::1,addr.port=1007",
        );
        check(
            r#"-netdev {"id":"n","local":{"host":"127.0.0.1","port":"7","type":"inet"},"type":"dgram"}"#,
            &["UDP 127.0.0.1:7"],
            r#"-netdev {"id":"n","local":{"host":"127.0.0.1","port":"1007","type":"inet"},"type":"dgram"}"#,
        );
        for none in [
            "-netdev socket,id=n,connect=:4444",
            "-netdev socket,id=n,mcast=230.0.0.1:1234,localaddr=10.0.0.1:5",
            "-netdev stream,id=n,addr.type=inet,addr.host=h,addr.port=7",
            "-netdev stream,id=n,server=on,addr.type=inet,addr.host=h,addr.port=7,addr.to=9",
            "-netdev dgram,id=n,remote.type=inet,remote.host=230.0.0.1,remote.port=5,local.type=inet,local.host=::,local.port=5",
        ] {
            binds_nothing(none);
        }
    }

    #[test]
    fn character_backends() {
        for (text, port, new) in [
            (
                "-serial tcp::44,server=on,wait=off",
                "TCP :44",
                "-serial tcp::1044,server=on,wait=off",
            ),
            ("-serial mon:telnet:h:44,server", "TCP h:44", "-serial mon:telnet:h:1044,server"),
            ("-qmp tcp:localhost:44,server", "TCP localhost:44", "-qmp tcp:localhost:1044,server"),
            ("-parallel websocket::44,server=on", "TCP :44", "-parallel websocket::1044,server=on"),
            ("-serial udp:h:1@:44", "UDP :44", "-serial udp:h:1@:1044"),
            ("-gdb tcp::44", "TCP :44", "-gdb tcp::1044"),
            (
                "-chardev socket,id=c,host=127.0.0.1,port=44,server=on",
                "TCP 127.0.0.1:44",
                "-chardev socket,id=c,host=127.0.0.1,port=1044,server=on",
            ),
            (
                "-chardev udp,id=c,port=1,localport=44",
                "UDP :44",
                "-chardev udp,id=c,port=1,localport=1044",
            ),
            (
                r#"-chardev {"backend":{"data":{"addr":{"data":{"host":"h","port":"44"},"type":"inet"}},"type":"socket"},"id":"c"}"#,
                "TCP h:44",
                r#"-chardev {"backend":{"data":{"addr":{"data":{"host":"h","port":"1044"},"type":"inet"}},"type":"socket"},"id":"c"}"#,
            ),
        ] {
            check(text, &[port], new);
        }
        check("-s", &["TCP :1234"], "-gdb tcp::2234");
        for none in [
            "-serial tcp:host:44",
            "-serial tcp::44,server=on,to=50",
            "-serial udp:host:44",
            "-serial file:tcp::44,server",
            "-serial unix:/a:44,server=on",
            "-gdb stdio",
            "-chardev socket,id=c,host=h,port=44",
            "-chardev socket,id=c,port=44,to=50,server=on",
            "-chardev udp,id=c,port=44",
        ] {
            binds_nothing(none);
        }
    }

    #[test]
    fn displays() {
        check("-vnc :1", &["TCP :5901"], "-vnc :1001");
        check(
            "-vnc 127.0.0.1:1,password=on",
            &["TCP 127.0.0.1:5901"],
            "-vnc 127.0.0.1:1001,password=on",
        );
        check("-display vnc=:1,lossy=on", &["TCP :5901"], "-display vnc=:1001,lossy=on");
        check("-vnc :1,websocket=on", &["TCP :5701", "TCP :5901"], "-vnc :1001,websocket=6701");
        check(
            "-vnc :1,websocket=127.0.0.1:80",
            &["TCP 127.0.0.1:80", "TCP :5901"],
            "-vnc :1001,websocket=127.0.0.1:1080",
        );
        check(
            "-spice port=5930,tls-port=5931,addr=127.0.0.1",
            &["TCP 127.0.0.1:5930", "TCP 127.0.0.1:5931"],
            "-spice port=6930,tls-port=6931,addr=127.0.0.1",
        );
        for none in ["-vnc none", "-vnc unix:/s", "-vnc :1,to=9", "-vnc h:5500,reverse=on"] {
            binds_nothing(none);
        }
        binds_nothing("-display gtk");
        let error = replaced(&option("-vnc :1"), &mut |_| Some(80)).unwrap_err().to_string();
        assert!(error.contains("5901=80") && error.contains("5900"), "{error}");
    }
}
