//! libvirt's domains.

pub mod definition;
pub mod sibling;
