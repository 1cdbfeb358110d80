//! Files cut into extents, and pushed.

pub mod archive;
pub mod commit;
pub mod cut;
pub mod known;
pub mod packer;
pub mod push;
pub mod source;
