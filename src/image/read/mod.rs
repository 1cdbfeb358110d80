//! The reading side of images.

pub(super) mod cursor;
pub(super) mod exposure;
pub(super) mod flat;
mod frame;
pub(super) mod image;
pub(super) mod layer;
pub(super) mod lineage;
pub(super) mod table;
pub(super) mod verify;
