//! Saving disks with memory: what is captured, and what becomes of it when the save
//! fails or is killed.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::bare::{Bare, query};
use crate::harness::STOP_AT;
use crate::harness::{Dir, Ended, Running, Snapback, check, text, wait_gone};
use crate::killed::kill_at_its_step;
use crate::support::{
    Bus, Disk, Fill, Format, Given, Guest, GuestOptions, Pidfd, Qemu, Qmp, Result, SOON, cont,
    convert, debian, qmp, query_status, run, stop, wait_for,
};
use crate::{tests, tests_on_both, tests_on_both_at_length};

tests! {
    a_save_ends_with_what_starts_the_guest_again
    what_stands_in_the_way_is_told_item_by_item
    a_real_agent_freezes_and_thaws
    the_parent_and_the_agent_are_asked_beforehand
    a_qemu_that_has_changed_its_user_can_open_its_overlay
}

tests_on_both! {
    memory_and_disks_are_of_one_moment
    a_disk_is_left_out_by_any_of_its_names
    a_disk_that_was_plugged_in_is_captured_and_reverted
    a_disk_on_ahci_is_captured_and_reverted
    a_disk_that_no_option_defines_is_refused
    whatever_fails_the_disks_are_as_before
    a_killed_save_is_recovered
    a_guest_agent_is_made_to_thaw
    a_guest_that_somebody_stops_meanwhile_is_left_alone
    what_cant_be_undone_is_named
}

tests_on_both_at_length! {
    an_incomplete_guest_is_waited_for
    a_paused_guest_is_saved_with_its_disks
}

/// A guest whose disks are changed, and its memory too, right after the moment.
fn memory_and_disks_are_of_one_moment(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = |id: &str, bus, given, format| Disk {
        id: id.into(),
        bus,
        given,
        file: dir.path(id),
        format,
    };
    let disks = vec![
        disk("drive", Bus::VirtioBlk, Given::Drive, Format::Raw),
        disk("plain", Bus::VirtioBlk, Given::DriveIf, Format::Qcow2),
        disk("scsi", Bus::VirtioScsi, Given::Blockdev, Format::Qcow2),
        disk("ide", Bus::Ide, Given::BlockdevJson, Format::Raw),
    ];
    disks.iter().try_for_each(|disk| disk.make(8))?;
    let fill = Fill::Mib(64);
    let options = GuestOptions { qemu, mib: 192, fill, disks, writers: 0, ..Default::default() };
    let mut guest = Guest::boot(&options)?;
    let devices = ["vda", "vdb", "sda", "sdb"];
    let write = |guest: &mut Guest, seed: &str| {
        devices.iter().try_for_each(|device| {
            guest.oracle.ask(&format!("disk write /dev/{device} 64 {seed}")).map(drop)
        })
    };
    guest.oracle.ask("idle")?;
    write(&mut guest, "1")?;
    let sum = guest.oracle.sum()?;

    let hook = "test ! -e \"$SNAPBACK_IMAGE\" && echo $SNAPBACK_MOMENT_UNIX_US > hook";
    let mut saving = dir.save(&guest, "vm.snap").with(&["--on-moment", hook]).start()?;
    let moment = saving.wait("moment")?;
    guest.oracle.ask("zero 0 1000")?;
    write(&mut guest, "2")?;
    let ended = saving.succeed()?;
    assert_eq!(ended.steps(), ["checked", "ready", "moment", "saved"]);
    let parts = ["stop_ms", "changed_ms", "disks_ms", "devices_ms", "walk_ms", "resume_ms"];
    let sum_of_parts: f64 =
        parts.iter().map(|part| moment["pause_parts"][part].as_f64().unwrap()).sum();
    assert!((moment["pause_ms"].as_f64().unwrap() - sum_of_parts).abs() < 0.01, "{moment}");
    assert!(moment["monotonic_us"].as_u64().is_some_and(|us| us > 0));
    let told = fs::read_to_string(dir.path("hook"))?;
    assert_eq!(told.trim(), moment["unix_us"].to_string());
    assert_ne!(guest.oracle.sum()?, sum);

    // The record: every disk frozen as it is called, and its overlay private.
    let image = dir.path("vm.snap");
    let info = dir.snapback(&["info", text(&image)]).succeed()?.events.remove(0);
    let record = info["disks"].as_array().ok_or("no disks")?.clone();
    assert_eq!((record.len(), &info["uncaptured_disks"]), (4, &json!([])));
    for disk in &record {
        assert_eq!(disk["role"], "captured");
        let overlay = disk["overlay"].as_str().ok_or("no overlay")?;
        assert_eq!(fs::metadata(overlay)?.mode() & 0o777, 0o600);
        let file = &disk["chain"][0];
        let path = file["path"].as_str().ok_or("no path")?;
        assert_eq!(file["stamp"]["len"], fs::metadata(path)?.len());
        assert_eq!(disk["size"], 8 << 20);
    }
    assert!(!dir.names(".")?.iter().any(|name| name.contains("journal")));

    // A second snapshot freezes the overlays of the first.
    let ended = dir.save(&guest, "second.snap").succeed()?;
    assert_eq!(ended.event("ready")?["overlays"].as_array().map(Vec::len), Some(4));
    let second = dir.path("second.snap");
    let info = dir.snapback(&["info", text(&second)]).succeed()?.events.remove(0);
    for (disk, before) in info["disks"].as_array().unwrap().iter().zip(&record) {
        assert_eq!(disk["chain"][0]["path"], before["overlay"]);
        assert_eq!(disk["chain"][1]["path"], before["chain"][0]["path"]);
        // It is called what it was called.
        assert_eq!((&disk["node"], &disk["device"]), (&before["node"], &before["device"]));
    }

    // Neither the memory nor the disks of the image know of what came later.
    for (image, name, seed) in [(&image, "first", "1"), (&second, "again", "2")] {
        let mut reverted = dir.reverted(image, &guest.dir, name)?;
        reverted.resident()?;
        assert_eq!(reverted.oracle.sum()? == sum, seed == "1");
        for device in devices {
            let asked = format!("disk check /dev/{device} 64 {seed}");
            assert_eq!(reverted.oracle.ask(&asked)?, "ok", "{device} of {name}");
        }
    }
    Ok(())
}

/// The last lines of a save are the options with which QEMU finds what the guest has written.
fn a_save_ends_with_what_starts_the_guest_again(dir: &Dir) -> Result<()> {
    let data = dir.path("odd, name.qcow2");
    Disk { format: Format::Qcow2, ..Disk::new("data", &data) }.make(4)?;
    let node = json!({
        "driver": "qcow2", "node-name": "data", "file": { "driver": "file", "filename": data },
    });
    let device = "virtio-blk-pci,drive=data";
    let watched =
        Watched::start(dir, Qemu::V10, &["-blockdev", &node.to_string(), "-device", device])?;
    let saved = watched.save(dir).succeed()?.event("saved")?.clone();
    let frozen = [&saved["disks"][0]["frozen"], &saved["disks"][1]["frozen"]];
    assert_eq!(frozen, [text(&watched.disk), text(&data)], "{saved}");

    // Once more, in words: the overlays of before are frozen now.
    let ended = watched.save(dir).with(&["--force"]).plain().succeed()?;
    let is_option = |line: &&String| !line.starts_with(' ');
    let options: Vec<&String> = ended.said.iter().filter(is_option).collect();
    let [system, data] = options[..] else { return Err(format!("{:?}", ended.said).into()) };
    assert_eq!(ended.said.last(), Some(data));
    for disk in saved["disks"].as_array().unwrap() {
        let old = disk["overlay"].as_str().unwrap();
        assert!(ended.said.iter().any(|line| line.contains(&format!("Instead of {old}"))));
    }
    let expected: Vec<Value> = query(&watched.side, "query-block")?
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["inserted"]["file"].clone())
        .collect();
    drop(watched);

    // As a start script would have it, with what was around it before.
    let pasted = format!("-drive if=none,id=system,{system} -blockdev node-name=data,{data}");
    let pasted = shlex::split(&pasted).ok_or("not quoted for a shell")?;
    let mut args: Vec<&str> = pasted.iter().map(String::as_str).collect();
    args.extend(["-device", "virtio-blk-pci,drive=system", "-device", device]);
    let again = Bare::start(dir, Qemu::V10, &args)?;
    let disks = again.query("query-block")?;
    for (disk, file) in disks.as_array().unwrap().iter().zip(&expected) {
        let inserted = &disk["inserted"];
        assert_eq!((&inserted["file"], &inserted["backing_file_depth"]), (file, &json!(2)));
    }
    Ok(())
}

/// A QEMU with one disk, and a second control socket on which to see and do things.
struct Watched {
    bare: Bare,
    side: PathBuf,
    disk: PathBuf,
}

impl Watched {
    fn start(dir: &Dir, qemu: Qemu, more: &[&str]) -> Result<Watched> {
        let (disk, side) = (dir.path("disk.raw"), dir.path("side.sock"));
        File::create(&disk)?.set_len(4 << 20)?;
        let drive = format!("if=none,id=system,format=raw,file={}", text(&disk));
        let monitor = format!("unix:{},server=on,wait=off", text(&side));
        let mut args = vec!["-drive", &drive, "-device", "virtio-blk-pci,drive=system,id=vda"];
        args.extend(["-qmp", &monitor]);
        args.extend(more);
        Ok(Watched { bare: Bare::start(dir, qemu, &args)?, side, disk })
    }

    fn save(&self, dir: &Dir) -> Snapback {
        dir.snapback(&["save", "--qmp", text(&self.bare.socket), text(&dir.path("vm.snap"))])
    }

    fn recover(&self, dir: &Dir) -> Result<String> {
        let ended = self.save(dir).with(&["--recover"]).succeed()?;
        Ok(ended.event("recovered")?["outcome"].as_str().unwrap_or_default().to_owned())
    }

    /// The guest runs on its own disk, nothing is set, and nothing is left.
    fn is_as_before(&self, dir: &Dir) -> Result<()> {
        assert_eq!(query_status(&self.side)?, "running");
        let disks = query(&self.side, "query-block")?;
        assert_eq!(disks[0]["inserted"]["file"], text(&self.disk), "{disks}");
        let capabilities = query(&self.side, "query-migrate-capabilities")?;
        let on = capabilities.as_array().ok_or("no capabilities")?;
        assert!(on.iter().all(|capability| capability["state"] == false), "{on:?}");
        let nodes = query(&self.side, "query-named-block-nodes")?.to_string();
        assert!(!nodes.contains("snap-"), "{nodes}");
        let left = dir.names(".")?;
        let strange = |name: &&String| name.contains("snap") || name.contains("journal");
        assert_eq!(left.iter().find(strange), None);
        Ok(())
    }
}

fn a_disk_is_left_out_by_any_of_its_names(dir: &Dir, qemu: Qemu) -> Result<()> {
    let cd = dir.path("cd.iso");
    File::create(&cd)?.set_len(1 << 20)?;
    let cdrom = format!("if=ide,media=cdrom,format=raw,file={}", text(&cd));
    let base = dir.path("base.qcow2");
    let format = Format::Qcow2;
    Disk { format, ..Disk::new("data", &base) }.make(4)?;
    let (file, node) = (
        format!("driver=file,filename={},node-name=data-file", text(&base)),
        "driver=qcow2,file=data-file,node-name=data",
    );
    let args = ["-drive", &cdrom, "-blockdev", &file, "-blockdev", node];
    let scsi = ["-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=data"];
    let watched = Watched::start(dir, qemu, &[&args[..], &scsi[..]].concat())?;
    for (name, left_out) in [("system", 0), ("vda", 0), ("data", 1), ("data-file", 1)] {
        let ended = watched.save(dir).with(&["--exclude-disk", name, "--force"]).succeed()?;
        let captured = ended.event("checked")?["captured_disks"].as_array().unwrap().len();
        assert_eq!(captured, 1, "{name}");
        let shown = dir.snapback(&["info", text(&dir.path("vm.snap"))]).succeed()?;
        let disks = shown.events[0]["disks"].as_array().unwrap().clone();
        let roles = |role: &str| disks.iter().filter(|disk| disk["role"] == role).count();
        assert_eq!((roles("captured"), roles("excluded"), roles("read-only")), (1, 1, 1));
        let names = ["system", "data"];
        let excluded = disks.iter().find(|disk| disk["role"] == "excluded").unwrap();
        let called = [&excluded["device"], &excluded["node"]];
        assert!(called.contains(&&json!(names[left_out])), "{excluded}");
        assert!(excluded["chain"][0]["stamp"].is_null());
        let cd_record = disks.iter().find(|disk| disk["role"] == "read-only").unwrap();
        assert_eq!(cd_record["chain"][0]["path"], text(&cd));
    }
    let refusal = watched.save(dir).with(&["--exclude-disk", "nowhere", "--force"]).fail()?;
    assert!(refusal.contains("nowhere") && refusal.contains("system"), "{refusal}");
    let elsewhere = dir.make("overlays")?;
    watched.save(dir).with(&["--overlay-dir", text(&elsewhere), "--force"]).succeed()?;
    assert_eq!(dir.names("overlays")?.len(), 2);
    Ok(())
}

fn a_disk_that_was_plugged_in_is_captured_and_reverted(dir: &Dir, qemu: Qemu) -> Result<()> {
    let watched = Watched::start(dir, qemu, &[])?;
    let check = || dir.snapback(&["check", "--qmp", text(&watched.bare.socket)]).succeed();
    let warnings = |events: &[Value]| events.iter().filter(|item| item["warning"] == true).count();
    assert_eq!(warnings(&check()?.events), 0);

    let hot = dir.path("hot.raw");
    File::create(&hot)?.set_len(1 << 20)?;
    let file = json!({"driver": "file", "filename": hot});
    let node = json!({"driver": "raw", "node-name": "hot", "file": file});
    qmp(&watched.side, "blockdev-add", node)?;
    qmp(&watched.side, "device_add", json!({"driver": "virtio-blk-pci", "drive": "hot"}))?;
    assert_eq!(warnings(&check()?.events), 0);

    let ended = watched.save(dir).succeed()?;
    assert_eq!(ended.steps(), ["checked", "ready", "moment", "saved"]);
    let captured = ended.event("checked")?["captured_disks"].to_string();
    assert!(captured.contains("hot.raw"), "{captured}");
    let image = dir.path("vm.snap");
    let reverted = dir.snapback(&["revert", text(&image)]).succeed()?;
    let disk = |event: &&Value| event["event"] == "disk" && event["frozen"] == text(&hot);
    let overlay = reverted.events.iter().find(disk).ok_or("it has no overlay")?;
    assert!(overlay["overlay"].is_string());
    let pid = reverted.event("running")?["pid"].as_u64().ok_or("no process")? as u32;
    Pidfd::open(pid)?.kill()
}

/// A file of -readconfig is not part of the recorded command line: a revert would not find the
/// disk.
fn a_disk_that_no_option_defines_is_refused(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (disk, config, image) = (dir.path("d.raw"), dir.path("qemu.cfg"), dir.path("vm.snap"));
    File::create(&disk)?.set_len(1 << 20)?;
    let drive = format!(
        "[drive \"system\"]\nif = \"none\"\nformat = \"raw\"\nfile = \"{}\"\n",
        text(&disk)
    );
    std::fs::write(&config, drive)?;
    let args = ["-readconfig", text(&config), "-device", "virtio-blk-pci,drive=system"];
    let bare = Bare::start(dir, qemu, &args)?;
    let check = dir.snapback(&["check", "--qmp", text(&bare.socket)]).end()?;
    let item = check.events.iter().find(|event| event["item"] == "revert");
    let save = || dir.snapback(&["save", "--qmp", text(&bare.socket), text(&image)]);
    for refusal in [item.ok_or("not checked")?["says"].to_string(), save().fail()?] {
        let names = ["system", "-readconfig", "--exclude-disk", "--allow-missing-device"];
        assert!(names.iter().all(|name| refusal.contains(name)), "{refusal}");
    }
    assert!(!image.exists());

    let ended = save().with(&["--allow-missing-device", "system"]).succeed()?;
    assert!(ended.event("warning")?["says"].to_string().contains("system (disk)"));
    let info = dir.snapback(&["info", text(&image)]).succeed()?;
    assert_eq!(info.events[0]["hotplug"]["missing"][0]["id"], "system");
    let refusal = dir.snapback(&["revert", text(&image)]).fail()?;
    assert!(refusal.contains("system") && refusal.contains("snapback serve"), "{refusal}");
    save().with(&["--exclude-disk", "system", "--force"]).succeed().map(drop)
}

/// The guests' kernel has no driver for AHCI (`tests/guest/README.md`): QEMU itself writes for
/// it here.
fn a_disk_on_ahci_is_captured_and_reverted(dir: &Dir, qemu: Qemu) -> Result<()> {
    let (disk, image) = (dir.path("disk.raw"), dir.path("vm.snap"));
    File::create(&disk)?.set_len(4 << 20)?;
    let drive = format!("if=none,id=system,format=raw,file={}", text(&disk));
    let args = ["-machine", "q35", "-drive", &drive, "-device", "ide-hd,drive=system,id=sda"];
    let original = Bare::start(dir, qemu, &args)?;
    let write = |socket: &Path, what: &str| -> Result<()> {
        for command in [&format!("write -P {what}"), "flush"] {
            let line = format!("qemu-io system \"{command}\"");
            qmp(socket, "human-monitor-command", json!({ "command-line": line }))?;
        }
        Ok(())
    };
    let holds = |overlay: &Value, bytes: [u8; 2]| -> Result<()> {
        let (overlay, raw) = (overlay.as_str().ok_or("no overlay")?, dir.path("content"));
        convert(Path::new(overlay), Format::Qcow2, &raw, Format::Raw)?;
        let content = fs::read(&raw)?;
        let are = |part: &[u8], byte| part.iter().all(|found| *found == byte);
        assert!(are(&content[..1 << 20], bytes[0]) && are(&content[1 << 20..2 << 20], bytes[1]));
        Ok(())
    };
    let layers = |socket: &Path| -> Result<Value> { Ok(query(socket, "query-block")?[0].clone()) };
    write(&original.socket, "0x11 0 2M")?;
    let before = layers(&original.socket)?;
    assert!(before["qdev"] == "sda" || before["qdev"] == "/machine/peripheral/sda", "{before}");
    let ended = dir.snapback(&["save", "--qmp", text(&original.socket), text(&image)]).succeed()?;
    write(&original.socket, "0x22 0 1M")?;
    let after = layers(&original.socket)?;
    assert_eq!(after["inserted"]["file"], ended.event("ready")?["overlays"][0]);
    assert_eq!(after["inserted"]["image"]["backing-image"]["filename"], text(&disk));
    holds(&after["inserted"]["file"], [0x22, 0x11])?;
    let frozen = fs::read(&disk)?;
    assert!(frozen[..2 << 20].iter().all(|byte| *byte == 0x11));

    let socket = dir.path("reverted.sock");
    let mut server = dir.snapback(&["revert", text(&image), "--qmp", text(&socket)]).start()?;
    let overlay = server.wait("disk")?["overlay"].clone();
    let pid = server.wait("running")?["pid"].as_u64().ok_or("no pid")? as u32;
    server.succeed()?;
    let reverted = layers(&socket)?;
    assert_eq!(reverted["qdev"], before["qdev"]);
    assert_eq!(reverted["inserted"]["image"]["filename"], overlay);
    assert_eq!(reverted["inserted"]["image"]["backing-image"]["filename"], text(&disk));
    write(&socket, "0x33 1M 1M")?;
    holds(&overlay, [0x11, 0x33])?;
    holds(&after["inserted"]["file"], [0x22, 0x11])?;
    assert!(fs::read(&disk)? == frozen);
    qmp(&socket, "quit", json!({}))?;
    wait_gone(pid)
}

/// A guest agent in which nothing is frozen, to hold a save up just before the pause.
struct Agent {
    listener: UnixListener,
    path: PathBuf,
}

impl Agent {
    fn listen(dir: &Dir) -> Result<Agent> {
        let path = dir.path("agent.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Agent { listener, path })
    }

    /// Takes a connection; answers until this command comes, which it leaves unanswered.
    fn until(&self, command: &str) -> Result<UnixStream> {
        loop {
            let (peer, _) = wait_for(SOON, "somebody to talk to the agent", || {
                Ok(self.listener.accept().ok())
            })?;
            peer.set_read_timeout(Some(SOON))?;
            let mut lines = BufReader::new(peer.try_clone()?);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line)? > 0 {
                let request: Value =
                    serde_json::from_slice(line.strip_prefix(b"\xff").unwrap_or(&line))?;
                line.clear();
                if request["execute"] == command {
                    return Ok(peer);
                }
                answer(&peer, &json!({ "return": request["arguments"]["id"] }))?;
            }
        }
    }
}

fn answer(mut peer: &UnixStream, answer: &Value) -> Result<()> {
    Ok(peer.write_all(format!("{answer}\n").as_bytes())?)
}

/// Starts a save and brings it to just before the pause: what `then` does to QEMU
/// happens after all checks and preparations.
fn just_before_the_pause(
    dir: &Dir,
    watched: &Watched,
    then: impl FnOnce(&mut Qmp) -> Result<()>,
) -> Result<Running> {
    let agent = Agent::listen(dir)?;
    let saving = watched.save(dir).with(&["--quiesce", text(&agent.path)]).start()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    then(&mut Qmp::connect(&watched.side)?)?;
    answer(&peer, &json!({ "return": 1 }))?;
    drop(peer);
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 1 }))?;
    Ok(saving)
}

fn whatever_fails_the_disks_are_as_before(dir: &Dir, qemu: Qemu) -> Result<()> {
    let watched = Watched::start(dir, qemu, &[])?;
    // QEMU can't switch the disks.
    let saving = just_before_the_pause(dir, &watched, |qmp| {
        let overlay = overlay_node(qmp)?;
        qmp.execute("blockdev-del", json!({ "node-name": overlay })).map(drop)
    })?;
    let refusal = saving.end()?.failure()?;
    assert!(refusal.contains("can't switch the disks"), "{refusal}");
    watched.is_as_before(dir)?;

    // Interrupted once the guest goes on in its overlay.
    let mut saving = watched.save(dir).start()?;
    saving.wait("moment")?;
    saving.signal(libc::SIGINT);
    let ended = saving.end()?;
    match ended.code {
        Some(0) => {
            // It was faster: the image is whole, and its overlay stays. Back to the start.
            fs::remove_file(dir.path("vm.snap"))?;
            fold(&watched)?;
        }
        _ => {
            assert!(ended.failure()?.contains("interrupted"), "{ended:?}");
            ended.event("folded")?;
        }
    }
    watched.is_as_before(dir)?;

    // The disk's folder takes no new files.
    let refusal = watched.save(dir).with(&["--overlay-dir", "/proc"]).fail()?;
    assert!(refusal.contains("--overlay-dir"), "{refusal}");
    watched.is_as_before(dir)?;

    // QEMU refuses to migrate, its disks switched already: a node of this format forbids it.
    let file = dir.path("strange.vdi");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "vdi", text(&file), "1M"]))?;
    let saving = just_before_the_pause(dir, &watched, |qmp| {
        let file = json!({ "driver": "file", "filename": file });
        let node = json!({ "driver": "vdi", "node-name": "strange", "file": file });
        qmp.execute("blockdev-add", node).map(drop)
    })?;
    let ended = saving.end()?;
    let refusal = ended.failure()?;
    assert!(refusal.contains("vdi") && refusal.contains("live migration"), "{refusal}");
    assert_eq!(ended.event("folded")?["disk"], format!("system ({})", text(&watched.disk)));
    watched.is_as_before(dir)
}

fn a_guest_that_somebody_stops_meanwhile_is_left_alone(dir: &Dir, qemu: Qemu) -> Result<()> {
    let watched = Watched::start(dir, qemu, &[])?;
    // While it is made ready.
    let agent = Agent::listen(dir)?;
    let saving = watched.save(dir).with(&["--quiesce", text(&agent.path)]).start()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    stop(&watched.side)?;
    answer(&peer, &json!({ "return": 1 }))?;
    drop(peer);
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 1 }))?;
    let refusal = saving.end()?.failure()?;
    assert!(refusal.contains("`paused`") && refusal.contains("not by us"), "{refusal}");
    assert_eq!(query_status(&watched.side)?, "paused");
    cont(&watched.side)?;
    watched.is_as_before(dir)?;

    // While the save that is killed had not come to stop it.
    let by_hand = ["--no-keeper", "--quiesce", text(&agent.path)];
    let saving = watched.save(dir).with(&by_hand).start()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    saving.signal(libc::SIGKILL);
    drop((saving, peer));
    stop(&watched.side)?;
    let recovering = watched.save(dir).with(&["--recover"]).start()?;
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 1 }))?;
    recovering.succeed()?;
    assert_eq!(query_status(&watched.side)?, "paused");
    cont(&watched.side)?;
    watched.is_as_before(dir)?;

    // The same the other way round.
    stop(&watched.side)?;
    let saving =
        just_before_the_pause(dir, &watched, |qmp| qmp.execute("cont", json!({})).map(drop))?;
    assert!(saving.end()?.failure()?.contains("`running`"));
    watched.is_as_before(dir)?;

    // A device that came after the checks is in no record.
    let saving = just_before_the_pause(dir, &watched, |qmp| {
        qmp.execute("device_add", json!({ "driver": "e1000" })).map(drop)
    })?;
    let refusal = saving.end()?.failure()?;
    assert!(refusal.contains("plugged in or removed"), "{refusal}");
    watched.is_as_before(dir)
}

/// The first error is told, then what could not be undone; recovering does it once it can
/// be done.
fn what_cant_be_undone_is_named(dir: &Dir, qemu: Qemu) -> Result<()> {
    let watched = Watched::start(dir, qemu, &[])?;
    // Settings: QEMU takes zero-copy-send only without compression.
    let set = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let both = |on| json!({ "capabilities": [set("multifd", on), set("zero-copy-send", on)] });
    let compress = |how: &str| json!({ "multifd-compression": how });
    qmp(&watched.side, "migrate-set-capabilities", both(true))?;
    let capabilities = query(&watched.side, "query-migrate-capabilities")?;
    let saving = just_before_the_pause(dir, &watched, |qmp| {
        let overlay = overlay_node(qmp)?;
        qmp.execute("blockdev-del", json!({ "node-name": overlay }))?;
        qmp.execute("migrate-set-parameters", compress("zlib")).map(drop)
    })?;
    let refusal = saving.end()?.failure()?;
    assert!(refusal.starts_with("QEMU can't switch the disks"), "{refusal}");
    assert!(refusal.contains("settings were not put back"), "{refusal}");
    let refusal = watched.save(dir).with(&["--recover"]).fail()?;
    assert!(refusal.contains("settings were not put back"), "{refusal}");
    qmp(&watched.side, "migrate-set-parameters", compress("none"))?;
    assert_eq!(watched.recover(dir)?, "undone");
    assert_eq!(query(&watched.side, "query-migrate-capabilities")?, capabilities);
    qmp(&watched.side, "migrate-set-capabilities", both(false))?;
    watched.is_as_before(dir)?;

    // An overlay over which somebody else has put his own. The command that is named commits it.
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    kill_at_its_step(watched.save(dir).with(&["--no-keeper"]).env(STOP_AT, "moment").start()?)?;
    let theirs = dir.path("theirs.qcow2");
    let mut side = Qmp::connect(&watched.side)?;
    let overlay = overlay_node(&mut side)?;
    let snapshot = json!({
        "node-name": overlay, "snapshot-file": theirs, "snapshot-node-name": "theirs",
        "format": "qcow2",
    });
    side.execute("blockdev-snapshot-sync", snapshot)?;
    let refusal = watched.save(dir).with(&["--recover"]).fail()?;
    assert!(refusal.contains("node `theirs` lies over it"), "{refusal}");
    let commands = refusal.split('`').filter_map(|part| serde_json::from_str::<Value>(part).ok());
    let commit = commands.into_iter().next().ok_or("no command is named")?;
    assert_eq!(
        (&commit["execute"], &commit["arguments"]["device"]),
        (&json!("block-commit"), &json!("theirs"))
    );
    side.execute("block-commit", commit["arguments"].clone())?;
    wait_for(SOON, "a commit to end", || {
        Ok((side.execute("query-jobs", json!({}))? == json!([])).then_some(()))
    })?;
    drop(side);
    assert_eq!(watched.recover(dir)?, "undone");
    assert_eq!(overlay_files(dir)?, Vec::<String>::new());
    assert_eq!(query_status(&watched.side)?, "running");
    Ok(())
}

/// On QEMU before 9.0, by an ordinary migration.
fn a_paused_guest_is_saved_with_its_disks(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = Disk::new("disk", &dir.path("disk.raw"));
    disk.make(8)?;
    let mut guest = Guest::boot(&GuestOptions {
        qemu,
        mib: 128,
        fill: Fill::Mib(16),
        writers: 0,
        disks: vec![disk],
        ..Default::default()
    })?;
    let ask = |guest: &mut crate::support::Contact, question: &str| {
        guest.oracle.ask(&format!("disk {question}"))
    };
    guest.oracle.ask("idle")?;
    ask(&mut guest, "write /dev/vda 64 1")?;
    let sum = guest.oracle.sum()?;
    stop(&guest.qmp_path)?;
    let files = || -> Result<Value> {
        Ok(query(&guest.qmp_path, "query-block")?[0]["inserted"]["file"].clone())
    };
    let before = files()?;

    if cfg!(debug_assertions) {
        // Interrupted while it is sent, and when all has been.
        for step in ["migrating", "received"] {
            let saving = dir.save(&guest, "vm.snap").env(STOP_AT, step).start()?;
            saving.wait_stopped()?;
            saving.signal(libc::SIGINT);
            saving.signal(libc::SIGCONT);
            let refusal = saving.end()?.failure()?;
            assert!(refusal.contains("interrupted"), "{step}: {refusal}");
            if query_status(&guest.qmp_path)? == "postmigrate" {
                // QEMU has given the disks up, and takes them back when it goes on.
                assert!(refusal.contains("let the guest go on (`cont`)"), "{refusal}");
                cont(&guest.qmp_path)?;
                stop(&guest.qmp_path)?;
                dir.save(&guest, "vm.snap").with(&["--recover"]).succeed()?;
            }
            assert_eq!(query_status(&guest.qmp_path)?, "paused", "{step}");
            assert_eq!(files()?, before, "{step}");
            assert_eq!(dir.names(".")?, ["disk.raw"], "{step}");
        }
    }

    let ended = dir.save(&guest, "vm.snap").succeed()?;
    assert_eq!(ended.steps(), ["checked", "ready", "moment", "saved"]);
    assert!(ended.event("moment")?["pause_ms"].is_null());
    assert_ne!(files()?, before);
    // It stands still, and goes on where it stood, in its overlay.
    let state = query_status(&guest.qmp_path)?;
    assert!(["paused", "postmigrate"].contains(&state.as_str()), "{state}");
    cont(&guest.qmp_path)?;
    assert_eq!(guest.oracle.sum()?, sum);
    ask(&mut guest, "write /dev/vda 64 2")?;

    let mut reverted = dir.reverted(&dir.path("vm.snap"), &guest.dir, "reverted")?;
    assert_eq!(query_status(&reverted.qmp_path)?, "paused");
    cont(&reverted.qmp_path)?;
    reverted.resident()?;
    assert_eq!(reverted.oracle.sum()?, sum);
    assert_eq!(ask(&mut reverted, "check /dev/vda 64 1")?, "ok");
    assert_eq!(ask(&mut guest, "check /dev/vda 64 2")?, "ok");
    Ok(())
}

/// qemu-guest-agent in a Debian guest, by its serial port.
fn a_real_agent_freezes_and_thaws(dir: &Dir) -> Result<()> {
    let disk = debian::make_disk(&dir.path("disk.qcow2"))?;
    let mut guest = Guest::boot(&debian::options(Qemu::V7, disk))?;
    let agent = guest.dir.join("serial3.sock");
    let save = || dir.save(&guest, "vm.snap").with(&["--quiesce", text(&agent)]);
    let ended = save().succeed()?;
    let steps = ["checked", "ready", "frozen", "moment", "thawed", "saved"];
    assert_eq!(ended.steps(), steps);
    assert!(ended.event("frozen")?["filesystems"].as_u64().is_some_and(|count| count > 0));
    assert_eq!(frozen(&agent)?, "thawed");
    debian::run(&mut guest.oracle, "touch /root/first && sync")?;
    fs::remove_file(dir.path("vm.snap"))?;

    if cfg!(debug_assertions) {
        let saving = dir.save(&guest, "vm.snap").with(&["--quiesce", text(&agent)]);
        let mut saving = saving.env(STOP_AT, "ready").start()?;
        saving.wait("frozen")?;
        saving.wait_stopped()?;
        assert_eq!(frozen(&agent)?, "frozen");
        saving.signal(libc::SIGINT);
        saving.signal(libc::SIGCONT);
        let ended = saving.end()?;
        assert!(ended.failure()?.contains("interrupted"), "{ended:?}");
        ended.event("thawed")?;
        assert_eq!(frozen(&agent)?, "thawed");
        debian::run(&mut guest.oracle, "touch /root/second && sync")?;

        // Killed between the moment and the thaw: this QEMU leaves memory write-protected,
        // and its guest's agent can't answer before that is mended.
        let saving = dir.save(&guest, "vm.snap").with(&["--quiesce", text(&agent)]);
        kill_at_its_step(saving.with(&["--no-keeper"]).env(STOP_AT, "released").start()?)?;
        let ended = dir.save(&guest, "vm.snap").with(&["--recover"]).succeed()?;
        ended.event("thawed")?;
        assert_eq!(ended.event("recovered")?["outcome"], "undone");
        assert_eq!(frozen(&agent)?, "thawed");
        debian::run(&mut guest.oracle, "touch /root/third && sync")?;
    }
    Ok(())
}

/// What an agent says of its guest's file systems.
fn frozen(agent: &Path) -> Result<String> {
    let mut peer = UnixStream::connect(agent)?;
    peer.set_read_timeout(Some(SOON))?;
    peer.write_all(b"\xff{\"execute\":\"guest-fsfreeze-status\"}\n")?;
    for line in BufReader::new(peer).split(b'\n') {
        // What was meant for others may come first.
        if let Ok(answer) = serde_json::from_slice::<Value>(&line?)
            && let Some(status) = answer["return"].as_str()
        {
            return Ok(status.to_owned());
        }
    }
    Err("the agent hung up".into())
}

/// The name of the overlay's node.
fn overlay_node(qmp: &mut Qmp) -> Result<String> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let nodes = nodes.as_array().ok_or("no nodes")?.iter();
    let mut names = nodes.filter_map(|node| node["node-name"].as_str());
    let found = names.find(|name| name.starts_with("snap-") && !name.ends_with("-file"));
    Ok(found.ok_or("no overlay")?.to_owned())
}

/// Folds the only disk's overlay back by hand.
fn fold(watched: &Watched) -> Result<()> {
    let mut qmp = Qmp::connect(&watched.side)?;
    let overlay = overlay_node(&mut qmp)?;
    let file = qmp.execute("query-block", json!({}))?[0]["inserted"]["file"].clone();
    qmp.execute("block-commit", json!({ "job-id": "fold", "device": overlay }))?;
    wait_for(SOON, "a commit to be ready", || {
        let jobs = qmp.execute("query-jobs", json!({}))?;
        Ok((jobs[0]["status"] == "ready").then_some(()))
    })?;
    qmp.execute("job-complete", json!({ "id": "fold" }))?;
    wait_for(SOON, "a commit to end", || {
        Ok((qmp.execute("query-jobs", json!({}))? == json!([])).then_some(()))
    })?;
    for node in [overlay.clone(), format!("{overlay}-file")] {
        qmp.execute("blockdev-del", json!({ "node-name": node }))?;
    }
    Ok(fs::remove_file(Path::new(file.as_str().ok_or("no file")?))?)
}

fn a_killed_save_is_recovered(dir: &Dir, qemu: Qemu) -> Result<()> {
    let watched = Watched::start(dir, qemu, &[])?;
    assert_eq!(watched.recover(dir)?, "nothing");

    // Before the pause: nothing but files and open nodes.
    let by_hand = ["--no-keeper"];
    let mut saving = watched.save(dir).with(&by_hand).start()?;
    saving.wait("ready")?;
    saving.signal(libc::SIGKILL);
    drop(saving);
    recover_whatever(dir, &watched)?;

    // Frozen, just before the pause.
    let agent = Agent::listen(dir)?;
    let saving = watched.save(dir).with(&by_hand).with(&["--quiesce", "agent.sock"]).start()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    saving.signal(libc::SIGKILL);
    drop((saving, peer));
    // What the journal says is heeded: no other save, and the agent is told.
    let refusal = watched.save(dir).fail()?;
    assert!(refusal.contains("--recover"), "{refusal}");
    // With the agent gone, all else is undone none the less.
    fs::rename(&agent.path, dir.path("away"))?;
    let refusal = watched.save(dir).with(&["--recover"]).fail()?;
    let named = [text(&agent.path), "may still be frozen", "--recover"];
    assert!(named.iter().all(|part| refusal.contains(part)), "{refusal}");
    fs::rename(dir.path(".vm.snap.journal"), dir.path("kept"))?;
    watched.is_as_before(dir)?;
    fs::rename(dir.path("kept"), dir.path(".vm.snap.journal"))?;
    fs::rename(dir.path("away"), &agent.path)?;
    let recovering = watched.save(dir).with(&["--recover"]).start()?;
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 1 }))?;
    recovering.succeed()?.event("thawed")?;
    watched.is_as_before(dir)?;

    // In the pause, wherever that strikes, and while memory is being written. QEMU before
    // 8.1 does not take its protection off memory then: recovering does.
    for _ in 0..8 {
        let mut side = Qmp::connect(&watched.side)?;
        let saving = watched.save(dir).with(&by_hand).start()?;
        let seen = |side: &mut Qmp| {
            side.execute("query-status", json!({}))?;
            Ok(side.events().iter().any(|event| event["event"] == "STOP").then_some(()))
        };
        wait_for(SOON, "the pause", || seen(&mut side))?;
        saving.signal(libc::SIGKILL);
        drop((saving, side));
        recover_whatever(dir, &watched)?;
    }
    let mut saving = watched.save(dir).with(&by_hand).start()?;
    saving.wait("moment")?;
    saving.signal(libc::SIGKILL);
    drop(saving);
    recover_whatever(dir, &watched)?;

    // QEMU has ended as well: its overlay is named, and not touched.
    let mut saving = watched.save(dir).with(&by_hand).start()?;
    saving.wait("ready")?;
    saving.signal(libc::SIGKILL);
    drop(saving);
    let overlays = || overlay_files(dir);
    if overlays()?.is_empty() || dir.path("vm.snap").exists() {
        return Ok(());
    }
    let socket = watched.bare.socket.clone();
    drop(watched);
    let recover = || {
        let image = dir.path("vm.snap");
        dir.snapback(&["save", "--qmp", text(&socket), text(&image), "--recover"])
    };
    let refusal = recover().fail()?;
    let left = overlays()?;
    assert!(refusal.contains("qemu-img commit") && refusal.contains(&left[0]), "{refusal}");
    left.iter().try_for_each(|name| fs::remove_file(dir.path(name)))?;
    recover().succeed()?;
    assert!(!dir.names(".")?.iter().any(|name| name.contains("journal")));
    Ok(())
}

fn overlay_files(dir: &Dir) -> Result<Vec<String>> {
    let names = dir.names(".")?.into_iter();
    Ok(names.filter(|name| name.contains(".snap-")).collect())
}

/// Recovers from a save that was killed, unless that had come to its end before.
fn recover_whatever(dir: &Dir, watched: &Watched) -> Result<()> {
    let outcome = watched.recover(dir)?;
    if dir.path("vm.snap").exists() {
        // The kill came too late for the save, whatever the journal had to say.
        fs::remove_file(dir.path("vm.snap"))?;
        fold(watched)?;
    } else {
        assert_eq!(outcome, "undone");
    }
    watched.is_as_before(dir)
}

fn a_guest_agent_is_made_to_thaw(dir: &Dir, qemu: Qemu) -> Result<()> {
    let watched = Watched::start(dir, qemu, &[])?;
    // It works, and in this order.
    let saving = just_before_the_pause(dir, &watched, |_| Ok(()))?;
    let ended = saving.succeed()?;
    let steps = ["checked", "ready", "frozen", "moment", "thawed", "saved"];
    assert_eq!(ended.steps(), steps);
    fs::remove_file(dir.path("vm.snap"))?;
    fold(&watched)?;
    watched.is_as_before(dir)?;

    // It refuses.
    let agent = Agent::listen(dir)?;
    let quiesce = || watched.save(dir).with(&["--quiesce", text(&agent.path)]).start();
    let saving = quiesce()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    answer(&peer, &json!({ "error": { "class": "GenericError", "desc": "too cold" } }))?;
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 0 }))?;
    let refusal = saving.end()?.failure()?;
    assert!(refusal.contains("too cold"), "{refusal}");
    watched.is_as_before(dir)?;

    // It never answers, and the user has enough.
    let saving = quiesce()?;
    let silent = agent.until("guest-fsfreeze-freeze")?;
    saving.signal(libc::SIGINT);
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 0 }))?;
    assert!(saving.end()?.failure()?.contains("interrupted"));
    drop(silent);
    watched.is_as_before(dir)?;

    // The user has enough while it thaws: that it was asked to is not enough.
    let saving = quiesce()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    answer(&peer, &json!({ "return": 1 }))?;
    drop(peer);
    let unanswered = agent.until("guest-fsfreeze-thaw")?;
    saving.signal(libc::SIGINT);
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 1 }))?;
    let ended = saving.end()?;
    assert!(ended.failure()?.contains("interrupted"), "{ended:?}");
    ended.event("thawed")?;
    drop(unanswered);
    watched.is_as_before(dir)?;

    // It refuses to thaw. The image is whole, and the guest is thawed as soon as may be.
    let saving = quiesce()?;
    let peer = agent.until("guest-fsfreeze-freeze")?;
    answer(&peer, &json!({ "return": 1 }))?;
    drop(peer);
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "error": { "class": "GenericError", "desc": "too warm" } }))?;
    let ended = saving.end()?;
    ended.event("saved")?;
    let told = ended.failure()?;
    let parts = ["the image is whole", "too warm", "--recover"];
    assert!(parts.iter().all(|part| told.contains(part)), "{told}");
    let recovering = watched.save(dir).with(&["--recover"]).start()?;
    let peer = agent.until("guest-fsfreeze-thaw")?;
    answer(&peer, &json!({ "return": 1 }))?;
    let ended = recovering.succeed()?;
    ended.event("thawed")?;
    assert_eq!(ended.event("recovered")?["outcome"], "saved");
    fs::remove_file(dir.path("vm.snap"))?;
    fold(&watched)?;
    watched.is_as_before(dir)?;

    // There is none.
    let nowhere = dir.path("nowhere.sock");
    let refusal = watched.save(dir).with(&["--quiesce", text(&nowhere)]).fail()?;
    assert!(refusal.contains("nowhere.sock"), "{refusal}");
    watched.is_as_before(dir)
}

fn the_parent_and_the_agent_are_asked_beforehand(dir: &Dir) -> Result<()> {
    let watched = Watched::start(dir, Qemu::V10, &[])?;
    let agent = Agent::listen(dir)?;
    let check = |parent: &str, agent: &Path| {
        let options = ["--parent", parent, "--quiesce", text(agent), "--compress", "none"];
        dir.snapback(&["check", "--qmp", text(&watched.bare.socket), "vm.snap"]).with(&options)
    };
    let item = |ended: &Ended, name: &str| {
        let found = ended.events.iter().find(|event| event["item"] == name);
        let found = found.ok_or_else(|| format!("no {name} in {:?}", ended.said))?;
        let says = found["says"].as_str().unwrap_or_default().to_owned();
        Ok::<_, crate::support::Error>((found["ok"] == true, says))
    };
    let ended = check("nowhere.snap", Path::new("nowhere.sock")).end()?;
    assert!(ended.failure()?.contains("agent, parent"), "{ended:?}");
    assert!(item(&ended, "parent")?.1.contains("nowhere.snap"), "{ended:?}");
    assert!(item(&ended, "agent")?.1.contains("nowhere.sock"), "{ended:?}");

    let parent = dir.path("parent.snap");
    let save = ["save", "--qmp", text(&watched.bare.socket), text(&parent), "--memory-only"];
    dir.snapback(&save).succeed()?;
    for enabled in [false, true] {
        let checking = check(text(&parent), &agent.path).start()?;
        let peer = agent.until("guest-info")?;
        let freeze = json!({ "name": "guest-fsfreeze-freeze", "enabled": enabled });
        let info = json!({ "version": "7.2.0", "supported_commands": [freeze] });
        answer(&peer, &json!({ "return": info }))?;
        let ended = checking.end()?;
        assert_eq!(item(&ended, "parent")?, (true, text(&parent).to_owned()));
        let (ok, says) = item(&ended, "agent")?;
        assert_eq!((ok, ended.code), (enabled, Some(i32::from(!enabled))), "{ended:?}");
        assert!(says.contains(if enabled { "7.2.0" } else { "turned it off" }), "{says}");
    }
    fs::remove_file(&parent)?;
    watched.is_as_before(dir)
}

/// QEMU is started as root and goes on as somebody else. The guest is paused: a user without
/// rights has no userfaultfd, and QEMU 7.2 can do without then.
fn a_qemu_that_has_changed_its_user_can_open_its_overlay(dir: &Dir) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    fs::set_permissions(dir.path("."), fs::Permissions::from_mode(0o711))?;
    let watched = Watched::start(dir, Qemu::V7, &["-runas", "nobody"])?;
    qmp(&watched.side, "stop", json!({}))?;
    let ended = watched.save(dir).succeed()?;
    let overlay = ended.event("ready")?["overlays"][0].as_str().ok_or("no overlay")?;
    let nobody = nix::unistd::User::from_name("nobody")?.ok_or("there is no nobody")?;
    let meta = fs::metadata(overlay)?;
    assert_eq!((meta.uid(), meta.gid()), (nobody.uid.as_raw(), nobody.gid.as_raw()));
    assert_eq!(meta.mode() & 0o777, 0o600);
    Ok(())
}

fn what_stands_in_the_way_is_told_item_by_item(dir: &Dir) -> Result<()> {
    for qemu in Qemu::ALL {
        let watched = Watched::start(dir, qemu, &[])?;
        let ask = |socket: &Path| dir.snapback(&["check", "--qmp", text(socket)]);
        let items = ask(&watched.bare.socket).with(&["vm.snap"]).succeed()?.events;
        assert!(items.len() >= 12 && items.iter().all(|item| item["ok"] == true), "{items:?}");
        watched.is_as_before(dir)?;
        assert!(query(&watched.side, "query-migrate")?.get("status").is_none());
        drop(watched);

        // On a file that is no memory, with a device and a disk that can't be saved.
        let file = dir.path("memory");
        let backend =
            format!("memory-backend-file,id=m,size=64M,share=on,mem-path={}", text(&file));
        let copy = dir.path("copy.raw");
        File::create(&copy)?.set_len(1 << 20)?;
        let lost = format!("if=virtio,format=raw,snapshot=on,file={}", text(&copy));
        let mut args = vec!["-device", "nvme,serial=x", "-drive", &lost];
        let on_disk = ["-object", &backend, "-machine", "memory-backend=m"];
        let is_memory = matches!(
            nix::sys::statfs::statfs(dir.path(".").as_path())?.filesystem_type(),
            nix::sys::statfs::TMPFS_MAGIC | nix::sys::statfs::HUGETLBFS_MAGIC
        );
        if !is_memory {
            args.extend(on_disk);
        }
        let watched = Watched::start(dir, qemu, &args)?;
        let ended = ask(&watched.bare.socket).end()?;
        let refusal = ended.failure()?;
        let said = |item: &str| {
            let found = ended.events.iter().find(|event| event["item"] == item);
            let found = found.unwrap_or_else(|| panic!("no {item} in {:?}", ended.said));
            assert!(found["ok"] == false && refusal.contains(item), "{found}");
            found["says"].as_str().unwrap().to_owned()
        };
        assert!(said("devices").contains("nvme"));
        assert!(said("disks").contains("--exclude-disk"));
        if !is_memory {
            assert!(said("memory").contains(text(&file)));
            said("background-snapshot");
        }
        // A save says the first of it.
        assert!(watched.save(dir).fail()?.contains("nvme"));
        watched.is_as_before(dir)?;
        fs::remove_file(&copy)?;
    }
    Ok(())
}

fn an_incomplete_guest_is_waited_for(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = crate::shared::shared(qemu)?;
    let to = dir.make("reverted")?;
    let slow = dir.revert(&shared.image, &shared.from, &to).with(&["--fill-delay", "1000"]);
    let mut reverted = crate::harness::Reverted::of(slow, &to)?;
    let save = || dir.save(&reverted, "vm.snap");
    let refusal = save().with(&["--no-wait"]).fail()?;
    assert!(refusal.contains("not complete yet"), "{refusal}");
    let mut saving = save().start()?;
    saving.wait("waiting")?;
    // Told to hurry, the server fills memory at full speed.
    reverted.server.as_ref().ok_or("no server")?.signal(libc::SIGINT);
    reverted.server.take().ok_or("no server")?.end()?;
    saving.wait("saved")?;
    saving.succeed()?;
    check(&mut reverted)?;
    let image = dir.path("vm.snap");
    dir.snapback(&["verify", text(&image)]).succeed()?;
    Ok(())
}

/// What a pause with two disks is made of, printed: for a quiet machine with memory for
/// it. `SNAPBACK_TEST_PAUSE_MIB` is the guest's memory, 512 when it is not set.
#[test]
#[ignore = "measures"]
fn the_parts_of_the_pause() -> Result<()> {
    let mib = std::env::var("SNAPBACK_TEST_PAUSE_MIB").unwrap_or_else(|_| "512".into());
    let gib = mib.parse::<f64>()? / 1024.0;
    for qemu in Qemu::ALL {
        for backend in ["memory-backend-ram", "memory-backend-memfd,share=on"] {
            for used in ["off", "on"] {
                crate::harness::in_a_folder(|dir| {
                    let memory = format!("{backend},id=m,size={mib}M,prealloc={used}");
                    let data = dir.path("data.raw");
                    File::create(&data)?.set_len(4 << 20)?;
                    let drive = format!("if=virtio,format=raw,file={}", text(&data));
                    let args = ["-m", &mib, "-object", &memory, "-machine", "memory-backend=m"];
                    let watched =
                        Watched::start(dir, qemu, &[&args[..], &["-drive", &drive]].concat())?;
                    for save in 1..=3 {
                        let ended = watched.save(dir).with(&["--force"]).succeed()?;
                        let parts = ended.event("moment")?["pause_parts"].clone();
                        let walk = parts["walk_ms"].as_f64().unwrap_or_default() / gib;
                        println!(
                            "{qemu:?} {backend} {mib} MiB, used {used}, save {save}: {parts}, \
                             walk {walk:.1} ms/GiB"
                        );
                    }
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}
