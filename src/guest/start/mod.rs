//! How a recorded guest is started: [`rewrite`] turns its command line into a [`plan`] by
//! replacing [`paths`], resolving [`collisions`] with running processes, and where asked by
//! [`isolation`] from network and disks or by [`mapping`] its memory.

pub(super) mod collisions;
pub(super) mod isolation;
pub(super) mod mapping;
mod paths;
pub(super) mod plan;
pub(super) mod rewrite;
