//! `qemu:///session`: an ordinary user's own libvirt.

use std::fs;

use crate::harness::{Dir, Snapback, check, text};
use crate::saving::ask;
use crate::support::libvirt::{Libvirt, domain_options};
use crate::support::{Attached, Result};
use crate::tests;

tests! {
    an_ordinary_user_saves_and_reverts
}

/// A user that every machine has, and who may do nothing.
const NOBODY: u32 = 65534;

/// What decides whether QEMU 7.2 may have a userfaultfd as an ordinary user.
const USERFAULTFD: &str = "/proc/sys/vm/unprivileged_userfaultfd";

fn an_ordinary_user_saves_and_reverts(dir: &Dir) -> Result<()> {
    let (libvirt, name) = (&Libvirt::start_session(NOBODY)?, "own");
    let may = fs::read_to_string(USERFAULTFD)?.trim() == "1";
    let mut guest = libvirt.boot(&domain_options(name).with_two_disks())?;
    let (nonce, folder) = (guest.oracle.nonce()?, guest.dir.clone());
    ask(&mut guest, "disk write /dev/vda 64 7")?;
    let image = folder.join("vm.snap");
    let snapback = |verb: &str, arguments: &[&str]| -> Snapback {
        let command = dir.snapback(&[verb, text(&image), "--domain", name]).with(arguments);
        let environment = libvirt.environment();
        environment
            .iter()
            .fold(command, |command, (name, value)| command.env(name, value))
            .with(&["--connect", "qemu:///session"])
            .by_user(NOBODY)
    };
    // While it runs, QEMU would have to have a userfaultfd.
    if !may {
        let refusal = snapback("save", &[]).fail()?;
        assert!(refusal.contains("userfaultfd"), "{refusal}");
    }
    libvirt.virsh(&["suspend", name])?;
    snapback("save", &[]).succeed()?;
    libvirt.virsh(&["resume", name])?;
    ask(&mut guest, "disk write /dev/vda 64 8")?;
    std::mem::forget(guest);

    let ended = snapback("revert", &["--replace"]).succeed()?;
    let placing = &ended.event("placing")?["way"];
    assert_eq!(placing == "eager", !may, "{placing}");
    libvirt.virsh(&["resume", name])?;
    let mut guest = Attached::to(libvirt.pid_of(name)?, &folder)?;
    assert_eq!(guest.oracle.nonce()?, nonce);
    ask(&mut guest, "disk check /dev/vda 64 7")?;
    check(&mut guest)?;
    std::mem::forget(guest);
    libvirt.virsh(&["destroy", name]).map(drop)
}
