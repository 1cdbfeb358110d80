//! Things that go wrong around the program: each ends in a clear error, with the
//! guest unharmed where there is one, and nothing left.

use std::ffi::CString;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::bare::{Bare, query};
use crate::harness::{Dir, Reverted, check, send_signal, text, wait_gone};
use crate::interrupts::UNFILLED;
use crate::shared::{borrow, shared};
use crate::support::{Qemu, Qmp, Result, query_status};
use crate::{tests, tests_on_both};

tests! {
    what_is_no_control_socket_is_told
    a_control_socket_that_is_taken_is_told
    a_full_disk_is_found_before_the_guest_is_touched
    another_machine_is_refused_in_qemus_words
    a_qemu_that_does_not_start_is_told
}

tests_on_both! {
    a_qemu_killed_in_the_midst_of_a_save_is_told
    a_qemu_killed_in_the_midst_of_a_revert_is_told
    a_disk_that_fills_up_in_the_midst_leaves_the_guest_running
}

fn what_is_no_control_socket_is_told(dir: &Dir) -> Result<()> {
    let save = |socket: &str| dir.snapback(&["save", "--qmp", socket, "vm.snap"]).fail();
    let refusal = save("missing.sock")?;
    assert!(refusal.contains("missing.sock") && refusal.contains("-qmp unix:"), "{refusal}");
    std::fs::write(dir.path("file"), "")?;
    assert!(save("file")?.contains("can't connect to the control socket file"));

    let socket = dir.path("other.sock");
    let listener = UnixListener::bind(&socket)?;
    for (greeting, says) in [
        ("QEMU 7.2.22 monitor - type 'help' for more information\n", "not as QMP"),
        ("{\"QMP\": \"yes\"}\n", "QMP"),
        ("\0\u{1}\u{2}\n", "not as QMP"),
        ("", "closed before it greeted"),
    ] {
        let listener = listener.try_clone()?;
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(greeting.as_bytes())
        });
        let refusal = save(text(&socket))?;
        assert!(refusal.contains(says), "{greeting:?}: {refusal}");
        // It may have hung up first.
        let _ = peer.join();
    }
    assert_eq!(dir.names(".")?, ["file", "other.sock"]);
    Ok(())
}

fn a_control_socket_that_is_taken_is_told(dir: &Dir) -> Result<()> {
    let original = Bare::start(dir, Qemu::V7, &[])?;
    let _other_client = Qmp::connect(&original.socket)?;
    let refusal = dir.snapback(&["save", "--qmp", text(&original.socket), "vm.snap"]).fail()?;
    assert!(refusal.contains("another client"), "{refusal}");
    assert!(!dir.path("vm.snap").exists());
    Ok(())
}

/// How often a test tries to be in time for something that it can't hold up.
const TRIES: usize = 20;

fn a_qemu_killed_in_the_midst_of_a_save_is_told(dir: &Dir, qemu: Qemu) -> Result<()> {
    for _ in 0..TRIES {
        let original = Bare::start(dir, qemu, &["-m", "1G"])?;
        let args = ["save", "--qmp", text(&original.socket), "vm.snap"];
        let mut save = dir.snapback(&args).start()?;
        save.wait("moment")?;
        send_signal(original.pid(), libc::SIGKILL);
        let ended = save.end()?;
        if ended.code == Some(0) {
            std::fs::remove_file(dir.path("vm.snap"))?;
            continue;
        }
        let told = ended.failure()?;
        assert!(told.contains("QEMU") && told.contains("lost"), "{told}");
        drop(original);
        assert_eq!(dir.names(".")?, ["bare.stderr"]);
        return Ok(());
    }
    Err("the save was always faster".into())
}

fn a_qemu_killed_in_the_midst_of_a_revert_is_told(dir: &Dir, qemu: Qemu) -> Result<()> {
    let shared = shared(qemu)?;
    let to = dir.make("reverted")?;
    let mut revert = dir.revert(&shared.image, &shared.from, &to).with(&UNFILLED).start()?;
    let pid = revert.wait("running")?["pid"].as_u64().ok_or("no pid")? as u32;
    send_signal(pid, libc::SIGKILL);
    let told = revert.end()?.failure()?;
    assert!(told.contains("QEMU ended (signal: 9 (SIGKILL))"), "{told}");
    wait_gone(pid)?;
    assert_eq!(dir.sockets("reverted")?, Vec::<String>::new());
    Ok(())
}

/// A small file system in memory. Dropping it unmounts it.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn mount(path: PathBuf, size: &str) -> Result<Tmpfs> {
        let text = |text: &str| CString::new(text).unwrap();
        let (kind, target) = (text("tmpfs"), text(path.to_str().unwrap()));
        let options = text(&format!("size={size},mode=700"));
        let (kind, data) = (kind.as_ptr(), options.as_ptr().cast());
        // SAFETY: all pointers are to strings that outlive the call.
        if unsafe { libc::mount(kind, target.as_ptr(), kind, 0, data) } != 0 {
            let error = std::io::Error::last_os_error();
            return Err(format!("mounting a tmpfs (as root?): {error}").into());
        }
        Ok(Tmpfs(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let path = CString::new(text(&self.0)).unwrap();
        // SAFETY: the string outlives the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

fn save_to(dir: &Dir, qmp: &Path, tmpfs: &Tmpfs) -> Result<crate::harness::Ended> {
    let image = tmpfs.0.join("vm.snap");
    dir.snapback(&["save", "--qmp", text(qmp), text(&image)]).end()
}

fn a_full_disk_is_found_before_the_guest_is_touched(dir: &Dir) -> Result<()> {
    let tmpfs = Tmpfs::mount(dir.make("small")?, "1m")?;
    let original = Bare::start(dir, Qemu::V10, &[])?;
    let ended = save_to(dir, &original.socket, &tmpfs)?;
    let refusal = ended.failure()?;
    assert!(refusal.contains("too little room") && refusal.contains(text(&tmpfs.0)), "{refusal}");
    assert_eq!(ended.steps(), ["error"]);
    assert!(original.query("query-migrate")?.get("status").is_none());
    assert_eq!(dir.names("small")?, Vec::<String>::new());
    Ok(())
}

fn a_disk_that_fills_up_in_the_midst_leaves_the_guest_running(dir: &Dir, qemu: Qemu) -> Result<()> {
    let mut original = borrow(qemu)?;
    let capabilities = query(&original.qmp_path, "query-migrate-capabilities")?;
    // A quarter of the guest's memory, which is all that the check asks for, and less
    // than the incompressible pages in it.
    let tmpfs = Tmpfs::mount(dir.make("small")?, "42m")?;
    let ended = save_to(dir, &original.qmp_path, &tmpfs)?;
    let told = ended.failure()?;
    assert!(told.contains("no space left") && told.contains(text(&tmpfs.0)), "{told}");
    assert_eq!(ended.events[0]["event"], "checked");
    assert_eq!(dir.names("small")?, Vec::<String>::new());
    assert_eq!(query_status(&original.qmp_path)?, "running");
    assert_eq!(query(&original.qmp_path, "query-migrate-capabilities")?, capabilities);
    check(&mut original)
}

fn another_machine_is_refused_in_qemus_words(dir: &Dir) -> Result<()> {
    let to = dir.make("reverted")?;
    let (old, new) = (shared(Qemu::V7)?, shared(Qemu::V10)?);
    let revert = || dir.revert(&old.image, &old.from, &to);
    // What QEMU notices as it reads the stream: its machine, its memory.
    let refusal = revert().with(&["--", "-machine", "q35"]).fail()?;
    assert!(refusal.contains("QEMU says") && refusal.contains("q35"), "{refusal}");
    let refusal = revert().with(&["--", "-m", "100"]).fail()?;
    assert!(refusal.contains("QEMU says") && refusal.contains("pc.ram"), "{refusal}");
    // What it notices as it starts: a machine that it can't be.
    let binary = Qemu::V7.binary();
    let refusal = dir.revert(&new.image, &new.from, &to).with(&["--qemu", text(&binary)]).fail()?;
    assert!(refusal.contains("unsupported machine type"), "{refusal}");
    assert_eq!(dir.sockets("reverted")?, Vec::<String>::new());
    // An old machine on a new QEMU is no trouble.
    if Qemu::V10.env().is_empty() {
        return Ok(());
    }
    let script = dir.path("qemu");
    write_script(&script, Qemu::V10, "")?;
    let to = dir.make("newer")?;
    let args = Qemu::V10.args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let revert = dir.revert(&old.image, &old.from, &to).with(&["--qemu", text(&script), "--"]);
    let mut reverted = Reverted::of(revert.with(&args), &to)?;
    reverted.resident()?;
    reverted.check(&old.nonce)
}

/// Writes a program that runs a command of the shell, then turns into QEMU.
pub fn write_script(path: &Path, qemu: Qemu, first: &str) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let env: String =
        qemu.env().iter().map(|(name, value)| format!("export {name}='{value}'\n")).collect();
    let script = format!("#!/bin/sh\n{env}{first}\nexec '{}' \"$@\"\n", qemu.binary().display());
    let mut file =
        std::fs::OpenOptions::new().create_new(true).write(true).mode(0o700).open(path)?;
    file.write_all(script.as_bytes())?;
    Ok(())
}

fn a_qemu_that_does_not_start_is_told(dir: &Dir) -> Result<()> {
    let shared = shared(Qemu::V7)?;
    let to = dir.make("reverted")?;
    let revert = |qemu: &str| dir.revert(&shared.image, &shared.from, &to).with(&["--qemu", qemu]);
    let refusal = revert("/no/such/qemu").fail()?;
    assert!(refusal.contains("/no/such/qemu") && refusal.contains("--qemu"), "{refusal}");
    let refusal = revert("/bin/false").fail()?;
    assert!(refusal.contains("/bin/false ended at once (exit status: 1)"), "{refusal}");
    let refusal = dir.revert(&shared.image, &shared.from, &dir.path("missing")).fail()?;
    assert!(refusal.contains(text(&dir.path("missing"))), "{refusal}");
    assert!(dir.names("reverted")?.is_empty());
    Ok(())
}
