//! How a recorded guest is started again: its command line rewritten, what would collide
//! with living processes resolved or refused, cut off from the world, or its memory mapped.

pub(super) mod collisions;
pub(super) mod isolation;
pub(super) mod mapping;
mod paths;
pub(super) mod plan;
pub(super) mod rewrite;
