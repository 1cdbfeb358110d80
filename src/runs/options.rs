//! How a revert is recorded.

use std::path::PathBuf;

use super::directory::new_id;
use super::{Again, OfPool};

/// How a revert is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunOptions {
    /// Its id: 8 hexadecimal digits that no other revert has.
    pub id: String,
    /// The log of its server, where its output goes to a file.
    pub log: Option<PathBuf>,
    /// How the same is done again, where a guest can't be reset inside its QEMU.
    pub again: Option<Again>,
    /// The pool that the guest belongs to: its record and its overlays go with it.
    pub pool: Option<OfPool>,
}

impl RunOptions {
    /// Records a revert under a new id.
    pub fn new() -> RunOptions {
        RunOptions { id: new_id(), log: None, again: None, pool: None }
    }
}

impl Default for RunOptions {
    fn default() -> RunOptions {
        RunOptions::new()
    }
}
