//! Domains that are saved: what the save tells, and what libvirt knows afterwards.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::harness::{Dir, Snapback, check, text};
use crate::support::libvirt::{Libvirt, domain_options, shared_libvirt};
use crate::support::{Contact, Result};
use crate::tests;

tests! {
    a_domain_is_saved_with_its_disks
    a_save_that_fails_leaves_the_domain_as_it_was
    what_stands_in_the_way_is_told
}

/// `save --domain` of a domain into an image of that name.
pub fn save(dir: &Dir, libvirt: &Libvirt, domain: &str, image: &str) -> Snapback {
    let (uri, image) = (libvirt.uri(), dir.path(image));
    dir.snapback(&["save", "--domain", domain, "--connect", &uri, text(&image)])
}

/// What libvirt knows of a domain's disks, live and in its definition: the file of each.
#[derive(Debug, PartialEq)]
pub struct Disks {
    pub live: Vec<String>,
    pub inactive: Vec<String>,
}

impl Disks {
    pub fn of(libvirt: &Libvirt, domain: &str) -> Result<Disks> {
        let list = |args: &[&str]| -> Result<Vec<String>> {
            Ok(libvirt.virsh(args)?.split_whitespace().map(str::to_owned).collect())
        };
        Ok(Disks {
            live: list(&["domblklist", domain])?,
            inactive: list(&["domblklist", domain, "--inactive"])?,
        })
    }
}

/// A question that the guest has to answer with `ok`.
pub fn ask(guest: &mut Contact, question: &str) -> Result<()> {
    let answer = guest.oracle.ask(question)?;
    assert!(answer.starts_with("ok"), "{question}: {answer}");
    Ok(())
}

/// Files of a folder that are overlays of ours.
pub fn overlays(folder: &str, libvirt: &Libvirt) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(libvirt.path(folder))?;
    let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    Ok(paths?.into_iter().filter(|path| text(path).contains(".snap-")).collect())
}

fn a_domain_is_saved_with_its_disks(dir: &Dir) -> Result<()> {
    let (libvirt, name) = (shared_libvirt()?, "saved");
    let mut guest = libvirt.boot(&domain_options(name).with_two_disks())?;
    for disk in ["vda", "sda"] {
        ask(&mut guest, &format!("disk write /dev/{disk} 64 7"))?;
    }
    let before = Disks::of(libvirt, name)?;
    let ended = save(dir, libvirt, name, "vm.snap").succeed()?;
    assert_eq!(ended.steps(), ["checked", "ready", "moment", "saved"]);
    let moment = ended.event("moment")?;
    for part in ["stop_ms", "changed_ms", "disks_ms", "devices_ms", "walk_ms", "resume_ms"] {
        assert!(moment["pause_parts"][part].is_f64(), "{moment}");
    }

    // The guest lives in the overlays, and libvirt knows.
    let switched = ended.event("saved")?["disks"].as_array().unwrap().clone();
    let paths: Vec<&str> = switched.iter().filter_map(|disk| disk["overlay"].as_str()).collect();
    let after = Disks::of(libvirt, name)?;
    assert_eq!(after.live, ["vda", paths[0], "sda", paths[1]]);
    assert_eq!(after.inactive, after.live);
    assert_eq!(libvirt.virsh(&["domstate", name])?.trim(), "running");
    check(&mut guest)?;
    for disk in ["vda", "sda"] {
        ask(&mut guest, &format!("disk check /dev/{disk} 64 7"))?;
        ask(&mut guest, &format!("disk write /dev/{disk} 64 8"))?;
    }
    // What was frozen is not written to any more.
    assert_eq!(switched[0]["frozen"], before.live[1]);

    // The image holds the domain, with its disks as they were.
    let info = dir.snapback(&["info", text(&dir.path("vm.snap"))]).succeed()?;
    let xml = info.events[0]["libvirt_xml"].as_str().unwrap_or_default();
    assert!(xml.contains("<name>saved</name>") && xml.contains(&before.live[1]), "{xml}");
    let inactive = info.events[0]["libvirt_inactive_xml"].as_str().unwrap_or_default();
    assert!(inactive.contains("<name>saved</name>"), "{inactive}");
    dir.snapback(&["verify", text(&dir.path("vm.snap"))]).succeed()?;

    // Snapshots of libvirt's own and of ours go on from there.
    libvirt.virsh(&["snapshot-create-as", name, "own", "--disk-only", "--no-metadata"])?;
    save(dir, libvirt, &uuid(libvirt, name)?, "second.snap")
        .with(&["--disks", "none"])
        .succeed()?;
    save(dir, libvirt, name, "third.snap").succeed()?;
    check(&mut guest)?;
    for disk in ["vda", "sda"] {
        ask(&mut guest, &format!("disk check /dev/{disk} 64 8"))?;
    }

    // A paused domain stays paused.
    libvirt.virsh(&["suspend", name])?;
    save(dir, libvirt, name, "paused.snap").with(&["--disks", "none"]).succeed()?;
    assert_eq!(libvirt.virsh(&["domstate", name])?.trim(), "paused");
    libvirt.virsh(&["resume", name])?;
    check(&mut guest)
}

/// A domain's UUID.
fn uuid(libvirt: &Libvirt, domain: &str) -> Result<String> {
    Ok(libvirt.virsh(&["domuuid", domain])?.trim().to_owned())
}

fn a_save_that_fails_leaves_the_domain_as_it_was(dir: &Dir) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let (libvirt, name) = (shared_libvirt()?, "interrupted");
    let mut guest = libvirt.boot(&domain_options(name).with_two_disks())?;
    ask(&mut guest, "disk write /dev/vda 64 7")?;
    let before = Disks::of(libvirt, name)?;
    let saving =
        save(dir, libvirt, name, "vm.snap").env(crate::harness::STOP_AT, "moment").start()?;
    saving.wait_stopped()?;
    saving.signal(libc::SIGINT);
    saving.signal(libc::SIGCONT);
    // What the guest writes to an overlay comes back with it.
    ask(&mut guest, "disk write /dev/sda 64 9")?;
    let ended = saving.end()?;
    assert_eq!(ended.event("error")?["code"], "interrupted");
    let committed: Vec<&Value> =
        ended.events.iter().filter(|event| event["event"] == "folded").collect();
    assert_eq!(committed.len(), 2, "{ended:?}");
    assert_eq!(Disks::of(libvirt, name)?, before);
    assert!(overlays(name, libvirt)?.is_empty());
    check(&mut guest)?;
    ask(&mut guest, "disk check /dev/vda 64 7")?;
    ask(&mut guest, "disk check /dev/sda 64 9")?;
    assert!(dir.names(".")?.is_empty(), "{:?}", dir.names("."));
    save(dir, libvirt, name, "vm.snap").succeed().map(drop)
}

fn what_stands_in_the_way_is_told(dir: &Dir) -> Result<()> {
    let (libvirt, name) = (shared_libvirt()?, "refused");
    let check_of =
        |domain: &str, uri: &str| dir.snapback(&["check", "--domain", domain, "--connect", uri]);
    let refusal = check_of("nobody", &libvirt.uri()).fail()?;
    assert!(refusal.contains("has no domain nobody"), "{refusal}");
    let refusal = check_of(name, "qemu+unix:///system?socket=/nonexistent/sock").fail()?;
    assert!(refusal.contains("does its daemon"), "{refusal}");

    let mut guest = libvirt.boot(&domain_options(name))?;
    let ended = check_of(name, &libvirt.uri()).succeed()?;
    let items: Vec<&str> = ended.events.iter().filter_map(|item| item["item"].as_str()).collect();
    assert!(items.contains(&"libvirt"), "{items:?}");
    let refusal = save(dir, libvirt, name, "vm.snap").with(&["--quiesce", "auto"]).fail()?;
    assert!(refusal.contains("org.qemu.guest_agent.0"), "{refusal}");
    check(&mut guest)?;

    libvirt.virsh(&["destroy", name])?;
    let refusal = save(dir, libvirt, name, "vm.snap").fail()?;
    assert!(refusal.contains("is shut off"), "{refusal}");
    Ok(())
}
