//! Domains of libvirt: QEMUs whose monitor libvirt holds.
//!
//! A [`Domain`] is a connection to one running domain, by libvirt's own library (the feature
//! `libvirt`). [`Domain::monitor`] talks QMP to its QEMU through libvirt. Should the connection
//! break, as when libvirtd is restarted, it is made anew by whoever needs it next.
//!
//! A saved domain is started again by a [`DomainPlan`]: its definition, changed as a tree of XML.

mod address;
mod definition;
mod disk;
mod error;
mod launch;
mod options;
mod plan;
mod sibling;
mod stand_in;

#[cfg(not(feature = "libvirt"))]
mod absent;
#[cfg(feature = "libvirt")]
mod calls;
#[cfg(feature = "libvirt")]
mod connection;
#[cfg(feature = "libvirt")]
mod domain;
#[cfg(feature = "libvirt")]
mod event_loop;
#[cfg(feature = "libvirt")]
mod events;
#[cfg(feature = "libvirt")]
mod link;
#[cfg(feature = "libvirt")]
mod monitor;
#[cfg(feature = "libvirt")]
mod own_ways;
#[cfg(feature = "libvirt")]
mod process;
#[cfg(feature = "libvirt")]
mod start;
#[cfg(feature = "libvirt")]
mod xml;

pub use address::DomainAddress;
pub use definition::{Definition, DefinitionError};
pub use disk::DomainDisk;
pub use error::LibvirtError;
pub use launch::{LaunchError, StartedDomain};
pub use options::DomainOptions;
pub use plan::{DomainPlan, PlanError, block_name, restorable, without_our_arguments};
pub use stand_in::remove_stand_ins;

#[cfg(not(feature = "libvirt"))]
pub use absent::{Domain, PATIENCE};
#[cfg(feature = "libvirt")]
pub use domain::Domain;
#[cfg(feature = "libvirt")]
pub use link::PATIENCE;
