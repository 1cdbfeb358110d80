//! Domains started, run and ended by libvirt.

use virt::connect::Connect;
use virt::domain::Domain as VirtDomain;
use virt::sys;

use super::address::DomainAddress;
use super::connection;
use super::domain::{Domain, on_a_thread};
use super::error::LibvirtError;
use super::link::{Link, refused};

impl Domain {
    /// Has libvirt start a domain of this definition, whose guest stays paused. `address` names
    /// it. A domain that has a persistent definition keeps that. One of the name that runs is
    /// ended first with `replace`.
    ///
    /// # Errors
    /// See [`LibvirtError`]; [`LibvirtError::Runs`] without `replace`.
    pub async fn create(
        address: DomainAddress,
        xml: String,
        replace: bool,
    ) -> Result<Domain, LibvirtError> {
        let start = move || {
            let connect = connection::open(address.uri.as_deref())?;
            make_room(&connect, &address.domain, replace)?;
            let domain = connect
                .create_domain_xml(&xml, sys::VIR_DOMAIN_START_PAUSED)
                .map_err(|error| refused("starting the domain", error))?;
            let end = domain.clone();
            Link::over(connect, domain, address.uri).inspect_err(|_| drop(end.destroy()))
        };
        Ok(Domain::of(on_a_thread(start).await?))
    }

    /// Ends the domain, without asking its guest. One that has ended is left.
    ///
    /// # Errors
    /// See [`LibvirtError`].
    pub async fn destroy(&self) -> Result<(), LibvirtError> {
        let domain = self.clone();
        on_a_thread(move || domain.destroy_now()).await
    }

    /// As [`destroy`](Domain::destroy); blocks.
    ///
    /// # Errors
    /// See [`LibvirtError`].
    pub fn destroy_now(&self) -> Result<(), LibvirtError> {
        match self.link().call("ending the domain", VirtDomain::destroy) {
            Ok(()) | Err(LibvirtError::ShutOff { .. } | LibvirtError::NoDomain { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes this its persistent definition, from its next start on.
    ///
    /// # Errors
    /// See [`LibvirtError`].
    pub async fn define(&self, xml: String) -> Result<(), LibvirtError> {
        self.call("defining the domain", move |domain| {
            domain.connect()?.define_domain_xml(&xml).map(drop)
        })
        .await
    }
}

/// Sees to it that no domain of the name runs.
fn make_room(connect: &Connect, name: &str, replace: bool) -> Result<(), LibvirtError> {
    // There may be none, and one that ends by itself meanwhile is as good.
    let Ok(domain) = connect.lookup_domain_by_name(name) else { return Ok(()) };
    if !domain.is_active().unwrap_or(false) {
        return Ok(());
    }
    if !replace {
        return Err(LibvirtError::Runs { domain: name.to_owned() });
    }
    match domain.destroy() {
        Err(error) if domain.is_active().unwrap_or(false) => {
            Err(refused("ending the domain that runs", error))
        }
        _ => Ok(()),
    }
}
