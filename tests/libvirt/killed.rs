//! Saves that are killed at each step, or during which libvirtd is restarted.

use std::fs;

use serde_json::Value;

use crate::harness::{Dir, Running, STEPS, STOP_AT, check};
use crate::saving::{Disks, ask, overlays, save};
use crate::support::libvirt::{Libvirt, domain_options, shared_libvirt};
use crate::support::{Attached, Result};
use crate::tests;

tests! {
    a_save_is_killed_at_every_step
    a_killed_save_is_cleaned_up_by_its_keeper
    libvirtd_is_restarted_during_a_save
}

/// A domain that is saved and killed, and what is known of it.
struct Domain<'a> {
    libvirt: &'a Libvirt,
    name: &'static str,
    guest: Attached,
}

/// What a save changes, and what undoing it has to put back.
#[derive(Debug, PartialEq)]
struct State {
    state: String,
    disks: Disks,
    capabilities: Value,
    jobs: Value,
    overlays: usize,
    files: Vec<String>,
}

impl Domain<'_> {
    fn boot<'a>(libvirt: &'a Libvirt, name: &'static str) -> Result<Domain<'a>> {
        let mut guest = libvirt.boot(&domain_options(name).with_two_disks())?;
        for disk in ["vda", "sda"] {
            ask(&mut guest, &format!("disk write /dev/{disk} 64 7"))?;
        }
        Ok(Domain { libvirt, name, guest })
    }

    fn monitor(&self, command: &str) -> Result<Value> {
        let command = format!("{{\"execute\":\"{command}\"}}");
        let answer = self.libvirt.virsh(&["qemu-monitor-command", self.name, &command])?;
        Ok(serde_json::from_str::<Value>(&answer)?["return"].clone())
    }

    fn state(&self, dir: &Dir) -> Result<State> {
        Ok(State {
            state: self.libvirt.virsh(&["domstate", self.name])?.trim().to_owned(),
            disks: Disks::of(self.libvirt, self.name)?,
            capabilities: self.monitor("query-migrate-capabilities")?,
            jobs: self.monitor("query-jobs")?,
            overlays: overlays(self.name, self.libvirt)?.len(),
            files: dir.names(".")?,
        })
    }

    fn is_as_before(&mut self, dir: &Dir, before: &State, step: &str) -> Result<()> {
        assert_eq!(&self.state(dir)?, before, "killed at `{step}`");
        self.is_well(step)
    }

    fn is_well(&mut self, step: &str) -> Result<()> {
        check(&mut self.guest).map_err(|e| format!("killed at `{step}`: {e}"))?;
        for disk in ["vda", "sda"] {
            ask(&mut self.guest, &format!("disk check /dev/{disk} 64 7"))?;
        }
        Ok(())
    }

    /// Recovers; the outcome.
    fn recover(&self, dir: &Dir) -> Result<String> {
        let ended = save(dir, self.libvirt, self.name, "vm.snap").with(&["--recover"]).succeed()?;
        Ok(ended.event("recovered")?["outcome"].as_str().unwrap_or_default().to_owned())
    }

    fn save_to(&self, dir: &Dir, step: &str, args: &[&str]) -> Result<Running> {
        let saving = save(dir, self.libvirt, self.name, "vm.snap").with(args);
        let saving = saving.env(STOP_AT, step).start()?;
        saving.wait_stopped()?;
        Ok(saving)
    }
}

fn a_save_is_killed_at_every_step(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let mut domain = Domain::boot(shared_libvirt()?, "killed")?;
    assert_eq!(domain.recover(dir)?, "nothing");
    for step in STEPS {
        let before = domain.state(dir)?;
        domain.save_to(dir, step, &["--no-keeper"])?.signal(libc::SIGKILL);
        let outcome = domain.recover(dir).map_err(|e| format!("killed at `{step}`: {e}"))?;
        if step == "named" {
            assert_eq!(outcome, "saved");
            domain.is_well(step)?;
            fs::remove_file(dir.path("vm.snap"))?;
        } else {
            assert_eq!(outcome, "undone");
            domain.is_as_before(dir, &before, step)?;
        }
    }

    // A save that undoes itself is killed, and then recovering as well.
    for step in ["committing", "committed"] {
        let before = domain.state(dir)?;
        let undoing = domain.save_to(dir, &format!("moment,{step}"), &["--no-keeper"])?;
        undoing.signal(libc::SIGINT);
        undoing.signal(libc::SIGCONT);
        undoing.wait_stopped()?;
        undoing.signal(libc::SIGKILL);
        drop(undoing);
        let recovering = save(dir, domain.libvirt, domain.name, "vm.snap").with(&["--recover"]);
        let recovering = recovering.env(STOP_AT, step).start()?;
        recovering.wait_stopped()?;
        recovering.signal(libc::SIGKILL);
        drop(recovering);
        assert_eq!(domain.recover(dir)?, "undone");
        domain.is_as_before(dir, &before, step)?;
    }
    save(dir, domain.libvirt, domain.name, "vm.snap").succeed().map(drop)
}

fn a_killed_save_is_cleaned_up_by_its_keeper(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let mut domain = Domain::boot(shared_libvirt()?, "kept")?;
    for step in ["settings", "stopped", "switched", "migrating", "moment", "named"] {
        let before = domain.state(dir)?;
        let saving = domain.save_to(dir, step, &[])?;
        saving.signal(libc::SIGKILL);
        // Its keeper speaks for it.
        let ended = saving.end()?;
        let outcome = ended.event("recovered").map_err(|e| format!("killed at `{step}`: {e}"))?;
        match step {
            "named" => assert_eq!(outcome["outcome"], "saved"),
            _ => {
                assert_eq!(outcome["outcome"], "undone");
                domain.is_as_before(dir, &before, step)?;
            }
        }
    }
    domain.is_well("named")
}

fn libvirtd_is_restarted_during_a_save(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    // Not that of other tests, which need it.
    let libvirt = Libvirt::start()?;
    let mut domain = Domain::boot(&libvirt, "restarted")?;
    for step in STEPS.into_iter().filter(|step| *step != "named") {
        let before = domain.state(dir)?;
        let saving = domain.save_to(dir, step, &[])?;
        libvirt.stop_libvirtd();
        saving.signal(libc::SIGCONT);
        libvirt.start_libvirtd()?;
        // It waits for libvirtd and goes on, unless something was under way of which nobody
        // knows whether it was done.
        let ended = saving.end()?;
        if ended.code == Some(0) {
            domain.is_well(step)?;
            fs::remove_file(dir.path("vm.snap"))?;
        } else {
            assert_eq!(ended.event("error")?["code"], "monitor_failed", "{ended:?}");
            domain.is_as_before(dir, &before, step)?;
        }
        assert!(!dir.path(".vm.snap.journal").exists(), "restarted at `{step}`");
    }
    for step in ["ready", "switched", "moment"] {
        let before = domain.state(dir)?;
        let saving = domain.save_to(dir, step, &[])?;
        libvirt.stop_libvirtd();
        saving.signal(libc::SIGINT);
        saving.signal(libc::SIGCONT);
        libvirt.start_libvirtd()?;
        let ended = saving.end()?;
        // It may meet the broken connection before the interrupt, which a thread of its own
        // hears of.
        let error = ended.event("error")?;
        let expected = ["interrupted", "monitor_failed"].map(Value::from);
        assert!(expected.contains(&error["code"]), "at `{step}`: {ended:?}");
        domain.is_as_before(dir, &before, step)?;
    }
    // While libvirtd is away, the keeper waits too.
    let before = domain.state(dir)?;
    let saving = domain.save_to(dir, "moment", &[])?;
    libvirt.stop_libvirtd();
    saving.signal(libc::SIGKILL);
    libvirt.start_libvirtd()?;
    assert_eq!(saving.end()?.event("recovered")?["outcome"], "undone");
    domain.is_as_before(dir, &before, "moment")
}
