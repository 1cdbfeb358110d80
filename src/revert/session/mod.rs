//! A revert is a session that goes through five states, one type each:
//!
//! | state | the guest | what has been done |
//! |---|---|---|
//! | [`Planned`] | not there | the command line is rewritten, nothing is touched |
//! | [`Launched`] | not there | QEMU's QMP answers |
//! | [`Armed`] | stands still, or is about to run | device state is given, faults are served |
//! | [`Running`] | runs | memory follows |
//! | [`Resident`] | runs | all memory is in place, the guest depends on nobody |
//!
//! One that is to be reset inside its QEMU goes on to a sixth, [`Resettable`].
//!
//! Memory that is mapped, or comes eagerly, is in place before the guest runs: nothing of it
//! follows, and a guest in standby has all of it when it is armed.
//!
//! Each state is left by a method that consumes it and gives the next. One that fails ends
//! the session: a QEMU of ours is ended, somebody else's is left to its owner.
//!
//! A session is entered by [`Planned::new`], which leads to a QEMU of ours or to a domain that
//! libvirt starts in our place, or by
//! [`Launched::outside`] with a QEMU that somebody else has started. It can be held in
//! [`Armed`] ([`RevertOptions::standby`](super::RevertOptions::standby)).

// What QEMU and the postcopy source report is turned into the next state in one place:
// `lifecycle`.

mod adopted;
mod armed;
mod away;
mod confined;
mod connection;
mod contents;
mod halt;
mod inherited;
mod launched;
mod launcher;
mod lifecycle;
mod open_image;
mod orphaned;
mod planned;
mod preparation;
mod qemu;
mod reconnect;
mod reports;
mod resettable;
mod resident;
mod running;

pub use crate::reset::Reset;
pub use armed::Armed;
pub(in crate::revert) use inherited::{Inherited, Stage};
pub use launched::Launched;
pub(crate) use open_image::OpenImage;
pub use planned::Planned;
pub use resettable::{NotResettable, Resettable};
pub use resident::{Held, Resident};
pub use running::Running;
