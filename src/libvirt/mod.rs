//! libvirt's domains.

pub mod definition;
pub mod options;
pub mod plan;
pub mod sibling;
