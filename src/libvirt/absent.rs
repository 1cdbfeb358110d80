//! In place of libvirt, in a program that was built without it.

use std::convert::Infallible;

use super::address::DomainAddress;
use super::error::LibvirtError;
use crate::qmp::Qmp;

/// A connection to a running domain: there is none without libvirt.
#[derive(Debug, Clone)]
pub struct Domain(Infallible);

impl Domain {
    /// Fails.
    ///
    /// # Errors
    /// [`LibvirtError::NotBuilt`].
    pub async fn open(_: &DomainAddress) -> Result<Domain, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Fails.
    ///
    /// # Errors
    /// [`LibvirtError::NotBuilt`].
    pub async fn create(_: DomainAddress, _: String, _: bool) -> Result<Domain, LibvirtError> {
        Err(LibvirtError::NotBuilt)
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub async fn resume(&self) -> Result<(), LibvirtError> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub async fn destroy(&self) -> Result<(), LibvirtError> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn destroy_now(&self) -> Result<(), LibvirtError> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub async fn define(&self, _: String) -> Result<(), LibvirtError> {
        match self.0 {}
    }

    /// Never called.
    pub fn name(&self) -> &str {
        match self.0 {}
    }

    /// Never called.
    pub fn uuid(&self) -> &str {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub async fn monitor(&self) -> Result<Qmp, LibvirtError> {
        match self.0 {}
    }
}
