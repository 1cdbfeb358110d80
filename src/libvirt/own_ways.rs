//! libvirt's own ways of bringing a domain back, and the end of one that was made for them.

use virt::connect::Connect;
use virt::domain::Domain as VirtDomain;
use virt::error::Error;
use virt::sys;

use super::address::DomainAddress;
use super::calls;
use super::connection;
use super::definition::Definition;
use super::domain::{Domain, on_a_thread};
use super::error::LibvirtError;
use super::link::{Link, refused};

/// An internal snapshot of that name: memory and disks, in the domain's disks.
fn snapshot_xml(name: &str) -> String {
    format!("<domainsnapshot><name>{name}</name></domainsnapshot>")
}

impl Domain {
    /// Saves the domain to a file and ends it (`virsh save --xml`). The file holds the definition
    /// `xml`.
    ///
    /// # Errors
    /// See [`LibvirtError`]; so for all here.
    pub async fn save_to(&self, file: String, xml: String) -> Result<(), LibvirtError> {
        self.call("saving the domain", move |domain| calls::save(domain, &file, &xml)).await
    }

    /// Brings a saved domain back (`virsh restore`).
    pub async fn restore(address: DomainAddress, file: String) -> Result<Domain, LibvirtError> {
        let restore = move || {
            let connect = connection::open(address.uri.as_deref())?;
            let restored = connect.restore_domain(&file);
            restored.map_err(|error| refused("restoring the domain", error))?;
            found(connect, address)
        };
        Ok(Domain::of(on_a_thread(restore).await?))
    }

    /// Takes an internal snapshot (`virsh snapshot-create-as`).
    pub async fn take_snapshot(&self, name: &'static str) -> Result<(), LibvirtError> {
        self.call("taking an internal snapshot", move |domain| {
            domain.create_snapshot_xml(&snapshot_xml(name), 0).map(drop)
        })
        .await
    }

    /// Starts a domain that is shut off from its internal snapshot (`virsh snapshot-revert`).
    pub async fn revert_to_snapshot(
        address: DomainAddress,
        name: &'static str,
    ) -> Result<Domain, LibvirtError> {
        let revert = move || {
            let connect = connection::open(address.uri.as_deref())?;
            let domain = connect.lookup_domain_by_name(&address.domain);
            let snapshot =
                domain.and_then(|domain| VirtDomain::lookup_snapshot_by_name(&domain, name, 0));
            let running = sys::VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING;
            let reverted = snapshot.and_then(|snapshot| snapshot.revert(running));
            reverted.map_err(|error| refused("reverting to an internal snapshot", error))?;
            found(connect, address)
        };
        Ok(Domain::of(on_a_thread(revert).await?))
    }

    /// Ends the domain of this name, if there is one, and has libvirt forget it. Its files that are
    /// called after it go too. Blocks.
    pub fn remove_now(address: &DomainAddress) -> Result<(), LibvirtError> {
        let connect = connection::open(address.uri.as_deref())?;
        let Ok(domain) = connect.lookup_domain_by_name(&address.domain) else { return Ok(()) };
        remove(&domain, &address.domain).map_err(|error| refused("removing the domain", error))
    }
}

/// The domain of that name, which runs.
fn found(connect: Connect, address: DomainAddress) -> Result<Link, LibvirtError> {
    let domain = connect.lookup_domain_by_name(&address.domain);
    let domain = domain.map_err(|error| refused("looking at the domain", error))?;
    Link::over(connect, domain, address.uri)
}

fn remove(domain: &VirtDomain, name: &str) -> Result<(), Error> {
    let xml = domain.xml_desc(0)?;
    if domain.is_active()? {
        domain.destroy()?;
    }
    // A transient one is gone by now.
    if domain.is_persistent().unwrap_or(false) {
        let all = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
        domain.undefine_flags(all)?;
    }
    let files = Definition::parse(&xml).map(|mut domain| domain.files_called_after(name));
    for path in files.unwrap_or_default() {
        // Sockets are gone with QEMU, and other files may never have been made.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
