//! The broker: a small process outside of the sandbox, which keeps the rights that a page server
//! in it has given up and still needs. They are named when it is started:
//!
//! - Files of the image, and its working set, are opened for reading once others have taken their
//!   places.
//! - The working set is replaced by another one.
//! - Memory of one QEMU is collapsed into huge pages, which takes the right to trace it
//!   (process_madvise(2)). What the memory holds stays the same.
//!
//! The broker reads no image and speaks to no QEMU. It does one thing at a time, none of which
//! takes long, and its server waits for an answer for a limited time. It ends when its connection
//! does.

mod client;
mod message;
mod run;

pub(super) use client::Broker;
pub use run::{Rights, run};
