//! A save around which things fail, at each of its steps: the guest goes on as before, nothing is
//! left behind, and the next save works.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::bare::{Bare, query};
use crate::faulty_disk::{Disk, FaultyDisk};
use crate::harness::{Dir, Ended, Running, check, send_signal, text};
use crate::harness::{STEPS, STOP_AT, steps_of};
use crate::killed::{State, ask_disks, boot, is_as_before};
use crate::support::{Guest, Qemu, Result};
use crate::trouble::Tmpfs;
use crate::{tests, tests_on_both};

tests_on_both! {
    the_disk_is_full
    the_disk_fails
    the_control_socket_is_cut
    qemu_is_killed
    a_slow_disk_delays_the_image_and_not_the_guest
}

tests! {
    the_stream_is_cut
}

/// What goes wrong.
type Fault<'a> = &'a dyn Fn(&Guest, &Running) -> Result<()>;

/// Runs a save into the directory `to` for each step, has the fault happen there, and hands how it
/// ended to `settle`. Then the guest must be as before, and the next save work.
fn at_every_step(
    dir: &Dir,
    qemu: Qemu,
    to: &str,
    fault: Fault,
    settle: &dyn Fn(&Guest, &Ended) -> Result<()>,
) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let guest = &mut boot(dir, qemu)?;
    ask_disks(guest, "write")?;
    let image = dir.path(to).join("vm.snap");
    for step in steps_of(qemu, STEPS) {
        let told = |e| format!("at `{step}`: {e}");
        let before = State::of(guest, dir)?;
        let save = |guest: &Guest| {
            let save = ["save", "--qmp", text(&guest.qmp_path), text(&image)];
            dir.snapback(&save).with(&["--disks", "overlay"])
        };
        let running = save(guest).env(STOP_AT, step).start()?;
        running.wait_stopped().map_err(told)?;
        fault(guest, &running).map_err(told)?;
        running.signal(libc::SIGCONT);
        let ended = running.end()?;
        println!("`{step}` ends with {:?}", ended.code);
        settle(guest, &ended).map_err(told)?;
        match image.exists() {
            // It was too late for the fault to do harm.
            true => {
                dir.snapback(&["verify", text(&image)]).succeed()?;
                check(guest).map_err(told)?;
                ask_disks(guest, "check")?;
            }
            false => {
                assert_eq!(dir.names(to)?, Vec::<String>::new(), "at `{step}`");
                is_as_before(dir, guest, &before, step)?;
                save(guest).succeed().map_err(told)?;
            }
        }
        fs::remove_file(&image)?;
    }
    Ok(())
}

/// That a save has ended well, or with an error whose message holds one of these words.
fn says(ended: &Ended, words: &[&str]) -> Result<()> {
    if ended.code == Some(0) {
        return Ok(());
    }
    let told = ended.failure()?;
    assert!(words.iter().any(|word| told.contains(word)), "{told}");
    Ok(())
}

fn the_disk_is_full(dir: &Dir, qemu: Qemu) -> Result<()> {
    let tmpfs = Tmpfs::mount(dir.make("small")?, "96m")?;
    let filler = dir.path("small/filler");
    let fill = |_: &Guest, _: &Running| -> Result<()> {
        let mut file = File::create(&filler)?;
        while file.write_all(&[1; 1 << 16]).is_ok() {}
        while file.write_all(&[1]).is_ok() {}
        Ok(())
    };
    let settle = |_: &Guest, ended: &Ended| {
        fs::remove_file(&filler)?;
        says(ended, &["no space left", "No space left"])
    };
    at_every_step(dir, qemu, "small", &fill, &settle)?;
    drop(tmpfs);
    Ok(())
}

fn the_disk_fails(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = FaultyDisk::mount(dir.make("disk")?, dir.make("backing")?)?;
    let fail = |_: &Guest, _: &Running| -> Result<()> {
        disk.set(Disk::FailsWrites);
        Ok(())
    };
    let settle = |_: &Guest, ended: &Ended| {
        disk.set(Disk::Works);
        assert!(dir.names("backing")?.iter().all(|name| name == "vm.snap"));
        says(ended, &["os error 5"])
    };
    at_every_step(dir, qemu, "disk", &fail, &settle)
}

/// Cuts a connection between QEMU and a process: the control socket, which has a name at QEMU's
/// end, or the stream, which has none. Whether there was one.
fn cut(qemu: u32, peer: u32, named: bool) -> Result<bool> {
    // SAFETY: pidfd_open(2) takes numbers, and gives a descriptor or -1.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, qemu, 0) } as i32;
    assert!(pidfd >= 0);
    // SAFETY: it is new, and nobody else's.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let mut found = false;
    for entry in fs::read_dir(format!("/proc/{qemu}/fd"))? {
        let entry = entry?;
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if !text(&link).starts_with("socket:") {
            continue;
        }
        let number: i32 = text(Path::new(&entry.file_name())).parse()?;
        // SAFETY: pidfd_getfd(2) takes numbers, and gives a descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        if fd < 0 {
            continue;
        }
        // SAFETY: it is new, and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let socket = std::os::unix::net::UnixStream::from(socket);
        let is_named = socket.local_addr().is_ok_and(|address| address.as_pathname().is_some());
        if peer_pid(&socket) == Some(peer) && is_named == named {
            socket.shutdown(std::net::Shutdown::Both)?;
            found = true;
        }
    }
    Ok(found)
}

/// The process at the other end of a socket (SO_PEERCRED, unix(7)).
fn peer_pid(socket: &std::os::unix::net::UnixStream) -> Option<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the option's value is a ucred, whose length is given; both outlive the call.
    let got = unsafe {
        let value = (&raw mut peer).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, value, &mut len)
    };
    (got == 0).then_some(peer.pid as u32)
}

fn the_control_socket_is_cut(dir: &Dir, qemu: Qemu) -> Result<()> {
    dir.make("images")?;
    let cut = |guest: &Guest, save: &Running| -> Result<()> {
        assert!(cut(guest.pid, save.pid(), true)?);
        Ok(())
    };
    let settle = |guest: &Guest, ended: &Ended| {
        says(ended, &["QEMU", "control socket"])?;
        // Nobody was there to undo it.
        let image = dir.path("images/vm.snap");
        let recover = ["save", "--qmp", text(&guest.qmp_path), text(&image), "--recover"];
        let recovered = dir.snapback(&recover).succeed()?;
        let outcome = &recovered.event("recovered")?["outcome"];
        assert_eq!(image.exists(), ended.code == Some(0) || outcome == "saved", "{ended:?}");
        Ok(())
    };
    at_every_step(dir, qemu, "images", &cut, &settle)
}

/// On QEMU 7.2 only: 10.0 may crash by itself when its stream breaks (seen).
fn the_stream_is_cut(dir: &Dir) -> Result<()> {
    dir.make("images")?;
    let cut = |guest: &Guest, save: &Running| -> Result<()> {
        // Before there is a stream, and behind it, nothing is cut.
        cut(guest.pid, save.pid(), false).map(drop)
    };
    let settle = |_: &Guest, ended: &Ended| says(ended, &["QEMU", "stream"]);
    at_every_step(dir, Qemu::V7, "images", &cut, &settle)
}

/// Steps at which no disk has been switched to its overlay. Behind `stopped` that is tried, and
/// QEMU can't be asked any more whether it was.
const BEFORE_THE_SWITCH: [&str; 5] = ["journal", "settings", "overlay 0", "ready", "held"];

fn qemu_is_killed(dir: &Dir, qemu: Qemu) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let image = dir.make("images")?.join("vm.snap");
    for step in steps_of(qemu, STEPS.into_iter().filter(|step| *step != "overlay 1")) {
        let disk = dir.path("one.raw");
        File::create(&disk)?.set_len(1 << 20)?;
        let drive = format!("file={},format=raw,if=virtio", disk.display());
        let original = Bare::start(dir, qemu, &["-m", "64", "-drive", &drive])?;
        let save = ["save", "--qmp", text(&original.socket), text(&image), "--disks", "overlay"];
        let save = dir.snapback(&save).env(STOP_AT, step).start()?;
        save.wait_stopped().map_err(|e| format!("at `{step}`: {e}"))?;
        send_signal(original.pid(), libc::SIGKILL);
        save.signal(libc::SIGCONT);
        let ended = save.end()?;
        match ended.code {
            Some(0) => dir.snapback(&["verify", text(&image)]).succeed().map(drop)?,
            _ => {
                let told = ended.failure()?;
                assert!(told.contains("QEMU"), "at `{step}`: {told}");
            }
        }
        if image.exists() {
            fs::remove_file(&image)?;
        }
        let (left, disks) = (dir.names("images")?, dir.names(".")?);
        let overlay = disks.iter().find(|name| name.ends_with(".qcow2"));
        // The guest may have written to its disk since the moment: that is not thrown away.
        match (overlay, left.as_slice()) {
            (None, []) => {
                assert!(BEFORE_THE_SWITCH.contains(&step) || step == "stopped", "at `{step}`");
            }
            (Some(_), []) => assert_eq!(ended.code, Some(0), "at `{step}`: {ended:?}"),
            (Some(overlay), [journal]) => {
                assert!(journal == ".vm.snap.journal", "at `{step}`: {left:?}");
                assert!(!BEFORE_THE_SWITCH.contains(&step), "at `{step}`: {disks:?}");
                let told = ended.failure()?;
                assert!(told.contains(overlay) && told.contains("qemu-img commit"), "{told}");
                fs::remove_file(dir.path("images").join(journal))?;
            }
            _ => panic!("at `{step}`: {left:?} {disks:?}"),
        }
        overlay.map_or(Ok(()), |overlay| fs::remove_file(dir.path(overlay)))?;
    }
    Ok(())
}

fn a_slow_disk_delays_the_image_and_not_the_guest(dir: &Dir, qemu: Qemu) -> Result<()> {
    let disk = FaultyDisk::mount(dir.make("disk")?, dir.make("backing")?)?;
    disk.set(Disk::Slow(Duration::from_millis(20)));
    let guest = &mut boot(dir, qemu)?;
    let image = disk.path("vm.snap");
    let save = ["save", "--qmp", text(&guest.qmp_path), text(&image)];
    let mut save = dir.snapback(&save).start()?;
    save.wait("moment")?;
    // The guest goes on while its image is still on its way.
    let beat = guest.log.last_beat().map_or(0, |beat| beat.number);
    guest.log.wait_beat(beat + 3, crate::support::SOON)?;
    assert_eq!(query(&guest.qmp_path, "query-status")?["running"], true);
    let saved = save.succeed()?;
    // What doesn't fit into the buffers is told.
    assert!(saved.event("saved")?["stalled_ms"].is_number());
    disk.set(Disk::Works);
    dir.snapback(&["verify", text(&image)]).succeed()?;
    check(guest)
}
