//! A guest that is reached: by its QMP socket, or through libvirt.

use std::time::Duration;

use super::address::GuestAddress;
use super::error::SaveError;
use crate::libvirt::Domain;
use crate::qmp::Qmp;

/// How long QEMU may take to greet us.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a guest. It is stopped and let go by whoever is in charge of it, so that
/// libvirt knows.
#[derive(Debug, Clone)]
pub(super) struct Access {
    /// QEMU's monitor.
    pub qmp: Qmp,
    /// The domain, where the guest is libvirt's.
    pub domain: Option<Domain>,
}

impl Access {
    /// Connects. Waits for a libvirt that does not answer, for as long as `patience` lasts.
    pub async fn open(address: &GuestAddress, patience: Duration) -> Result<Access, SaveError> {
        match address {
            GuestAddress::Socket(path) => {
                let qmp = Qmp::connect(path, ANSWER_TIMEOUT).await?;
                Ok(Access { qmp, domain: None })
            }
            GuestAddress::Domain(address) => {
                let domain = Domain::open(address, patience).await?;
                Ok(Access { qmp: domain.monitor().await?, domain: Some(domain) })
            }
        }
    }

    /// Stops the guest.
    pub async fn stop(&self) -> Result<(), SaveError> {
        match &self.domain {
            Some(domain) => Ok(domain.suspend().await?),
            None => Ok(self.qmp.stop().await?),
        }
    }

    /// Lets the guest go. One that runs already goes on.
    pub async fn cont(&self) -> Result<(), SaveError> {
        let Some(domain) = &self.domain else { return Ok(self.qmp.cont().await?) };
        match domain.resume().await {
            // QEMU before 9.0 has let it go by itself, which libvirt may know already.
            Err(_) if self.qmp.status().await? == "running" => Ok(()),
            // libvirt may not know that it stands.
            Err(error) => self.qmp.cont().await.map_err(|_| error.into()),
            Ok(()) => Ok(()),
        }
    }
}
