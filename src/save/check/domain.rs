//! What libvirt says of a domain.

use crate::libvirt::{Domain, DomainDisk};
use crate::save::error::SaveError;

/// A domain as libvirt describes it.
#[derive(Default)]
pub(super) struct Described {
    /// Its XML as it runs, as libvirt would migrate it.
    pub live: Option<String>,
    /// Its definition, where it has one.
    pub persistent: Option<String>,
    pub disks: Vec<DomainDisk>,
}

impl Described {
    pub async fn read(domain: &Domain) -> Result<(Described, String), SaveError> {
        let persistent = domain.persistent_xml().await?;
        let kind = match persistent {
            Some(_) => "persistent",
            None => "transient",
        };
        let says = format!("domain {} ({}), {kind}", domain.name(), domain.uuid());
        let live = Some(domain.live_xml().await?);
        Ok((Described { live, persistent, disks: domain.disks().await? }, says))
    }
}
