//! A disk as libvirt knows it.

/// A disk of a domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainDisk {
    /// libvirt's name of it, such as `vda`.
    pub target: String,
    /// The id of its device in QEMU, where the domain runs.
    pub alias: Option<String>,
    /// The file or block device on top.
    pub source: Option<String>,
    /// The files below, as far as libvirt lists them.
    pub below: Vec<String>,
}
