//! Which guest is meant.

use std::path::PathBuf;

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

impl<P: Into<PathBuf>> From<P> for GuestAddress {
    fn from(socket: P) -> GuestAddress {
        GuestAddress::Socket(socket.into())
    }
}

impl From<DomainAddress> for GuestAddress {
    fn from(domain: DomainAddress) -> GuestAddress {
        GuestAddress::Domain(domain)
    }
}
