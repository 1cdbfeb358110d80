//! Which domain is meant.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A domain, and the libvirt that has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DomainAddress {
    /// Its name or UUID.
    pub domain: String,
    /// The connection URI, such as `qemu:///system` (<https://libvirt.org/uri.html>). None for
    /// the one that `virsh` takes by default.
    pub uri: Option<String>,
}

impl DomainAddress {
    /// The domain of this name or UUID, at the default connection.
    pub fn new(domain: impl Into<String>) -> DomainAddress {
        DomainAddress { domain: domain.into(), uri: None }
    }
}

impl fmt::Display for DomainAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.uri {
            Some(uri) => write!(f, "{} at {uri}", self.domain),
            None => f.write_str(&self.domain),
        }
    }
}
