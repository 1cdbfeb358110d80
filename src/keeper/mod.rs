//! The keeper: a small second process that holds what must not die with a page server, and
//! starts another server when the first is killed.
//!
//! Between "running" and "resident" a guest depends on its server. What makes the server
//! replaceable is a handful of descriptors and a memory of who brings which page. The server
//! hands all of that to its keeper ([`Keeper::hold`]) as it comes by it. The keeper
//! ([`run`]) sleeps until the server has ended. If the server did not say that it ends, the
//! keeper starts another ([`Inheritance`]) with everything that it holds. When it is the keeper
//! that dies, the server starts another keeper.
//!
//! The keeper of a save ([`clean_up`]) holds the end of its stream, and starts what cleans up.
//!
//! The state that is handed on lies in the [`Ledger`], in shared memory. The keeper knows
//! nothing of images, and of QEMU only the process to end when no server can be had.

mod clean_up;
mod client;
mod inheritance;
mod ledger;
mod process;
mod protocol;
mod restarts;
mod run;

pub use clean_up::clean_up;
pub use client::{Holder, Keeper, Successor, if_started};
pub use inheritance::Inheritance;
pub use ledger::{Figures, Ledger};
pub use protocol::Held;
#[cfg(feature = "internals")]
pub use protocol::Message;
pub use run::run;
