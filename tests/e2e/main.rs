//! The program itself, run on real guests by stock QEMUs: what it promises on its
//! good days, and how it fails on the others.
//!
//! Each test is a function of a folder of its own, in which it runs commands. At
//! its end nothing may be left: no process that mentions the folder, no socket.
//! The oracle guest (`tests/guest/README.md`) says whether memory is right.
//!
//! SNAPBACK_TEST_PLACE=socket (or uffd, eager) makes every revert that does not say otherwise
//! go that way.

#[path = "../support/mod.rs"]
mod support;

mod bare;
mod browser;
mod harness;
mod shared;

mod aarch64;
mod backends;
mod backup;
mod capture;
mod chains;
mod changed_since;
mod checks;
mod clocks;
mod clones;
mod copied_disks;
mod damage;
mod database;
mod direct_reading;
mod disk_reverts;
mod exchange;
mod far;
mod farms;
mod faulty_disk;
mod filling;
mod followed;
mod forks;
mod hotplug;
mod huge_pages;
mod identity;
mod interrupts;
mod journeys;
mod killed;
mod killed_daemon;
mod killed_reverts;
mod libvirt;
mod mapping;
mod moments;
mod page;
mod pool_setup;
mod pools;
mod ports;
mod reset_devices;
mod resets;
mod runs;
mod sandbox;
mod save_under_fire;
mod saved_resets;
mod serving;
mod sessions;
mod soak;
mod stores;
mod torture;
mod trouble;
mod unprivileged;
mod unreadable;

/// Makes two tests of each function of a folder and a QEMU: one on every QEMU. Behind `on_7` stands an
/// attribute of the one on QEMU 7.2.
macro_rules! tests_on_both {
    (on_7 $attribute:tt $($name:ident)*) => {$(
        mod $name {
            use crate::support::{Qemu, Result};

            #[test]
            # $attribute
            fn on_qemu_7() -> Result<()> {
                crate::harness::in_a_folder(|dir| super::$name(dir, Qemu::V7))
            }

            #[test]
            fn on_qemu_10() -> Result<()> {
                crate::harness::in_a_folder(|dir| super::$name(dir, Qemu::V10))
            }
        }
    )*};
    ($($name:ident)*) => { $crate::tests_on_both! { on_7 [cfg(all())] $($name)* } };
}

/// As `tests_on_both`, but on QEMU 7.2 they are run by `make torture` alone: long tests of what is the
/// same on every QEMU.
macro_rules! tests_on_both_at_length {
    ($($name:ident)*) => {
        $crate::tests_on_both! {
            on_7 [ignore = "long, and the same as with QEMU 10: `make torture`"] $($name)*
        }
    };
}

pub(crate) use harness::tests;
pub(crate) use tests_on_both;
pub(crate) use tests_on_both_at_length;
