//! Bringing a saved guest back: QEMU starts with device state only, the guest runs
//! at once, and its memory follows.
//!
//! [`revert()`] and [`serve()`] go all the way. Both are a [`session`] of explicit states,
//! which can also be gone through one by one: to hold a guest in standby, for example.

mod broker;
mod cards;
mod clones;
mod collapse;
mod eager;
mod error;
mod event;
mod far;
mod first_breath;
mod follow_error;
mod following;
mod harvest;
mod journey;
mod kept;
mod mapping;
mod options;
mod outcome;
mod prove;
mod recorded;
mod resume;
mod rtc;
mod serve;
pub mod session;
mod source;
mod takeover;
mod unreadable;

pub use broker::{Rights, run as run_broker};
pub(crate) use cards::Unplugged;
pub use clones::CloneIdentity;
pub(crate) use clones::environment;
pub use error::{PostcopyError, RevertError};
pub use event::{Progress, RevertEvent, Unreadable};
pub(crate) use first_breath::FirstBreath;
pub use follow_error::FollowError;
pub use harvest::harvest;
pub(crate) use journey::Clone;
pub use journey::{Reverted, revert, revert_held, revert_resettable};
pub use options::{
    AgentOptions, Delivery, Orphan, Placement, Preload, ResumeOptions, RevertOptions, ServeOptions,
    Target,
};
pub use outcome::Outcome;
pub use prove::prove;
pub use resume::resume;
pub use rtc::Rtc;
pub use serve::serve;
pub use session::Held;
pub use takeover::take_over;

pub use crate::reset::ResetWay;
pub use crate::transport::proof::AttachError;
