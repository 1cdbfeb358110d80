//! Which libvirt starts a guest, and as which domain.

/// A revert under libvirt.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct DomainOptions {
    /// The libvirt, as `qemu:///system`. Without, the one that its user uses by default
    /// (<https://libvirt.org/uri.html>).
    pub uri: Option<String>,
    /// The name or UUID that the saved domain must have. Without, it may have any.
    pub domain: Option<String>,
    /// Start a sibling of the saved domain, of this name: its UUID, the addresses of its network
    /// cards, its sockets, log files and ports are its own.
    pub sibling: Option<String>,
    /// End a running domain of that name first.
    pub replace: bool,
    /// Make the saved definition the domain's persistent one once it runs.
    pub define: bool,
}

impl DomainOptions {
    /// Starts the saved domain, whatever it is called, under the default libvirt.
    pub fn new() -> DomainOptions {
        DomainOptions::default()
    }
}
