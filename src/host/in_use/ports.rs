//! TCP and UDP ports that are bound, from /proc/net (proc_pid_net(5)).
//!
//! These tables are those of our network namespace, which a QEMU that we start shares, and show
//! the sockets of all users. Whether an IPv6 socket takes IPv4 too (IPV6_V6ONLY, ipv6(7)) they
//! don't tell: one that is bound to `::` is taken to do so.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use socket2::{Domain, Socket, Type};

use super::owner::{self, Owner};
use super::table::{ReadError, read};

/// How often a free port is looked for that is free for both protocols.
const ATTEMPTS: usize = 16;

/// What a port is one of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP: bound by who listens.
    Tcp,
    /// UDP: bound by whoever has a socket there.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
        })
    }
}

/// A port of this host, to be bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Of which protocol.
    pub protocol: Protocol,
    /// The host's address or name; empty for all of its addresses.
    pub host: String,
    /// Its number.
    pub number: u16,
}

/// A port that is bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// At which address.
    pub address: IpAddr,
    /// By whom, where that can be seen.
    pub owner: Option<Owner>,
}

/// What is bound already and keeps `port` from being bound.
///
/// # Errors
/// When the kernel's tables can't be read.
pub fn bound_over(port: &Port) -> Result<Option<Bound>, ReadError> {
    let tables = match port.protocol {
        Protocol::Tcp => ["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => ["/proc/net/udp", "/proc/net/udp6"],
    };
    for table in tables {
        let text = match read(table) {
            // A host without IPv6 has no such table.
            Err(ReadError { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            text => text?,
        };
        let mut entries = text.lines().skip(1).filter_map(Entry::read);
        let counts = |entry: &Entry| match port.protocol {
            Protocol::Tcp => entry.listens,
            Protocol::Udp => true,
        };
        let same = |entry: &Entry| {
            entry.number == port.number && overlap(&port.host, entry.address) && counts(entry)
        };
        if let Some(entry) = entries.find(same) {
            let owner = owner::of_socket(entry.inode).map(Owner::of);
            return Ok(Some(Bound { address: entry.address, owner }));
        }
    }
    Ok(None)
}

/// Whether a socket can't be bound to the address `wanted` of a host because another one is
/// bound to `bound`, at the same port.
fn overlap(wanted: &str, bound: IpAddr) -> bool {
    const ALL: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let wanted = wanted.trim_start_matches('[').trim_end_matches(']');
    if bound == ALL || wanted.is_empty() {
        return true;
    }
    let to = |wanted: IpAddr| {
        let same_family = wanted.is_ipv4() == bound.is_ipv4();
        let one_takes_all = wanted.is_unspecified() || bound.is_unspecified();
        wanted == bound || wanted == ALL || (same_family && one_takes_all)
    };
    match wanted.parse::<IpAddr>() {
        Ok(wanted) => to(wanted.to_canonical()),
        Err(_) if wanted == "localhost" => {
            to(Ipv4Addr::LOCALHOST.into()) || to(Ipv6Addr::LOCALHOST.into())
        }
        // Names are not looked up, which may take long: only a socket that takes every address
        // is known to be in the way.
        Err(_) => bound.is_unspecified(),
    }
}

/// A line of a table.
struct Entry {
    address: IpAddr,
    number: u16,
    listens: bool,
    inode: u64,
}

impl Entry {
    /// Reads `sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …`.
    fn read(line: &str) -> Option<Entry> {
        /// The state LISTEN (Linux's net/tcp_states.h).
        const LISTEN: &str = "0A";
        let mut fields = line.split_whitespace().skip(1);
        let (address, number) = fields.next()?.split_once(':')?;
        let state = fields.nth(1)?;
        Some(Entry {
            address: address_of(address)?,
            number: u16::from_str_radix(number, 16).ok()?,
            listens: state == LISTEN,
            inode: fields.nth(5)?.parse().ok()?,
        })
    }
}

/// An address as the tables write it: words of 32 bits in the byte order of this host.
fn address_of(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = text.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut bytes = [0; 16];
            for (at, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(at)?);
            }
            Some(IpAddr::from(bytes).to_canonical())
        }
        _ => None,
    }
}

/// A port that was free, kept from everybody who asks the system for any TCP port. Who asks for
/// this one, and sets SO_REUSEADDR (socket(7)) as QEMU does for all that it listens on, gets it.
#[derive(Debug)]
pub struct ReservedPort {
    /// Its number.
    pub number: u16,
    /// Bound to it, and not listening.
    _socket: Socket,
}

/// Reserves a port that nobody has bound, of either protocol and at no address, and that is none
/// of `except`. Of UDP it is not kept: somebody may bind it before the caller does.
///
/// # Errors
/// When the system has no port to give.
pub fn reserve_port(except: &[u16]) -> io::Result<ReservedPort> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..ATTEMPTS {
        let reserved = reserve(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into())
            .or_else(|_| reserve(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()));
        match reserved.and_then(|port| free_for_udp(port.number).map(|()| port)) {
            Ok(port) if !except.contains(&port.number) => return Ok(port),
            Ok(_) => {}
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Reserves whatever TCP port the system gives at all addresses of a family.
fn reserve(domain: Domain, address: IpAddr) -> io::Result<ReservedPort> {
    let socket = Socket::new(domain, Type::STREAM, None)?;
    // Bound without SO_REUSEADDR it is a port that nobody else has; set later, it lets in others
    // that set it too.
    socket.bind(&SocketAddr::from((address, 0)).into())?;
    socket.set_reuse_address(true)?;
    let number = socket.local_addr()?.as_socket().map(|address| address.port());
    let number = number.ok_or(io::ErrorKind::AddrNotAvailable)?;
    Ok(ReservedPort { number, _socket: socket })
}

fn free_for_udp(port: u16) -> io::Result<()> {
    UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn port(protocol: Protocol, host: &str, number: u16) -> Port {
        Port { protocol, host: host.to_owned(), number }
    }

    #[test]
    fn the_address_decides_whether_a_port_is_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = listener.local_addr().unwrap().port();
        let bound = |protocol, host: &str| bound_over(&port(protocol, host, number)).unwrap();
        for host in ["127.0.0.1", "0.0.0.0", "", "::", "[::]", "localhost", "::ffff:127.0.0.1"] {
            let found = bound(Protocol::Tcp, host).unwrap_or_else(|| panic!("{host}"));
            assert_eq!(found.address, IpAddr::V4(Ipv4Addr::LOCALHOST));
            assert_eq!(found.owner.map(|owner| owner.pid), Some(std::process::id() as i32));
        }
        for host in ["127.0.0.2", "::1", "name.invalid"] {
            assert_eq!(bound(Protocol::Tcp, host), None, "{host}");
        }
        assert_eq!(bound(Protocol::Udp, "127.0.0.1"), None);
        drop(listener);

        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let number = socket.local_addr().unwrap().port();
        for host in ["127.0.0.1", "", "name.invalid"] {
            assert!(bound_over(&port(Protocol::Udp, host, number)).unwrap().is_some(), "{host}");
        }
        assert_eq!(bound_over(&port(Protocol::Udp, "::1", number)).unwrap(), None);
    }

    #[test]
    fn connections_take_no_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let number = client.local_addr().unwrap().port();
        assert_eq!(bound_over(&port(Protocol::Tcp, "", number)).unwrap(), None);
    }

    #[test]
    fn addresses_are_read_in_either_family() {
        assert_eq!(address_of("0100007F"), Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        let loopback = "00000000000000000000000001000000";
        assert_eq!(address_of(loopback), Some(IpAddr::V6(Ipv6Addr::LOCALHOST)));
        let mapped = "0000000000000000FFFF00000100007F";
        assert_eq!(address_of(mapped), Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        for wrong in ["", "7F", "XX00007F", "ä000007", "0100007F0"] {
            assert_eq!(address_of(wrong), None);
        }
    }

    #[test]
    fn a_reserved_port_is_free_for_who_asks_for_it() {
        let reserved = reserve_port(&[]).unwrap();
        let number = reserved.number;
        assert_eq!(bound_over(&port(Protocol::Tcp, "", number)).unwrap(), None);
        assert_ne!(reserve_port(&[number]).unwrap().number, number);
        // The standard library sets SO_REUSEADDR, as QEMU does.
        for address in ["0.0.0.0", "127.0.0.1"] {
            TcpListener::bind((address, number)).unwrap();
        }
    }
}
