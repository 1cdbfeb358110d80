//! The reverts of this user that are under way: each has a record in a private directory, from
//! the start of its QEMU until it depends on nobody any more. So has a guest that was saved and can
//! be reset, for as long as its writes are tracked.
//!
//! ```text
//! $XDG_RUNTIME_DIR/snapback/     or /run/snapback of root, or snapback-UID in the temporary directory
//!     1f0c92ab/                  one revert, by its id
//!         reset.sock             where its reset is asked for, if it can be reset
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
mod options;
mod record;
mod reset;
mod run;
mod stop;

pub use crate::reset::ResetOutcome;
pub(crate) use directory::{base, log_of, new_id};
pub(crate) use entry::{Entry, Notes};
pub use error::RunsError;
pub use left_over::{LeftOver, LeftOverKind, left_overs};
pub use options::RunOptions;
pub use record::{Again, OfPool};
pub(crate) use record::{ProcessId, Record};
pub(crate) use reset::{Tracking, is_tracked, stop_tracking};
pub use run::{Run, find, list};
pub(crate) use run::{directory_of, keep_overlays, of_qemu};
pub use stop::Stopped;
