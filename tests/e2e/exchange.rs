//! Images that other programs load, and files of other programs that become images.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use snapback::page::Block;
use snapback::wire::{Item, StreamReader, Tail, end_of_ram, precopy_opening, tail};

use crate::harness::{Dir, Reverted, Running, check, text};
use crate::shared::{MIB, Shared, copy, shared};
use crate::support::{
    Attached, Qemu, Qmp, Result, SOON, pmemsave, spawn_bound, wait_for, wait_until,
};
use crate::trouble::write_script;
use crate::{tests, tests_on_both};

tests_on_both! {
    a_stream_goes_to_qemu_and_comes_back
    a_cut_in_device_state_is_found
}

tests! {
    a_mapped_ram_file_goes_to_qemu_and_comes_back
    flat_files_and_cores_hold_the_guests_memory
    what_can_not_be_imported_is_named
    an_import_is_interrupted_wherever_it_waits
    what_can_not_be_exported_is_named
}

/// A QEMU of the shared guest's machine that was given the guest by QEMU's own means.
struct Loaded {
    qemu: std::process::Child,
    guest: Option<Attached>,
}

impl Loaded {
    /// Starts QEMU, its files in a new folder, and has it load the guest from `uri`.
    fn load(dir: &Dir, folder: &str, uri: &str, capabilities: &[&str]) -> Result<Loaded> {
        Loaded::of(dir, Qemu::V10, folder, uri, capabilities)
    }

    fn of(dir: &Dir, on: Qemu, folder: &str, uri: &str, capabilities: &[&str]) -> Result<Loaded> {
        let shared = shared(on)?;
        let to = dir.make(folder)?;
        let mut words = command_line(dir, shared, on, &to)?.into_iter();
        let mut command = Command::new("env");
        command.args(words.by_ref()).args(["-incoming", "defer"]);
        command.current_dir(&to).stdin(Stdio::null()).stderr(Stdio::null());
        let mut loaded = Loaded { qemu: spawn_bound(command)?, guest: None };
        let mut monitor = Qmp::connect(&to.join("qmp.sock"))?;
        set_capabilities(&mut monitor, capabilities)?;
        monitor.execute("migrate-incoming", json!({"uri": uri}))?;
        wait_for(SOON, "the guest to run", || {
            let status = monitor.execute("query-migrate", json!({}))?;
            if status["status"] == "failed" {
                return Err(format!("QEMU refuses it: {status}").into());
            }
            Ok((monitor.execute("query-status", json!({}))?["running"] == true).then_some(()))
        })?;
        drop(monitor);
        loaded.guest = Some(Attached::to(loaded.qemu.id(), &to)?);
        Ok(loaded)
    }

    fn guest(&mut self) -> &mut Attached {
        self.guest.as_mut().unwrap()
    }

    /// Checks that the guest is the shared one, and its memory right.
    fn check(&mut self, shared: &Shared) -> Result<()> {
        assert_eq!(self.guest().oracle.nonce()?, shared.nonce);
        check(self.guest())
    }

    /// Has QEMU write the guest to `uri` by its own means.
    fn migrate(&mut self, uri: &str, capabilities: &[&str]) -> Result<()> {
        let mut monitor = Qmp::connect(&self.guest().qmp_path)?;
        // What brought the guest has to be put away first.
        wait_for(SOON, "the migration that brought the guest to be over", || {
            let left = monitor.execute("query-yank", json!({}))?;
            let left = left.as_array().ok_or("no list")?;
            Ok((!left.iter().any(|one| one["type"] == "migration")).then_some(()))
        })?;
        set_capabilities(&mut monitor, capabilities)?;
        let fast = json!({"max-bandwidth": 1u64 << 40, "downtime-limit": 2_000_000});
        monitor.execute("migrate-set-parameters", fast)?;
        monitor.execute("migrate", json!({"uri": uri}))?;
        wait_for(SOON, "QEMU to write the guest", || {
            let info = monitor.execute("query-migrate", json!({}))?;
            match info["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed") => Err(format!("QEMU failed: {info}").into()),
                _ => Ok(None),
            }
        })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.guest = None;
        // Fails when it has ended; it is reaped here alone.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn set_capabilities(monitor: &mut Qmp, names: &[&str]) -> Result<()> {
    let all = ["mapped-ram", "multifd"];
    let known = monitor.execute("query-migrate-capabilities", json!({}))?;
    let knows =
        |name: &str| known.as_array().is_some_and(|k| k.iter().any(|c| c["capability"] == name));
    let list: Vec<_> = all
        .into_iter()
        .filter(|name| knows(name))
        .map(|name| json!({"capability": name, "state": names.contains(&name)}))
        .collect();
    monitor.execute("migrate-set-capabilities", json!({"capabilities": list})).map(drop)
}

/// The shared guest's command line for files in `to`, the environment that its QEMU
/// needs before it.
fn command_line(dir: &Dir, shared: &Shared, qemu: Qemu, to: &Path) -> Result<Vec<String>> {
    let info = dir.snapback(&["info", text(&shared.image)]).succeed()?.events.remove(0);
    let line = info["command_line"].as_array().ok_or("no command line")?;
    let place =
        |arg: &Value| arg.as_str().unwrap_or_default().replace(text(&shared.from), text(to));
    let mut words: Vec<_> =
        qemu.env().into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    words.push(text(&qemu.binary()).to_owned());
    words.extend(line[1..].iter().map(place));
    Ok(words)
}

/// Makes an image of a file, with the command line of the guest whose files are in
/// `from`.
fn import(dir: &Dir, qemu: Qemu, file: &Path, image: &str, from: &str) -> Result<PathBuf> {
    let image = dir.path(image);
    let words = command_line(dir, shared(qemu)?, qemu, &dir.path(from))?;
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let import = dir.snapback(&["import", text(file), text(&image), "--"]).with(&words);
    let ended = import.succeed()?;
    assert_eq!(ended.event("imported")?["running"], true);
    dir.snapback(&["verify", text(&image)]).succeed()?;
    Ok(image)
}

fn a_stream_goes_to_qemu_and_comes_back(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let stream = dir.path("stream");
    let export = dir.snapback(&["export", text(&shared.image), "--to", "stream", text(&stream)]);
    export.succeed()?.event("exported")?;
    let mut loaded = Loaded::of(dir, qemu, "loaded", &format!("exec:cat {}", text(&stream)), &[])?;
    loaded.check(shared)?;

    // The same bytes go to a pipe, of which one half is imported again.
    let script = format!(
        "{0} export {1} --to stream - | tee {2} | {0} import - {3} -- {4} -m 1 && cmp {2} {5}",
        env!("CARGO_BIN_EXE_snapback"),
        text(&shared.image),
        text(&dir.path("piped")),
        text(&dir.path("piped.snap")),
        text(&qemu.binary()),
        text(&stream),
    );
    let piped = Command::new("bash").args(["-e", "-o", "pipefail", "-c", &script]).output()?;
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    let info = |image: &Path| -> Result<Value> {
        let info = dir.snapback(&["info", text(image)]).succeed()?.events.remove(0);
        Ok(json!([info["data_pages"], info["zero_pages"], info["machine_type"], info["blocks"]]))
    };
    assert_eq!(info(&dir.path("piped.snap"))?, info(&shared.image)?);

    // QEMU's own stream has pages that were sent more than once.
    let own = dir.path("own");
    loaded.migrate(&format!("exec:cat >{}", text(&own)), &[])?;
    drop(loaded);
    let image = import(dir, qemu, &own, "own.snap", "loaded")?;
    let mut reverted = dir.reverted(&image, &dir.path("loaded"), "reverted")?;
    reverted.check(&shared.nonce)?;
    reverted.resident()?;
    reverted.check(&shared.nonce)
}

fn a_mapped_ram_file_goes_to_qemu_and_comes_back(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V10)?;
    let file = dir.path("mapped");
    let export = dir.snapback(&["export", text(&shared.image), "--to", "mapped-ram", text(&file)]);
    export.succeed()?;
    let uri = |file: &Path| format!("file:{}", text(file));
    let mut plain = Loaded::load(dir, "plain", &uri(&file), &["mapped-ram"])?;
    plain.check(shared)?;
    let multifd = ["mapped-ram", "multifd"];
    let mut loaded = Loaded::load(dir, "loaded", &uri(&file), &multifd)?;
    loaded.check(shared)?;

    // QEMU's own files, with and without multifd.
    for (guest, folder, how) in
        [(&mut plain, "plain", &multifd[..1]), (&mut loaded, "loaded", &multifd)]
    {
        let own = dir.path(&format!("{folder}.mapped"));
        guest.migrate(&uri(&own), how)?;
        drop(guest.guest.take());
        let image = import(dir, Qemu::V10, &own, &format!("{folder}.snap"), folder)?;
        let mut reverted =
            dir.reverted(&image, &dir.path(folder), &format!("{folder}.reverted"))?;
        reverted.resident()?;
        reverted.check(&shared.nonce)?;
    }

    // Its pages have places that no pipe can be asked for.
    let program = env!("CARGO_BIN_EXE_snapback");
    let script = format!(
        "cat {} | {program} import - vm.snap -- {}",
        text(&file),
        text(&Qemu::V10.binary())
    );
    let piped = Command::new("sh").args(["-c", &script]).current_dir(dir.path(".")).output()?;
    let said = String::from_utf8_lossy(&piped.stderr);
    assert!(piped.status.code() == Some(1) && said.contains("can't be read from a pipe"), "{said}");
    assert!(!dir.names(".")?.contains(&"vm.snap".to_string()));
    Ok(())
}

fn flat_files_and_cores_hold_the_guests_memory(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let (flat, core) = (dir.path("flat"), dir.path("core"));
    dir.snapback(&["export", text(&shared.image), "--to", "flat", text(&flat)]).succeed()?;
    let ended =
        dir.snapback(&["export", text(&shared.image), "--to", "elf", text(&core)]).succeed()?;
    assert!(ended.event("note")?["what"].to_string().contains("addresses"), "{:?}", ended.said);

    // The guest's memory at the moment of its snapshot, as QEMU has it after a revert.
    let to = dir.make("reverted")?;
    let revert = dir.revert(&shared.image, &shared.from, &to).with(&["--", "-S"]);
    let mut reverted = Reverted::of(revert, &to)?;
    reverted.resident()?;
    let real = dir.path("real");
    pmemsave(&reverted.qmp_path, 0, MIB << 20, &real)?;
    let real = fs::read(&real)?;
    let ram = fs::read(flat.join("pc.ram.ram"))?;
    // What lies between 640 KiB and 1 MiB is seen through other devices by the processor,
    // and by `pmemsave`.
    let hidden = |at: usize| (0xa0000..0x100000).contains(&at);
    let differs_truly =
        |file: &[u8]| (0..real.len()).find(|&at| real[at] != file[at] && !hidden(at));
    assert_eq!((ram.len(), differs_truly(&ram)), (real.len(), None));
    let used = fs::metadata(flat.join("pc.ram.ram"))?.blocks() * 512;
    assert!(used < MIB << 20, "{used} bytes used: it is not sparse");

    // 160 MiB from 0 on, and the firmware below 4 GiB.
    let readelf = Command::new("readelf").args(["-lnW", text(&core)]).output()?;
    let said = String::from_utf8_lossy(&readelf.stdout).into_owned();
    assert!(readelf.status.success() && readelf.stderr.is_empty(), "{readelf:?}");
    let loads: Vec<Vec<&str>> = said
        .lines()
        .map(|line| line.split_whitespace().collect())
        .filter(|words: &Vec<_>| words.first() == Some(&"LOAD"))
        .collect();
    assert_eq!(loads.len(), 2, "{said}");
    assert_eq!(loads[0][3..5], ["0x0000000000000000", "0xa000000"]);
    assert!(loads[1][3] == "0x00000000fffc0000" && said.contains("NT_PRSTATUS"), "{said}");
    let offset = usize::from_str_radix(loads[0][1].trim_start_matches("0x"), 16)?;
    let bytes = fs::read(&core)?;
    assert_eq!(differs_truly(&bytes[offset..offset + real.len()]), None);
    // crash finds what the guest's kernel says of itself.
    let crash = Command::new("crash").arg("--osrelease").arg(&core).output()?;
    let said = String::from_utf8_lossy(&crash.stdout).into_owned();
    assert!(said.trim().ends_with("-cloud-amd64"), "{said} {crash:?}");
    // gdb finds at 4 GiB - 16 the jump with which a processor begins.
    let gdb = Command::new("gdb")
        .args(["-batch", "-nx", "-ex", "x/1xb 0xfffffff0", "-ex", "x/2xg 0x1000000", "-c"])
        .arg(&core)
        .output()?;
    let said = String::from_utf8_lossy(&gdb.stdout).into_owned();
    assert!(said.contains("0xfffffff0:\t0xea"), "{said} {gdb:?}");
    let word = u64::from_le_bytes(real[0x100_0000..][..8].try_into()?);
    assert!(said.contains(&format!("0x1000000:\t0x{word:016x}")), "{said}");

    let refusal =
        dir.snapback(&["export", text(&shared.image), "--to", "flat", text(&flat)]).fail()?;
    assert!(refusal.contains("exists already"), "{refusal}");
    Ok(())
}

fn what_can_not_be_imported_is_named(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let file = dir.path("stream");
    dir.snapback(&["export", text(&shared.image), "--to", "stream", text(&file)]).succeed()?;
    let binary = Qemu::V7.binary();
    let refusal = |file: &Path, words: &[&str]| {
        dir.snapback(&["import", text(file), "vm.snap"]).with(words).fail()
    };
    let says = |words: &[&str], expected: &str| -> Result<()> {
        let refusal = refusal(&file, words)?;
        assert!(refusal.contains(expected), "{refusal}");
        Ok(())
    };
    says(&[], "give it behind `--`")?;
    says(&["--", "no-such-qemu"], "no program `no-such-qemu`")?;
    says(&["--", text(&binary), "-M", "q35"], "names the machine type `q35`")?;
    says(&["--", text(&binary), "-M", "pc-i440fx-6.0"], "names the machine type `pc-i440fx-6.0`")?;
    says(&["--command", "missing"], "`missing`")?;

    // Damage, at a place that is named.
    let bytes = fs::read(&file)?;
    let given = ["--", text(&binary)];
    let broken = dir.path("broken");
    for len in [10, 100, bytes.len() / 2, bytes.len() - (1 << 20)] {
        fs::write(&broken, &bytes[..len])?;
        let refusal = refusal(&broken, &given)?;
        assert!(refusal.contains("broken") && !refusal.contains("panicked"), "{refusal}");
    }
    // Device state, whose zeros look like the byte that ends a stream.
    let tail = tail_of(&file)?;
    let ends = bytes.len() - tail.vmdesc.len() - 7;
    let zero = (ends - tail.devices.len()..ends - 1).rfind(|&at| bytes[at] == 0);
    fs::write(&broken, &bytes[..=zero.ok_or("no zeros")?])?;
    let said = refusal(&broken, &given)?;
    assert!(said.contains("ended at byte") && said.contains("device state"), "{said}");
    for (begins, expected) in [
        (&b"LibvirtQemudPart and more"[..], "never finished"),
        (b"LibvirtQemudSave and more", "header can't be read"),
        (b"\x7fELF and whatever else", "neither a migration stream"),
        (b"short", "first bytes"),
    ] {
        fs::write(&broken, begins)?;
        let refusal = refusal(&broken, &given)?;
        assert!(refusal.contains(expected), "{refusal}");
    }
    assert_eq!(dir.names(".")?, ["broken", "stream"]);
    Ok(())
}

/// For more of a stream, and for a program that it runs. Neither keeps it, and nothing is
/// left, the program included.
fn an_import_is_interrupted_wherever_it_waits(dir: &Dir) -> Result<()> {
    let (file, pipe) = (dir.path("stream"), dir.path("pipe"));
    let image = text(&shared(Qemu::V7)?.image);
    dir.snapback(&["export", image, "--to", "stream", text(&file)]).succeed()?;
    assert!(Command::new("mkfifo").arg(&pipe).status()?.success());
    let is_interrupted = |import: Running| -> Result<()> {
        import.signal(libc::SIGINT);
        let told = import.end()?.failure()?;
        assert!(told.contains("interrupted"), "{told}");
        assert!(!dir.path("vm.snap").exists());
        Ok(())
    };

    // Open for both, so that it never ends.
    let mut feed = File::options().read(true).write(true).open(&pipe)?;
    let binary = Qemu::V7.binary();
    let import = dir.snapback(&["import", text(&pipe), "vm.snap", "--", text(&binary)]).start()?;
    // Most of it has been read when this returns: a pipe holds little.
    let mut begins = vec![0; 4 << 20];
    File::open(&file)?.read_exact(&mut begins)?;
    feed.write_all(&begins)?;
    is_interrupted(import)?;

    let script = dir.path("qemu");
    write_script(&script, Qemu::V7, "touch started; while :; do sleep 0.1; done")?;
    let import = dir.snapback(&["import", text(&file), "vm.snap", "--", text(&script)]).start()?;
    wait_until(SOON, "the program to be started", || dir.path("started").exists())?;
    is_interrupted(import)
}

/// What a stream in a file has behind its memory.
fn tail_of(stream: &Path) -> Result<Tail> {
    let mut stream = StreamReader::of_file(File::open(stream)?);
    loop {
        match stream.next_item()? {
            Some(Item::Tail(tail)) => return Ok(tail),
            Some(_) => {}
            None => return Err("a stream without a tail".into()),
        }
    }
}

/// Nowhere does a cut within real device state look like an end.
fn a_cut_in_device_state_is_found(dir: &Dir, qemu: Qemu) -> Result<()> {
    let file = dir.path("stream");
    let image = text(&shared(qemu)?.image);
    dir.snapback(&["export", image, "--to", "stream", text(&file)]).succeed()?;
    let devices = tail_of(&file)?.devices;
    // The same devices behind hardly any memory: they are read once for every cut.
    let ram = Block { name: "pc.ram".into(), len: 4096, page_size: 4096 };
    let config = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";
    let head = [precopy_opening(config, &[ram]), end_of_ram()].concat();
    let whole = [&head[..], &tail(&devices, b"{}")].concat();
    let is_read = |bytes: &[u8]| {
        let mut stream = StreamReader::new(bytes);
        (0..2).all(|_| stream.next_item().is_ok())
    };
    assert!(is_read(&whole));
    let ends = head.len() + devices.len();
    let cuts = ends.saturating_sub(64 << 10).max(head.len() + 1)..=ends;
    let passed: Vec<_> = cuts.rev().step_by(5).filter(|&cut| is_read(&whole[..cut])).collect();
    assert!(passed.is_empty(), "{passed:?} of {ends}");
    Ok(())
}

fn what_can_not_be_exported_is_named(dir: &Dir) -> Result<()> {
    let image = text(&shared(Qemu::V7)?.image);
    fs::write(dir.path("mine"), "mine")?;
    let refusal = dir.snapback(&["export", image, "--to", "stream", "mine"]).fail()?;
    assert!(refusal.contains("exists already"), "{refusal}");
    let refusal = dir.snapback(&["export", "mine", "--to", "stream", "new"]).fail()?;
    assert!(refusal.contains("mine"), "{refusal}");
    let refusal = dir.snapback(&["export", image, "--to", "mapped-ram", "-"]).plain().end()?;
    assert!(refusal.stderr.contains("needs a file"), "{refusal:?}");
    // An image is not replaced by what is made of it, nor a file by its image.
    let own = dir.path("own.snap");
    copy(Qemu::V7, &own)?;
    let before = fs::read(&own)?;
    fs::hard_link(&own, dir.path("link"))?;
    for to in ["own.snap", "link"] {
        let export = ["export", text(&own), "--to", "stream", to, "--force"];
        let refusal = dir.snapback(&export).fail()?;
        assert!(refusal.contains("own.snap, which it is made of"), "{refusal}");
    }
    dir.snapback(&["export", text(&own), "--to", "stream", "stream"]).succeed()?;
    let import = dir.snapback(&["import", "stream", "stream", "--force", "--"]);
    let refusal = import.with(&[text(&Qemu::V7.binary())]).fail()?;
    assert!(refusal.contains("stream, which it is made of"), "{refusal}");
    assert!(fs::read(&own)? == before && fs::read(dir.path("stream"))?.starts_with(b"QEVM"));
    for name in ["own.snap", "link", "stream"] {
        fs::remove_file(dir.path(name))?;
    }
    // Whoever reads along goes away.
    let script = format!(
        "{} export {image} --to stream - | head -c 100 >/dev/null; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_snapback")
    );
    let piped = Command::new("bash").args(["-c", &script]).output()?;
    let said = String::from_utf8_lossy(&piped.stderr);
    assert!(piped.status.code() == Some(1) && said.contains("standard output"), "{said}");
    assert_eq!(fs::read(dir.path("mine"))?, b"mine");
    assert_eq!(dir.names(".")?, ["mine"]);
    Ok(())
}
