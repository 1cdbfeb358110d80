//! A running domain, for asynchronous code: libvirt's calls block, and run on threads of their
//! own.

use std::sync::Arc;
use std::time::Duration;

use virt::error::Error;
use virt::sys;

use super::address::DomainAddress;
use super::disk::DomainDisk;
use super::error::LibvirtError;
use super::link::{Link, PATIENCE};
use super::monitor::Monitor;
use super::{calls, process, xml};
use crate::qmp::{DEFAULT_TIMEOUT, Qmp};

/// How often a commit is asked whether it is done.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// A connection to a running domain. Clones share it.
#[derive(Debug, Clone)]
pub struct Domain {
    link: Arc<Link>,
}

impl Domain {
    /// Connects to a domain that runs. Waits for a libvirt that does not answer, for as long as
    /// `patience` lasts.
    ///
    /// # Errors
    /// See [`LibvirtError`]; so for all methods. [`LibvirtError::Lost`] leaves unknown whether
    /// something was done.
    pub async fn open(address: &DomainAddress, patience: Duration) -> Result<Domain, LibvirtError> {
        let address = address.clone();
        let link = on_a_thread(move || Link::open(&address, patience)).await?;
        Ok(Domain::of(link))
    }

    pub(super) fn of(link: Link) -> Domain {
        Domain { link: Arc::new(link) }
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.link.name()
    }

    /// Its UUID.
    pub fn uuid(&self) -> &str {
        self.link.uuid()
    }

    /// Talks to its QEMU through libvirt.
    ///
    /// # Errors
    /// [`LibvirtError::NoProcess`] when QEMU does not run on this host, and QEMU's own.
    pub async fn monitor(&self) -> Result<Qmp, LibvirtError> {
        let link = self.link.clone();
        let pid = on_a_thread(move || process::find(&link)).await?;
        let monitor = Monitor::start(self.link.clone())
            .map_err(|error| LibvirtError::Thread(error.to_string()))?;
        let inbox = self.link.inbox().clone();
        let qmp = Qmp::over_transport(Box::new(monitor), inbox, pid).await?;
        // A command may have to wait until libvirtd is back.
        Ok(qmp.with_timeout(PATIENCE + DEFAULT_TIMEOUT))
    }

    /// The domain as it runs, in the form in which it can be started elsewhere
    /// (`virsh dumpxml --migratable --security-info`).
    pub async fn live_xml(&self) -> Result<String, LibvirtError> {
        let flags = sys::VIR_DOMAIN_XML_MIGRATABLE | sys::VIR_DOMAIN_XML_SECURE;
        self.ask("reading the domain's XML", move |domain| domain.xml_desc(flags)).await
    }

    /// The domain as it will be after its next start (`virsh dumpxml --inactive
    /// --security-info`). None where it is transient.
    pub async fn persistent_xml(&self) -> Result<Option<String>, LibvirtError> {
        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
        self.ask("reading the domain's definition", move |domain| match domain.is_persistent()? {
            true => domain.xml_desc(flags).map(Some),
            false => Ok(None),
        })
        .await
    }

    /// Its disks as it runs.
    pub async fn disks(&self) -> Result<Vec<DomainDisk>, LibvirtError> {
        let xml = self.ask("reading the domain's disks", |domain| domain.xml_desc(0)).await?;
        Ok(xml::disks(&xml))
    }

    /// Its disks as its definition has them; none of a transient domain.
    pub async fn persistent_disks(&self) -> Result<Vec<DomainDisk>, LibvirtError> {
        Ok(self.persistent_xml().await?.map(|xml| xml::disks(&xml)).unwrap_or_default())
    }

    /// Whether an agent in the guest has its channel to libvirt open.
    pub async fn agent_is_connected(&self) -> Result<bool, LibvirtError> {
        let xml = self.ask("reading the domain's channels", |domain| domain.xml_desc(0)).await?;
        Ok(xml::agent_is_connected(&xml))
    }

    /// Pauses the guest.
    pub async fn suspend(&self) -> Result<(), LibvirtError> {
        self.call("suspending the domain", |domain| domain.suspend()).await
    }

    /// Lets the guest run.
    pub async fn resume(&self) -> Result<(), LibvirtError> {
        self.call("resuming the domain", |domain| domain.resume()).await
    }

    /// Puts qcow2 files that exist over disks, all or none: each by the disk's target and the
    /// file. The other disks, `others`, stay as they are.
    pub async fn put_overlays(
        &self,
        overlays: &[(String, String)],
        others: &[String],
    ) -> Result<(), LibvirtError> {
        let xml = xml::disk_snapshot(overlays, others);
        let flags = sys::VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | sys::VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | sys::VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | sys::VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT;
        self.call("switching the disks to their overlays", move |domain| {
            domain.create_snapshot_xml(&xml, flags).map(drop)
        })
        .await
    }

    /// Whether a block job of this disk is under way.
    pub async fn has_block_job(&self, target: &str) -> Result<bool, LibvirtError> {
        Ok(self.block_job(target).await?.is_some())
    }

    /// Begins to commit a disk's topmost file into the one below.
    pub async fn begin_commit(&self, target: &str) -> Result<(), LibvirtError> {
        let target = target.to_owned();
        self.call("committing an overlay", move |domain| calls::begin_commit(domain, &target)).await
    }

    /// Waits for the end of a commit that has begun: the guest goes on in the file below then.
    pub async fn end_commit(&self, target: &str) -> Result<(), LibvirtError> {
        let doing = "ending the commit of an overlay";
        loop {
            match self.block_job(target).await? {
                // Both are 0 before it has begun.
                Some((done, all)) if done < all || all == 0 => {}
                Some(_) => {
                    let name = target.to_owned();
                    let pivoted = self.call(doing, move |domain| calls::pivot(domain, &name)).await;
                    match pivoted {
                        // QEMU has not said yet that the job is ready.
                        Err(LibvirtError::Refused { reason, .. })
                            if reason.contains("not ready") => {}
                        pivoted => return pivoted,
                    }
                }
                None => {
                    let reason = "libvirt has no such job any more".to_owned();
                    return Err(LibvirtError::Refused { doing: doing.into(), reason });
                }
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Has the guest's agent freeze all file systems, and returns how many they are.
    pub async fn freeze(&self) -> Result<u64, LibvirtError> {
        self.call("freezing the guest's file systems", calls::freeze).await
    }

    /// Has the guest's agent thaw all file systems.
    pub async fn thaw(&self) -> Result<(), LibvirtError> {
        self.call("thawing the guest's file systems", calls::thaw).await
    }

    async fn block_job(&self, target: &str) -> Result<Option<(u64, u64)>, LibvirtError> {
        let target = target.to_owned();
        self.ask("asking for block jobs", move |domain| calls::block_job(domain, &target)).await
    }

    /// As [`Link::ask`].
    async fn ask<T: Send + 'static>(
        &self,
        doing: &'static str,
        question: impl Fn(&virt::domain::Domain) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let link = self.link.clone();
        on_a_thread(move || link.ask(doing, question)).await
    }

    /// As [`Link::call`].
    pub(super) async fn call<T: Send + 'static>(
        &self,
        doing: &'static str,
        call: impl FnOnce(&virt::domain::Domain) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let link = self.link.clone();
        on_a_thread(move || link.call(doing, call)).await
    }
}

/// Runs what blocks on a thread for that.
pub(super) async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LibvirtError> + Send + 'static,
) -> Result<T, LibvirtError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(LibvirtError::Thread(error.to_string())),
    }
}
