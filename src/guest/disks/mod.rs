//! A guest's disks: what it has attached, how files are recognised that were frozen with
//! it, and the overlays that keep them as they are.

pub(super) mod attached;
pub(super) mod captured;
pub(super) mod drives;
pub(super) mod frozen;
pub(super) mod overlay;
pub(super) mod stamp;
