//! Which guest is meant.

use std::path::{Path, PathBuf};

use crate::libvirt::DomainAddress;

/// How a guest's QEMU is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestAddress {
    /// By a QMP socket of its own.
    Socket(PathBuf),
    /// Through libvirt, whose domain it is.
    Domain(DomainAddress),
}

impl From<PathBuf> for GuestAddress {
    fn from(socket: PathBuf) -> GuestAddress {
        GuestAddress::Socket(socket)
    }
}

impl From<&PathBuf> for GuestAddress {
    fn from(socket: &PathBuf) -> GuestAddress {
        GuestAddress::Socket(socket.clone())
    }
}

impl From<&Path> for GuestAddress {
    fn from(socket: &Path) -> GuestAddress {
        GuestAddress::Socket(socket.to_owned())
    }
}

impl From<&str> for GuestAddress {
    fn from(socket: &str) -> GuestAddress {
        GuestAddress::Socket(socket.into())
    }
}

impl From<String> for GuestAddress {
    fn from(socket: String) -> GuestAddress {
        GuestAddress::Socket(socket.into())
    }
}

impl From<DomainAddress> for GuestAddress {
    fn from(domain: DomainAddress) -> GuestAddress {
        GuestAddress::Domain(domain)
    }
}
