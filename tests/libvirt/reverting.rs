//! Domains started again by libvirt, their memory brought by the program.

use std::path::{Path, PathBuf};

use crate::harness::{Dir, text};
use crate::support::libvirt::{Libvirt, domain_options, shared_libvirt};
use crate::support::{Attached, Qemu, Result};
use crate::tests;

tests! {
    what_virsh_saved_reverts_as_its_domain
}

/// The process in the event that a guest runs.
fn pid(running: &serde_json::Value) -> Result<u32> {
    Ok(running["pid"].as_u64().ok_or("no pid")? as u32)
}

/// Whether the guest's memory is right, and that of the guest with this nonce.
fn check(guest: &mut Attached, nonce: &str) -> Result<()> {
    assert_eq!(guest.oracle.nonce()?, nonce);
    let verdict = guest.oracle.check()?;
    assert!(verdict.ok(), "{verdict:?}");
    Ok(())
}

/// `revert` of an image's domain.
fn revert(dir: &Dir, libvirt: &Libvirt, image: &Path, domain: &str) -> crate::harness::Snapback {
    dir.snapback(&["revert", text(image), "--domain", domain, "--connect", &libvirt.uri()])
}

/// Has libvirt save a domain, and imports that.
fn imported(dir: &Dir, libvirt: &Libvirt, domain: &str) -> Result<PathBuf> {
    let (saved, image) = (libvirt.path(&format!("{domain}.save")), dir.path("vm.snap"));
    libvirt.virsh(&["save", domain, text(&saved)])?;
    let import = dir.snapback(&["import", text(&saved), text(&image)]);
    import.env("LIBVIRT_DEFAULT_URI", &libvirt.uri()).succeed()?;
    Ok(image)
}

fn what_virsh_saved_reverts_as_its_domain(dir: &Dir) -> Result<()> {
    let libvirt = shared_libvirt()?;
    let mut guest = libvirt.boot(&domain_options("saved", Qemu::V7))?;
    let nonce = guest.oracle.nonce()?;
    let folder = guest.dir.clone();
    drop(guest.oracle);
    let image = imported(dir, libvirt, "saved")?;
    for _ in 0..2 {
        let mut reverting = revert(dir, libvirt, &image, "saved").with(&["--replace"]).start()?;
        let mut guest = Attached::to(pid(&reverting.wait("running")?)?, &folder)?;
        let ended = reverting.succeed()?;
        assert_eq!(ended.event("placing")?["way"], "uffd");
        check(&mut guest, &nonce)?;
        assert_eq!(libvirt.virsh(&["domstate", "saved"])?.trim(), "running");
        std::mem::forget(guest);
    }
    let refusal = revert(dir, libvirt, &image, "saved").fail()?;
    assert!(refusal.contains("--replace"), "{refusal}");
    libvirt.virsh(&["destroy", "saved"])?;
    Ok(())
}
