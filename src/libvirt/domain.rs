//! A running domain, for asynchronous code: libvirt's calls block, and run on threads of their
//! own.

use std::sync::Arc;

use super::address::DomainAddress;
use super::error::LibvirtError;
use super::link::{Link, PATIENCE};
use super::monitor::Monitor;
use super::process;
use crate::qmp::{DEFAULT_TIMEOUT, Qmp};

/// A connection to a running domain. Clones share it.
#[derive(Debug, Clone)]
pub struct Domain {
    link: Arc<Link>,
}

impl Domain {
    /// Connects to a domain that runs.
    ///
    /// # Errors
    /// See [`LibvirtError`].
    pub async fn open(address: &DomainAddress) -> Result<Domain, LibvirtError> {
        let address = address.clone();
        let link = on_a_thread(move || Link::open(&address)).await?;
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
