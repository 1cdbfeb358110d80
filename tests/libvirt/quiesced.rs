//! Domains whose file systems are frozen by libvirt's own channel to the guest's agent.

use crate::harness::Dir;
use crate::harness::STOP_AT;
use crate::saving::{Disks, save};
use crate::support::libvirt::{debian_options, shared_libvirt};
use crate::support::{Result, debian};
use crate::tests;

tests! {
    file_systems_are_frozen_through_libvirt
}

fn file_systems_are_frozen_through_libvirt(dir: &Dir) -> Result<()> {
    let (libvirt, name) = (shared_libvirt()?, "quiesced");
    let mut guest = libvirt.boot(&debian_options(name))?;
    let agent = "qemu-ga -m virtio-serial -p $(ls /dev/vport*p*) -t /run -f /run/agent.pid";
    debian::run(&mut guest.oracle, &format!("setsid {agent} >/run/agent.log 2>&1 &"))?;
    crate::support::wait_for(crate::support::SOON, "the agent to be connected", || {
        Ok(libvirt.virsh(&["dumpxml", name])?.contains("state='connected'").then_some(()))
    })?;
    let quiesced = || save(dir, libvirt, name, "vm.snap").with(&["--quiesce", "auto", "--force"]);
    let ended = quiesced().succeed()?;
    assert_eq!(ended.steps(), ["checked", "ready", "frozen", "moment", "thawed", "saved"]);
    assert!(ended.event("frozen")?["filesystems"].as_u64() > Some(0));
    debian::sql(&mut guest.oracle, "SELECT 1")?;
    debian::run(&mut guest.oracle, "touch /root/thawed && sync")?;

    // A save that is killed while they are frozen.
    if cfg!(debug_assertions) {
        let before = Disks::of(libvirt, name)?;
        let saving = quiesced().env(STOP_AT, "ready").start()?;
        saving.wait_stopped()?;
        saving.signal(libc::SIGKILL);
        let ended = saving.end()?;
        ended.event("thawed")?;
        assert_eq!(ended.event("recovered")?["outcome"], "undone");
        assert_eq!(Disks::of(libvirt, name)?, before);
        debian::run(&mut guest.oracle, "touch /root/again && sync")?;
    }
    Ok(())
}
