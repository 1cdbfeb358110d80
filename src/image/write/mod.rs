//! The writing side of images.

pub(super) mod dedupe;
pub(super) mod delta;
pub(super) mod every_page;
pub(super) mod flat;
pub(super) mod flatten;
pub(super) mod index;
pub(super) mod options;
pub(super) mod pack;
pub(super) mod parent;
pub(super) mod pipeline;
pub(super) mod sink;
pub(super) mod skeleton;
pub(super) mod tail;
pub(super) mod target;
pub(super) mod writer;
