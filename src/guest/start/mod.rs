//! How a recorded guest is started: [`rewrite`] turns its command line into a [`plan`] by
//! replacing [`paths`], [`ports`] and [`netdevs`], resolving [`collisions`] with running
//! processes and in the [`network`], keeping [`logs`], and where asked by moving things to a place of
//! their [`own`], by [`isolation`] from network and disks or by [`mapping`] its memory. What it [`needs`] of
//! its host can be read from it beforehand; a
//! [`profile`] is what differs at another site.

pub(super) mod collisions;
mod identity;
pub(super) mod isolation;
mod logs;
pub(super) mod mapping;
pub(super) mod needs;
mod netdevs;
mod network;
pub(super) mod own;
pub(super) mod paths;
pub(super) mod plan;
pub(super) mod ports;
pub(super) mod profile;
pub(super) mod reach;
pub(super) mod rewrite;
