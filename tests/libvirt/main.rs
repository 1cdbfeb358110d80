//! Guests of stock libvirt, saved and reverted by the program itself: libvirtd and QEMU as Debian
//! ships them.
//!
//! The libvirt is the tests' own (`tests/support/libvirt.rs`); it needs root. As in the tests of
//! `tests/e2e`, each has a folder of its own, and the oracle says whether memory is right.

#[path = "../support/mod.rs"]
mod support;

#[allow(dead_code)] // these tests use a part of it
#[path = "../e2e/harness.rs"]
mod harness;

mod figures;
mod killed;
mod mapped;
mod monitor;
mod quiesced;
mod reverting;
mod saving;
mod session;
mod verbs;

pub(crate) use harness::tests;
