//! The reverts of this user that are under way: each has a record in a private directory, from
//! the start of its QEMU until it depends on nobody any more.
//!
//! ```text
//! $XDG_RUNTIME_DIR/snapback/     or /run/snapback of root, or snapback-UID in the temporary directory
//!     1f0c92ab/                  one revert, by its id
//!         state.json             its processes, its image, and what it leaves when all are killed
//!     1f0c92ab.log               the log of its server, if that runs in the background
//! ```
//!
//! [`list()`] and [`find()`] read them, [`Run::stop`] ends a guest with its server, and
//! [`left_overs()`] finds what killed processes have left.
//!
//! A process is known by its number and the time of its start, since numbers are used again.
//! How far memory has come is read from the ledger, which the server and its keeper have open.

mod directory;
mod entry;
mod error;
mod left_over;
mod record;
mod run;
mod stop;

pub(crate) use directory::{log_of, new_id};
pub(crate) use entry::Entry;
pub use error::RunsError;
pub use left_over::{LeftOver, LeftOverKind, left_overs};
pub(crate) use record::{ProcessId, Record};
pub(crate) use run::keep_overlays;
pub use run::{Run, find, list};
pub use stop::Stopped;

use std::path::PathBuf;

/// How a revert is recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunOptions {
    /// Its id: 8 hexadecimal digits that no other revert has.
    pub id: String,
    /// The log of its server, where its output goes to a file.
    pub log: Option<PathBuf>,
}

impl RunOptions {
    /// Records a revert under a new id.
    pub fn new() -> RunOptions {
        RunOptions { id: new_id(), log: None }
    }
}

impl Default for RunOptions {
    fn default() -> RunOptions {
        RunOptions::new()
    }
}
