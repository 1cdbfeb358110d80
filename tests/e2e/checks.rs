//! What is asked before a guest is touched, and what the program tells of itself.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::{Value, json};

use crate::bare::{Bare, query};
use crate::harness::{Dir, Reverted, text};
use crate::shared::{MIB, borrow, options, shared};
use crate::support::{Qemu, Result, qmp, query_status};
use crate::{tests, tests_on_both};

tests! {
    a_recorded_control_socket_in_use_gives_way
    sockets_in_use_are_refused_by_name
    an_image_tells_what_it_holds
    wrong_usage_ends_with_code_2
    a_qemu_that_is_too_old_is_told
    memory_that_another_process_writes_is_told
    a_qemu_without_the_right_to_userfaultfd_is_told
    a_folder_without_room_for_overlays_is_told
}

tests_on_both! {
    disks_can_be_left_out
    what_blocks_a_migration_is_told_in_qemus_words
    migration_settings_are_put_back
    an_image_is_replaced_only_by_force
}

fn disks_can_be_left_out(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = dir.path("disk.raw");
    File::create(&disk)?.set_len(1 << 20)?;
    let drive = format!("if=none,id=system,format=raw,file={}", text(&disk));
    let args = ["-drive", &drive, "-device", "virtio-blk-pci,drive=system"];
    let original = Bare::start(dir, qemu, &args)?;
    let image = dir.path("vm.snap");
    let save = || dir.snapback(&["save", "--qmp", text(&original.socket), text(&image)]);

    let ended = save().with(&["--memory-only", "--read", "stream"]).succeed()?;
    let left_out = ended.event("checked")?["uncaptured_disks"].to_string();
    assert!(left_out.contains("system"), "{left_out}");
    // QEMU alone has paused it, and no file was made.
    assert!(ended.event("moment")?["pause_parts"].is_null());
    assert_eq!(dir.names(".")?, ["bare.sock", "bare.stderr", "disk.raw", "vm.snap"]);
    let info = dir.snapback(&["info", text(&image)]).succeed()?.events.remove(0);
    assert!(info["uncaptured_disks"].to_string().contains(text(&disk)), "{info}");

    // QEMU locks its disks: it says itself that the original has this one.
    let new = dir.path("new.sock");
    let revert = || dir.snapback(&["revert", text(&image), "--qmp", text(&new)]);
    let refusal = revert().fail()?;
    assert!(refusal.contains("lock") && refusal.contains(text(&disk)), "{refusal}");
    drop(original);
    let mut server = revert().start()?;
    let pid = server.wait("running")?["pid"].as_u64().ok_or("no pid")?;
    server.succeed()?;
    assert_eq!(query_status(&new)?, "running");
    qmp(&new, "quit", json!({}))?;
    crate::harness::wait_gone(pid as u32)
}

fn what_blocks_a_migration_is_told_in_qemus_words(dir: &Dir, qemu: Qemu) -> Result<()> {
    let backend = "memory-backend-ram,id=peers,size=1M,share=on";
    let args = ["-object", backend, "-device", "ivshmem-plain,memdev=peers"];
    let original = Bare::start(dir, qemu, &args)?;
    let image = dir.path("vm.snap");
    let save = dir.snapback(&["save", "--qmp", text(&original.socket), text(&image)]);
    let refusal = save.fail()?;
    assert!(refusal.contains("Migration is disabled when using feature 'peer mode'"), "{refusal}");
    assert!(!image.exists());
    assert!(original.query("query-migrate")?.get("status").is_none());
    assert_eq!(query_status(&original.socket)?, "running");
    Ok(())
}

fn migration_settings_are_put_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let original = Bare::start(dir, qemu, &[])?;
    let names = ["postcopy-ram", "auto-converge", "return-path", "events"];
    let on: Vec<_> = names.map(|name| json!({"capability": name, "state": true})).into();
    let socket = &original.socket;
    qmp(socket, "migrate-set-capabilities", json!({"capabilities": on}))?;
    qmp(socket, "migrate-set-parameters", json!({"max-bandwidth": 1 << 20}))?;
    let settings = || {
        let parameters = original.query("query-migrate-parameters")?;
        Ok::<_, crate::support::Error>((original.query("query-migrate-capabilities")?, parameters))
    };
    let before = settings()?;
    let image = dir.path("vm.snap");
    dir.snapback(&["save", "--qmp", text(socket), text(&image)]).succeed()?;
    assert_eq!(settings()?, before);
    // The same for a paused guest, which old QEMUs save by an ordinary migration.
    qmp(socket, "stop", json!({}))?;
    dir.snapback(&["save", "--qmp", text(socket), text(&image), "--force"]).succeed()?;
    assert_eq!(settings()?, before);
    Ok(())
}

fn an_image_is_replaced_only_by_force(dir: &Dir, qemu: Qemu) -> Result<()> {
    let original = Bare::start(dir, qemu, &[])?;
    let image = dir.path("vm.snap");
    fs::write(&image, "something dear")?;
    let save = || dir.snapback(&["save", "--qmp", text(&original.socket), text(&image)]);
    let refusal = save().fail()?;
    assert!(refusal.contains("exists already") && refusal.contains("vm.snap"), "{refusal}");
    assert_eq!(fs::read(&image)?, b"something dear");
    assert!(original.query("query-migrate")?.get("status").is_none());
    let ended = save().with(&["--force", "--compress", "none"]).succeed()?;
    // However fast it went, nothing was left untold.
    assert_eq!(ended.steps(), ["checked", "moment", "saved"]);
    assert!(ended.event("moment")?["pause_ms"].is_number());
    assert_eq!(fs::metadata(&image)?.mode() & 0o777, 0o600);
    dir.snapback(&["verify", text(&image)]).succeed()?;
    Ok(())
}

fn a_recorded_control_socket_in_use_gives_way(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let original = borrow(Qemu::V10)?;
    let to = dir.make("reverted")?;
    // Everything is elsewhere but the control socket.
    let moved = |name: &str| format!("{}={}", text(&shared.from.join(name)), text(&to.join(name)));
    let (console, questions) = (moved("serial0.log"), moved("serial1.sock"));
    let revert = dir.snapback(&["revert", text(&shared.image), "--path", &console]).with(&[
        "--path",
        &questions,
        "--qmp",
        text(&to.join("qmp.sock")),
    ]);
    let mut reverted = Reverted::of(revert, &to)?;
    let ended = reverted.resident()?;
    let note = ended.event("note")?["what"].to_string();
    assert!(note.contains(text(&original.qmp_path)), "{note}");
    reverted.check(&shared.nonce)?;
    // Two guests, each with a control socket of its own.
    let threads =
        |socket| query(socket, "query-cpus-fast").map(|cpus| cpus[0]["thread-id"].clone());
    assert_ne!(threads(&original.qmp_path)?, threads(&reverted.qmp_path)?);
    Ok(())
}

fn sockets_in_use_are_refused_by_name(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let mut original = borrow(Qemu::V7)?;
    let refusal = dir.snapback(&["revert", text(&shared.image)]).fail()?;
    assert!(refusal.contains(text(&shared.from.join("serial1.sock"))), "{refusal}");
    assert!(refusal.contains("living process") && refusal.contains("--path"), "{refusal}");

    let to = dir.make("reverted")?;
    let asked = ["--qmp", text(&original.qmp_path)];
    let refusal = dir.revert(&shared.image, &shared.from, &to).with(&asked).fail()?;
    assert!(refusal.contains(text(&original.qmp_path)), "{refusal}");
    assert!(refusal.contains("--qmp") && refusal.contains("living process"), "{refusal}");
    // Not even a file that is no socket is taken away.
    let file = dir.path("file");
    fs::write(&file, "something dear")?;
    let asked = ["--qmp", text(&file)];
    dir.revert(&shared.image, &shared.from, &to).with(&asked).fail()?;
    assert_eq!(fs::read(&file)?, b"something dear");
    assert!(dir.names("reverted")?.is_empty());
    crate::harness::check(&mut original)
}

fn an_image_tells_what_it_holds(dir: &Dir) -> Result<()> {
    for qemu in Qemu::ALL {
        let shared = shared(qemu)?;
        let info = dir.snapback(&["info", text(&shared.image)]).succeed()?.events.remove(0);
        let (major, minor) = qemu.version();
        assert!(info["qemu"].as_str().unwrap().starts_with(&format!("{major}.{minor}.")), "{info}");
        assert_eq!(info["binary"], text(&qemu.binary().canonicalize()?));
        assert_eq!(info["machine_type"], format!("pc-i440fx-{major}.{minor}"));
        assert_eq!((&info["running"], &info["uncaptured_disks"]), (&json!(true), &json!([])));
        assert_eq!(info["working_folder"], text(&shared.from));
        let line = info["command_line"].as_array().ok_or("no command line")?;
        assert!(
            line.contains(&json!("-kernel"))
                && line.contains(&json!(options(qemu).mib.to_string()))
        );
        let ram = json!({"name": "pc.ram", "bytes": MIB << 20, "page_size": 4096});
        assert!(info["blocks"].as_array().ok_or("no blocks")?.contains(&ram), "{info}");
        assert_eq!(info["image_bytes"], fs::metadata(&shared.image)?.len());
        assert!(info["pause_ms"].as_f64().is_some_and(|ms| ms > 0.0));
        assert!(info["ratio"].as_f64().is_some_and(|ratio| ratio > 1.0));
        let number = |name: &str| info[name].as_u64().unwrap_or_default();
        assert_eq!(number("data_bytes"), number("data_pages") * 4096);
        let blocks = info["blocks"].as_array().unwrap().iter();
        let pages: u64 = blocks.map(|block| block["bytes"].as_u64().unwrap() / 4096).sum();
        assert_eq!(number("data_pages") + number("zero_pages"), pages);

        let verified = dir.snapback(&["verify", text(&shared.image)]).succeed()?;
        assert_eq!(verified.event("verified")?["pages"], pages);
        assert_eq!(fs::metadata(&shared.image)?.mode() & 0o777, 0o600);
        // For people, the same in lines.
        let shown = dir.snapback(&["info", text(&shared.image)]).plain().succeed()?.said.join("\n");
        assert!(shown.contains(info["identity"].as_str().unwrap()), "{shown}");
        let shown = dir.snapback(&["verify", text(&shared.image)]).plain().succeed()?.said;
        assert!(shown[0].contains(&format!("whole: {pages} pages")), "{shown:?}");
    }
    Ok(())
}

fn wrong_usage_ends_with_code_2(dir: &Dir) -> Result<()> {
    let lines: [&[&str]; 7] = [
        &["save", "vm.snap"],
        &["save", "--qmp", "q", "vm.snap", "--compress", "lz4"],
        &["revert"],
        &["revert", "vm.snap", "--path", "nowhere"],
        &["revert", "vm.snap", "--log", "file"],
        &["serve", "vm.snap", "--to", "tcp:1:2"],
        &["restore", "vm.snap"],
    ];
    for line in lines {
        let ended = dir.snapback(line).plain().end()?;
        assert_eq!(ended.code, Some(2), "{line:?}: {ended:?}");
        assert!(ended.stderr.contains("--help"), "{line:?}: {ended:?}");
    }
    assert!(dir.names(".")?.is_empty());
    Ok(())
}

/// What `check` says of one item that stands in the way of a save.
fn refused(dir: &Dir, socket: &Path, args: &[&str], item: &str) -> Result<String> {
    let ended = dir.snapback(&["check", "--qmp", text(socket)]).with(args).end()?;
    let refusal = ended.failure()?;
    let found = ended.events.iter().find(|event| event["item"] == item);
    let found = found.ok_or_else(|| format!("no {item} in {:?}", ended.said))?;
    assert!(found["ok"] == false && refusal.contains(item), "{found}");
    Ok(found["says"].as_str().unwrap_or_default().to_owned())
}

/// It greets like one, and knows nothing that is asked.
fn a_qemu_that_is_too_old_is_told(dir: &Dir) -> Result<()> {
    let socket = dir.path("old.sock");
    let listener = UnixListener::bind(&socket)?;
    let qemu = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut peer, _) = listener.accept()?;
        let version = json!({"qemu": {"major": 6, "minor": 2, "micro": 0}, "package": ""});
        let greeting = json!({"QMP": {"version": version, "capabilities": []}});
        peer.write_all(format!("{greeting}\n").as_bytes())?;
        for line in BufReader::new(peer.try_clone()?).lines() {
            let command: Value = serde_json::from_str(&line?)?;
            let mut answer = match command["execute"] == "qmp_capabilities" {
                true => json!({"return": {}}),
                false => json!({"error": {"class": "CommandNotFound", "desc": "what?"}}),
            };
            answer["id"] = command["id"].clone();
            peer.write_all(format!("{answer}\n").as_bytes())?;
        }
        Ok(())
    });
    let says = refused(dir, &socket, &[], "qemu")?;
    assert!(says.contains("6.2.0") && says.contains("7.2 or later"), "{says}");
    qemu.join().map_err(|_| "the old QEMU panicked")?.map_err(Into::into)
}

/// A network card served by another process (vhost-user), which is only asked for its
/// features here.
fn memory_that_another_process_writes_is_told(dir: &Dir) -> Result<()> {
    let path = dir.path("vhost.sock");
    let listener = UnixListener::bind(&path)?;
    let card = std::thread::spawn(move || -> std::io::Result<()> {
        const GET_FEATURES: u32 = 1;
        let (mut peer, _) = listener.accept()?;
        let mut header = [0; 12];
        // A message: what it is, flags, how many bytes follow.
        while peer.read_exact(&mut header).is_ok() {
            let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            std::io::copy(&mut (&peer).take(field(8).into()), &mut std::io::sink())?;
            if field(0) == GET_FEATURES {
                let (reply, version_1) = (5_u32, 1_u64 << 32);
                let answer = [GET_FEATURES, reply, 8].map(u32::to_le_bytes).concat();
                peer.write_all(&[answer, version_1.to_le_bytes().to_vec()].concat())?;
            }
        }
        Ok(())
    });
    let chardev = format!("socket,id=c,path={}", text(&path));
    let args = ["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-machine"];
    let peer = ["memory-backend=m", "-chardev", &chardev, "-netdev", "vhost-user,id=n,chardev=c"];
    let original = Bare::start(dir, Qemu::V10, &[&args[..], &peer[..]].concat())?;
    let says = refused(dir, &original.socket, &[], "devices")?;
    assert!(says.contains("network n") && says.contains("vhost-user"), "{says}");
    drop(original);
    card.join().map_err(|_| "the network card panicked")?.map_err(Into::into)
}

fn a_qemu_without_the_right_to_userfaultfd_is_told(dir: &Dir) -> Result<()> {
    let switch = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")?;
    if !nix::unistd::geteuid().is_root() || switch.trim() != "0" {
        return Ok(());
    }
    let as_nobody = [(Qemu::V7, ["-runas", "nobody"]), (Qemu::V10, ["-run-with", "user=nobody"])];
    for (qemu, args) in as_nobody {
        let original = Bare::start(dir, qemu, &args)?;
        let says = refused(dir, &original.socket, &[], "background-snapshot")?;
        assert!(says.contains("vm.unprivileged_userfaultfd=1"), "{says}");
    }
    Ok(())
}

fn a_folder_without_room_for_overlays_is_told(dir: &Dir) -> Result<()> {
    let disk = dir.path("disk.raw");
    File::create(&disk)?.set_len(1 << 20)?;
    let drive = format!("if=virtio,format=raw,file={}", text(&disk));
    let original = Bare::start(dir, Qemu::V10, &["-drive", &drive])?;
    // A file system that has no blocks at all.
    let says = refused(dir, &original.socket, &["--overlay-dir", "/proc"], "room")?;
    assert!(says.contains("overlay") && says.contains("/proc") && says.contains("0 MiB"), "{says}");
    Ok(())
}
