//! In place of libvirt, in a program that was built without it: a [`Domain`] that can't be had, with
//! the methods of the one that can (`domain.rs`).

use std::convert::Infallible;
use std::time::Duration;

use super::address::DomainAddress;
use super::disk::DomainDisk;
use super::error::LibvirtError;
use crate::qmp::Qmp;

/// There is nothing to wait for.
pub const PATIENCE: Duration = Duration::ZERO;

/// A connection to a running domain: there is none without libvirt.
#[derive(Debug, Clone)]
pub struct Domain(Infallible);

impl Domain {
    /// Fails.
    ///
    /// # Errors
    /// [`LibvirtError::NotBuilt`].
    pub async fn open(_: &DomainAddress, _: Duration) -> Result<Domain, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Fails.
    ///
    /// # Errors
    /// [`LibvirtError::NotBuilt`].
    pub async fn create(_: DomainAddress, _: String, _: bool) -> Result<Domain, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Fails.
    ///
    /// # Errors
    /// [`LibvirtError::NotBuilt`].
    pub async fn restore(_: DomainAddress, _: String) -> Result<Domain, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Fails.
    ///
    /// # Errors
    /// [`LibvirtError::NotBuilt`].
    pub async fn revert_to_snapshot(
        _: DomainAddress,
        _: &'static str,
    ) -> Result<Domain, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// There is none.
    ///
    /// # Errors
    /// None.
    pub fn remove_now(_: &DomainAddress) -> Result<(), LibvirtError> {
        Ok(())
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn destroy_now(&self) -> Result<(), LibvirtError> {
        match self.0 {}
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self.0 {}
    }

    /// Its UUID.
    pub fn uuid(&self) -> &str {
        match self.0 {}
    }
}

/// Makes methods that are never called.
macro_rules! methods {
    ($($name:ident($($argument:ty),*) -> $result:ty;)*) => {
        impl Domain {
            $(
                /// Never called.
                #[allow(clippy::missing_errors_doc)]
                pub async fn $name(&self, $(_: $argument),*) -> Result<$result, LibvirtError> {
                    match self.0 {}
                }
            )*
        }
    };
}

methods! {
    monitor() -> Qmp;
    live_xml() -> String;
    persistent_xml() -> Option<String>;
    disks() -> Vec<DomainDisk>;
    persistent_disks() -> Vec<DomainDisk>;
    agent_is_connected() -> bool;
    suspend() -> ();
    resume() -> ();
    destroy() -> ();
    define(String) -> ();
    put_overlays(&[(String, String)], &[String]) -> ();
    has_block_job(&str) -> bool;
    begin_commit(&str) -> ();
    end_commit(&str) -> ();
    save_to(String, String) -> ();
    take_snapshot(&'static str) -> ();
    freeze() -> u64;
    thaw() -> ();
}
