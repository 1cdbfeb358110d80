//! What is kept, what goes, and whether all of it is whole.

pub mod check;
pub mod copy;
pub mod diff;
pub mod forget;
pub mod prune;
pub mod repack;
pub mod tag;
