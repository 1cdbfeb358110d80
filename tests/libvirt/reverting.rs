//! Domains started again by libvirt, their memory brought by the program.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Dir, Snapback, check, text};
use crate::saving::{ask, save};
use crate::support::libvirt::{DomainOptions, Libvirt, domain_options, shared_libvirt};
use crate::support::{Attached, Oracle, Result};
use crate::tests;

tests! {
    a_domain_reverts_in_its_own_place
    siblings_run_side_by_side
    what_was_plugged_in_comes_back
    what_virsh_saved_reverts_as_its_domain
    what_is_exported_is_restored_by_virsh
    what_stands_in_the_way_is_told
    a_server_that_is_killed_is_succeeded
    libvirtd_may_be_gone_while_memory_comes
    a_paused_guest_stays_paused
}

/// Fills memory, and takes some seconds for that.
const SLOWLY: [&str; 4] = ["--replace", "--fill-rate", "12M", "--no-working-set"];

/// A domain with two disks and a network card.
pub fn options(name: &'static str) -> DomainOptions {
    DomainOptions {
        devices: "<interface type='user'><model type='virtio'/></interface>".into(),
        ..domain_options(name).with_two_disks()
    }
}

/// A domain that was saved, and the image of it.
pub struct Saved<'a> {
    pub libvirt: &'a Libvirt,
    pub name: &'static str,
    pub folder: PathBuf,
    pub image: PathBuf,
    pub nonce: String,
}

impl Saved<'_> {
    /// Boots a domain, lets `prepare` change it, and saves it with 64 pages on its first disk.
    /// Later the guest writes something else there.
    pub fn make(
        dir: &Dir,
        options: &DomainOptions,
        prepare: impl FnOnce(&Libvirt, &mut Attached) -> Result<()>,
    ) -> Result<Saved<'static>> {
        Saved::under(shared_libvirt()?, dir, options, prepare)
    }

    /// The same under this libvirt.
    fn under<'a>(
        libvirt: &'a Libvirt,
        dir: &Dir,
        options: &DomainOptions,
        prepare: impl FnOnce(&Libvirt, &mut Attached) -> Result<()>,
    ) -> Result<Saved<'a>> {
        let name = options.name;
        let mut guest = libvirt.boot(options)?;
        ask(&mut guest, "disk write /dev/vda 64 7")?;
        prepare(libvirt, &mut guest)?;
        save(dir, libvirt, name, "vm.snap").succeed()?;
        ask(&mut guest, "disk write /dev/vda 64 8")?;
        let (folder, nonce) = (guest.dir.clone(), guest.oracle.nonce()?);
        // libvirt's, and not ours to kill.
        std::mem::forget(guest);
        Ok(Saved { libvirt, name, folder, image: dir.path("vm.snap"), nonce })
    }

    /// `revert` of it.
    pub fn revert(&self, dir: &Dir, arguments: &[&str]) -> Snapback {
        revert(dir, self.libvirt, &self.image, self.name).with(arguments)
    }

    /// Reverts it in its own place.
    pub fn replaced(&self, dir: &Dir) -> Result<(Attached, Vec<Value>)> {
        let ended = self.revert(dir, &["--replace"]).succeed()?;
        let guest = Attached::to(pid(ended.event("running")?)?, &self.folder)?;
        Ok((guest, ended.events))
    }

    /// Whether a guest is the one that was saved, with its memory and disk of that moment.
    pub fn check(&self, guest: &mut Attached) -> Result<()> {
        assert_eq!(guest.oracle.nonce()?, self.nonce);
        ask(guest, "disk check /dev/vda 64 7")?;
        check(guest)
    }

    pub fn virsh(&self, verb: &str, arguments: &[&str]) -> Result<String> {
        self.libvirt.virsh(&[&[verb, self.name], arguments].concat())
    }
}

/// `revert` of an image's domain.
pub fn revert(dir: &Dir, libvirt: &Libvirt, image: &Path, domain: &str) -> Snapback {
    dir.snapback(&["revert", text(image), "--domain", domain, "--connect", &libvirt.uri()])
}

/// The process in the event that a guest runs.
fn pid(running: &Value) -> Result<u32> {
    Ok(running["pid"].as_u64().ok_or("no pid")? as u32)
}

fn a_domain_reverts_in_its_own_place(dir: &Dir) -> Result<()> {
    let saved = Saved::make(dir, &options("replaced"), |_, _| Ok(()))?;
    for _ in 0..2 {
        let (mut guest, events) = saved.replaced(dir)?;
        saved.check(&mut guest)?;
        ask(&mut guest, "disk write /dev/vda 64 9")?;
        let placing = events.iter().find(|event| event["event"] == "placing").unwrap();
        assert!(["uffd", "socket"].contains(&placing["way"].as_str().unwrap()), "{placing}");

        // libvirt knows the overlays and what is below, and what our start needed.
        let overlays = events.iter().filter(|event| event["event"] == "disk");
        let overlays: Vec<_> = overlays.filter_map(|disk| disk["overlay"].as_str()).collect();
        let listed = saved.virsh("domblklist", &[])?;
        assert!(
            overlays.len() == 2 && overlays.iter().all(|path| listed.contains(path)),
            "{listed}"
        );
        let live = saved.virsh("dumpxml", &[])?;
        assert!(live.contains("urn:snapback:domain:1") && live.contains("'-incoming'"), "{live}");
        assert!(live.contains("/vda.raw"), "{live}");
        let inactive = saved.virsh("dumpxml", &["--inactive"])?;
        assert!(!inactive.contains("snapback:") && !inactive.contains("incoming"), "{inactive}");
        std::mem::forget(guest);
    }
    // The saved definition, made the persistent one.
    saved.revert(dir, &["--replace", "--define"]).succeed()?;
    let inactive = saved.virsh("dumpxml", &["--inactive"])?;
    let listed = saved.virsh("domblklist", &[])?;
    let overlay = listed.split_whitespace().nth(1).unwrap();
    assert!(!inactive.contains("incoming") && inactive.contains(overlay), "{inactive}");
    saved.virsh("destroy", &[])?;
    Ok(())
}

fn siblings_run_side_by_side(dir: &Dir) -> Result<()> {
    let saved = Saved::make(dir, &options("first"), |_, _| Ok(()))?;
    let mut seen = vec![identity(&saved.virsh("dumpxml", &[])?)];
    for name in ["second", "third"] {
        let ended = saved.revert(dir, &["--new", name]).succeed()?;
        assert!(ended.event("note")?["what"].to_string().contains("other addresses"));
        let mut oracle = Oracle::connect(&saved.folder.join(format!("{name}-serial1.sock")))?;
        assert_eq!(oracle.nonce()?, saved.nonce);
        assert!(oracle.ask("disk check /dev/vda 64 7")?.starts_with("ok"));
        assert!(oracle.ask(&format!("disk write /dev/vda 64 {}", name.len()))?.starts_with("ok"));
        seen.push(identity(&saved.libvirt.virsh(&["dumpxml", name])?));
    }
    for name in ["second", "third"] {
        let mut oracle = Oracle::connect(&saved.folder.join(format!("{name}-serial1.sock")))?;
        assert!(oracle.ask(&format!("disk check /dev/vda 64 {}", name.len()))?.starts_with("ok"));
        assert!(oracle.check()?.ok());
        saved.libvirt.virsh(&["destroy", name])?;
    }
    measured(dir, &saved)?;
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3, "{seen:?}");
    saved.virsh("destroy", &[])?;
    Ok(())
}

/// Measures reverts of a domain that runs on, beside libvirt's own ways: `bench`.
fn measured(dir: &Dir, saved: &Saved) -> Result<()> {
    let files = || -> Result<Vec<_>> {
        let mut names: Vec<_> =
            fs::read_dir(&saved.folder)?.flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        Ok(names)
    };
    let before = (files()?, dir.names(".")?);
    let uri = saved.libvirt.uri();
    let bench = ["bench", text(&saved.image), "--domain", saved.name, "--connect", &uri];
    let report = dir.path("report.html");
    let arguments = ["--runs", "1", "--peers", "--report", text(&report)];
    let ended = dir.snapback(&bench).with(&arguments).succeed()?;
    assert!(fs::read_to_string(&report)?.contains("libvirt-restore"));
    fs::remove_file(report)?;
    let runs = ended.events.iter().filter(|event| event["event"] == "run");
    let ways: Vec<&str> = runs.filter_map(|run| run["way"].as_str()).collect();
    let peers = ["libvirt-start", "libvirt-restore", "libvirt-snapshot"];
    assert_eq!(ways, [&["domain"], &peers[..]].concat());
    let summary = ended.event("summary")?;
    assert_eq!(summary["subject"]["domain"], saved.name);
    for ratio in summary["ratios"].as_array().into_iter().flatten() {
        assert!(ratio["way"] == "domain" && ratio["ratio"]["median"].as_f64() > Some(0.0));
    }
    assert_eq!((files()?, dir.names(".")?), before);
    let domains = saved.libvirt.virsh(&["list", "--all", "--name"])?;
    assert!(!domains.contains("snapback-bench"), "{domains}");
    Ok(())
}

/// The UUID of a domain and the address of its network card.
fn identity(xml: &str) -> (String, String) {
    let behind = |mark: &str| {
        let (_, rest) = xml.split_once(mark).unwrap_or(("", ""));
        rest.split(['<', '\'']).next().unwrap_or_default().to_owned()
    };
    (behind("<uuid>"), behind("<mac address='"))
}

fn what_was_plugged_in_comes_back(dir: &Dir) -> Result<()> {
    let mut devices = String::new();
    let saved = Saved::make(dir, &options("plugged"), |libvirt, guest| {
        let disk = guest.dir.join("plugged.raw");
        fs::write(&disk, vec![0; 1 << 20])?;
        let disk = [text(&disk), "vdz", "--targetbus", "virtio", "--live"];
        libvirt.virsh(&[&["attach-disk", "plugged"], &disk[..]].concat())?;
        libvirt.virsh(&["attach-device", "plugged", text(&card(&guest.dir)?), "--live"])?;
        crate::support::wait_for(crate::support::SOON, "the guest to see them", || {
            devices = guest.oracle.ask("devices")?;
            Ok((devices.matches("1af4:").count() == 5).then_some(()))
        })
    })?;
    let (mut guest, _) = saved.replaced(dir)?;
    saved.check(&mut guest)?;
    assert_eq!(guest.oracle.ask("devices")?, devices);
    saved.virsh("destroy", &[])?;
    std::mem::forget(guest);
    Ok(())
}

/// A network card to plug in, in a file.
fn card(folder: &Path) -> Result<PathBuf> {
    let file = folder.join("card.xml");
    fs::write(&file, "<interface type='user'><model type='virtio'/></interface>")?;
    Ok(file)
}

fn what_virsh_saved_reverts_as_its_domain(dir: &Dir) -> Result<()> {
    let libvirt = shared_libvirt()?;
    let mut guest = libvirt.boot(&domain_options("imported"))?;
    let (nonce, folder) = (guest.oracle.nonce()?, guest.dir.clone());
    std::mem::forget(guest);
    let (file, image) = (libvirt.path("imported.save"), dir.path("vm.snap"));
    libvirt.virsh(&["save", "imported", text(&file)])?;
    let import = dir.snapback(&["import", text(&file), text(&image)]);
    import.env("LIBVIRT_DEFAULT_URI", &libvirt.uri()).succeed()?;
    for _ in 0..2 {
        let ended = revert(dir, libvirt, &image, "imported").with(&["--replace"]).succeed()?;
        let mut guest = Attached::to(pid(ended.event("running")?)?, &folder)?;
        assert_eq!(guest.oracle.nonce()?, nonce);
        check(&mut guest)?;
        std::mem::forget(guest);
    }
    libvirt.virsh(&["destroy", "imported"])?;
    Ok(())
}

fn what_is_exported_is_restored_by_virsh(dir: &Dir) -> Result<()> {
    let saved = Saved::make(dir, &options("exported"), |_, _| Ok(()))?;
    saved.virsh("destroy", &[])?;
    let file = saved.libvirt.path("exported.save");
    let args = ["export", text(&saved.image), "--to", "libvirt", text(&file)];
    dir.snapback(&args).succeed()?;
    saved.libvirt.virsh(&["restore", text(&file)])?;
    let mut guest = Attached::to(saved.libvirt.pid_of(saved.name)?, &saved.folder)?;
    saved.check(&mut guest)?;
    saved.virsh("destroy", &[])?;
    std::mem::forget(guest);
    // What was frozen was not written to.
    let (mut guest, _) = saved.replaced(dir)?;
    saved.check(&mut guest)?;
    saved.virsh("destroy", &[])?;
    std::mem::forget(guest);
    Ok(())
}

fn what_stands_in_the_way_is_told(dir: &Dir) -> Result<()> {
    let saved = Saved::make(dir, &options("obstacles"), |_, _| Ok(()))?;
    let refused = |arguments: &[&str]| saved.revert(dir, arguments).fail();
    let refusal = refused(&[])?;
    assert!(refusal.contains("obstacles runs") && refusal.contains("--replace"), "{refusal}");
    let refusal = revert(dir, saved.libvirt, &saved.image, "another").fail()?;
    assert!(refusal.contains("`obstacles`") && refusal.contains("--new"), "{refusal}");
    let refusal = refused(&["--replace", "--place", "map"])?;
    assert!(refusal.contains("--layout flat"), "{refusal}");
    // Nothing is left of any.
    let made = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("obstacles.");
    let files = fs::read_dir(&saved.folder)?.flatten();
    assert_eq!(files.filter(|entry| made(&entry.file_name())).count(), 0);
    saved.virsh("destroy", &[])?;
    Ok(())
}

fn a_server_that_is_killed_is_succeeded(dir: &Dir) -> Result<()> {
    let saved = Saved::make(dir, &options("killed-server"), |_, _| Ok(()))?;
    let mut server = saved.revert(dir, &SLOWLY).start()?;
    let mut guest = Attached::to(pid(&server.wait("running")?)?, &saved.folder)?;
    server.signal(libc::SIGKILL);
    assert_eq!(server.wait("taken_over")?["by"], "keeper");
    saved.check(&mut guest)?;
    server.wait("resident")?;
    server.end()?;
    saved.check(&mut guest)?;
    std::mem::forget(guest);
    // Its successor has told QEMU, by libvirt, that the migration is over.
    let file = saved.libvirt.path("killed-server.save");
    saved.virsh("save", &[text(&file)]).map(drop)
}

fn libvirtd_may_be_gone_while_memory_comes(dir: &Dir) -> Result<()> {
    // Not that of other tests, which need it.
    let libvirt = Libvirt::start()?;
    let saved = Saved::under(&libvirt, dir, &options("daemonless"), |_, _| Ok(()))?;
    let mut server = saved.revert(dir, &SLOWLY).start()?;
    let mut guest = Attached::to(pid(&server.wait("running")?)?, &saved.folder)?;
    saved.libvirt.stop_libvirtd();
    saved.check(&mut guest)?;
    saved.libvirt.start_libvirtd()?;
    server.wait("resident")?;
    server.succeed()?;
    saved.check(&mut guest)?;
    std::mem::forget(guest);
    assert_eq!(saved.virsh("domstate", &[])?.trim(), "running");
    saved.virsh("destroy", &[]).map(drop)
}

fn a_paused_guest_stays_paused(dir: &Dir) -> Result<()> {
    let saved = Saved::make(dir, &options("suspended"), |_, _| Ok(()))?;
    saved.virsh("suspend", &[])?;
    save(dir, saved.libvirt, saved.name, "paused.snap").succeed()?;
    let paused = Saved { image: dir.path("paused.snap"), ..saved };
    paused.revert(dir, &["--replace"]).succeed()?;
    assert_eq!(paused.virsh("domstate", &[])?.trim(), "paused");
    paused.virsh("resume", &[])?;
    let mut guest = Attached::to(paused.libvirt.pid_of(paused.name)?, &paused.folder)?;
    ask(&mut guest, "disk check /dev/vda 64 8")?;
    check(&mut guest)?;
    std::mem::forget(guest);
    paused.virsh("destroy", &[]).map(drop)
}
