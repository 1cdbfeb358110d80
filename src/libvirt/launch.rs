//! A domain that libvirt starts for a guest to be brought back.

use super::Domain;
use super::error::LibvirtError;
use super::plan::DomainPlan;
use super::stand_in::Standing;
use crate::guest::{GuestError, Overlays};
use crate::qmp::Qmp;

/// Why a domain could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// libvirt can't, or does not want to.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The overlays of its disks can't be created.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// A domain that was started, and whose QEMU waits for its guest's state. Dropping it ends the
/// domain, unless it has been let go; the overlays that were made for it go too, unless they are
/// kept.
#[derive(Debug)]
pub struct StartedDomain {
    domain: Domain,
    pid: i32,
    overlays: Overlays,
    memory: Option<Standing>,
    /// The definition to keep.
    persistent: Option<String>,
    ended: bool,
}

impl StartedDomain {
    /// Has libvirt start a domain as planned, paused, and speaks to its QEMU through libvirt. A
    /// running domain of that name is ended first, where the plan says so.
    ///
    /// # Errors
    /// When libvirt does not start it. Nothing is left then.
    pub async fn start(plan: DomainPlan) -> Result<(StartedDomain, Qmp), LaunchError> {
        let overlays = Overlays::named(&plan.overlays)?;
        let address = plan.domain();
        let DomainPlan { xml, persistent, replace, memory, .. } = plan;
        let memory = memory.map(Standing::make).transpose()?;
        let domain = Domain::create(address, xml, replace).await?;
        let mut started =
            StartedDomain { domain, pid: 0, overlays, memory, persistent, ended: false };
        // QEMU has opened the image by now.
        if let Some(memory) = &started.memory {
            memory.empty()?;
        }
        let qmp = started.domain.monitor().await?;
        started.pid = qmp.peer_pid().unwrap_or_default();
        Ok((started, qmp))
    }

    /// The process id of its QEMU.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Has libvirt run its guest.
    ///
    /// # Errors
    /// When libvirt refuses or fails.
    pub async fn resume(&self) -> Result<(), LibvirtError> {
        self.domain.resume().await
    }

    /// Makes the planned definition the domain's persistent one, where there is one.
    ///
    /// # Errors
    /// When libvirt refuses or fails.
    pub async fn define(&mut self) -> Result<(), LibvirtError> {
        match self.persistent.take() {
            Some(xml) => self.domain.define(xml).await,
            None => Ok(()),
        }
    }

    /// Keeps the overlays of its disks, since a guest has written to them.
    pub fn keep_overlays(&mut self) {
        self.overlays.keep();
        self.memory.iter_mut().for_each(Standing::keep);
    }

    /// Ends it, without asking the guest.
    pub async fn end(&mut self) {
        self.ended = true;
        if let Err(error) = self.domain.destroy().await {
            tracing::warn!("the domain {} was not ended: {error}", self.domain.name());
        }
    }

    /// Lets it live on, as one of libvirt's.
    pub fn let_go(&mut self) {
        self.ended = true;
        self.keep_overlays();
    }
}

impl Drop for StartedDomain {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = self.domain.destroy_now()
        {
            tracing::warn!("the domain {} was not ended: {error}", self.domain.name());
        }
    }
}
