//! The bytes of an image: where each part lies, what the manifest says, and what can be
//! wrong with them. No I/O.

pub(super) mod error;
pub(super) mod flat;
pub(super) mod layout;
pub(super) mod manifest;
