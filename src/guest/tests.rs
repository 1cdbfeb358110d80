//! Rewriting: one table for each rule. Starting: with a real QEMU.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::kill;
use nix::unistd::{Pid, getsid};

use super::*;
use crate::machine::Machine;
use crate::qmp::Qmp;

const LONG: Duration = Duration::from_secs(60);

pub(super) fn machine(args: &[&str]) -> Machine {
    let argv = std::iter::once("qemu-system-x86_64").chain(args.iter().copied());
    Machine {
        binary: "/usr/bin/qemu-system-x86_64".to_owned(),
        argv: argv.map(str::to_owned).collect(),
        cwd: "/".to_owned(),
        ..Machine::default()
    }
}

fn try_rewritten(args: &[&str], options: &RewriteOptions) -> Result<Vec<String>, GuestError> {
    rewrite(&machine(args), options).map(|plan| plan.argv[1..].to_vec())
}

/// Checks the rewritten arguments, `-incoming defer` at the end left out.
#[track_caller]
fn check(args: &[&str], expected: &[&str]) {
    let rewritten = try_rewritten(args, &RewriteOptions::default()).unwrap();
    let (end, rest) = rewritten.split_last_chunk::<2>().map(|(rest, end)| (end, rest)).unwrap();
    assert_eq!(end, &["-incoming", "defer"]);
    assert_eq!(rest, expected);
}

#[track_caller]
fn refused(args: &[&str], names: &str) {
    let error = try_rewritten(args, &RewriteOptions::default()).unwrap_err().to_string();
    assert!(error.contains(names), "{error}");
}

#[test]
fn what_belongs_to_the_first_start_goes() {
    check(&["-incoming", "tcp:0:4444", "--S", "-m", "1G"], &["-m", "1G"]);
    check(&["-daemonize", "--pidfile", "/run/x", "-preconfig"], &[]);
    check(&["-loadvm", "before", "-incoming", "fd:7", "disk.img"], &["disk.img"]);
    // A value that looks like an option stays a value.
    check(&["-name", "-S", "-append", "-daemonize"], &["-name", "-S", "-append", "-daemonize"]);
    let options = RewriteOptions { extra: vec!["-S".into(), "-vga".into()], ..Default::default() };
    let last = ["-vga", "-S", "-incoming", "defer"];
    assert_eq!(try_rewritten(&["-m", "1G"], &options).unwrap()[2..], last);
    let options = RewriteOptions { paused: true, ..Default::default() };
    assert_eq!(try_rewritten(&["-S"], &options).unwrap(), ["-S", "-incoming", "defer"]);
    assert!(matches!(
        rewrite(&Machine::default(), &options).unwrap_err(),
        GuestError::EmptyCommandLine
    ));
}

#[test]
fn notes_say_what_changed() {
    let plan = rewrite(&machine(&["-daemonize", "-S", "-serial", "stdio"]), &Default::default());
    let notes: Vec<String> = plan.unwrap().notes.into_iter().map(|note| note.what).collect();
    assert_eq!(notes, ["left out -daemonize", "replaced -serial stdio by a null backend"]);
}

#[test]
fn our_own_control_socket_of_another_revert_goes() {
    check(
        &[
            "-chardev",
            "socket,id=snapback-control,fd=9",
            "-mon",
            "chardev=snapback-control,mode=control",
            "-incoming",
            "defer",
        ],
        &[],
    );
}

#[test]
fn the_machine_type_is_pinned() {
    for (args, expected) in [
        (&["-m", "1G"][..], &["-m", "1G", "-machine", "type=pc-i440fx-7.2"][..]),
        (&["-machine", "pc,accel=tcg"], &["-machine", "pc-i440fx-7.2,accel=tcg"]),
        (&["--M", "accel=tcg,type=pc"], &["--M", "accel=tcg,type=pc-i440fx-7.2"]),
        (&["-M", "usb=on"], &["-M", "usb=on", "-machine", "type=pc-i440fx-7.2"]),
    ] {
        let mut machine = machine(args);
        machine.machine_type = "pc-i440fx-7.2".to_owned();
        let plan = rewrite(&machine, &RewriteOptions::default()).unwrap();
        assert_eq!(&plan.argv[1..plan.argv.len() - 2], expected);
    }
}

#[test]
fn no_memory_is_taken_ahead() {
    check(&["-mem-prealloc", "-mem-path", "/dev/shm/x"], &["-mem-path", "/dev/shm/x"]);
    check(
        &["-object", "memory-backend-ram,id=m,prealloc=on,size=1G"],
        &["-object", "memory-backend-ram,id=m,prealloc=off,size=1G"],
    );
    check(
        &["-object", r#"{"qom-type":"memory-backend-ram","id":"m","prealloc":true}"#],
        &["-object", r#"{"id":"m","prealloc":false,"qom-type":"memory-backend-ram"}"#],
    );
    check(&["-overcommit", "mem-lock=on,cpu-pm=on"], &["-overcommit", "mem-lock=off,cpu-pm=on"]);
    check(&["-overcommit", "mem-lock=off"], &["-overcommit", "mem-lock=off"]);
}

#[test]
fn the_terminal_is_left() {
    check(
        &["-serial", "mon:stdio", "--parallel", "stdio", "-debugcon", "stdio"],
        &["-serial", "null", "--parallel", "null", "-debugcon", "null"],
    );
    check(&["-monitor", "stdio", "-qmp", "stdio", "-gdb", "stdio"], &[]);
    check(
        &["-chardev", "stdio,id=c,mux=on,signal=off,logfile=/nonexistent/l"],
        &["-chardev", "null,id=c,mux=on,logfile=/nonexistent/l,logappend=on"],
    );
    check(
        &["-chardev", r#"{"id":"c","backend":{"type":"stdio","data":{"signal":false}}}"#],
        &["-chardev", r#"{"backend":{"data":{},"type":"null"},"id":"c"}"#],
    );
    check(&["-nographic"], &["-nographic", "-serial", "null"]);
    check(&["-nographic", "-nodefaults"], &["-nographic", "-nodefaults"]);
    check(&["-nographic", "-serial", "pty"], &["-nographic", "-serial", "pty"]);
    for device in ["isa-serial,chardev=x", r#"{"driver":"isa-serial"}"#] {
        check(&["-nographic", "-device", device], &["-nographic", "-device", device]);
    }
    check(&["-display", "curses,charset=x"], &["-display", "none"]);
    check(&["-display", "gtk", "-vnc", ":5"], &["-display", "gtk", "-vnc", ":5"]);
}

#[test]
fn nobody_is_waited_for() {
    check(
        &["-serial", "unix:/nonexistent/a,server", "-serial", "tcp::7777,server=on,wait=on"],
        &[
            "-serial",
            "unix:/nonexistent/a,server,wait=off",
            "-serial",
            "tcp::7777,server=on,wait=off",
        ],
    );
    check(
        &["-chardev", "socket,id=c,path=/nonexistent/a,server=on"],
        &["-chardev", "socket,id=c,path=/nonexistent/a,server=on,wait=off"],
    );
    let kept = ["-chardev", "socket,id=c,path=/nonexistent/a,server,nowait"];
    check(&kept, &kept);
    let kept = ["-chardev", "socket,id=c,path=/nonexistent/a", "-serial", "unix:/nonexistent/b"];
    check(&kept, &kept);
}

#[test]
fn paths_are_replaced_at_their_boundaries() {
    let rewritten = |args: &[&str], rules: &[(&str, &str)]| {
        let paths = rules.iter().map(|(old, new)| (old.to_string(), new.to_string())).collect();
        try_rewritten(args, &RewriteOptions { paths, ..Default::default() })
            .map(|mut args| args.drain(..args.len() - 2).collect::<Vec<_>>())
    };
    let one = |value: &str, old: &str, new: &str| {
        rewritten(&["-drive", value], &[(old, new)]).unwrap().remove(1)
    };
    assert_eq!(one("file=/vm/a.img,if=virtio", "/vm", "/new"), "file=/new/a.img,if=virtio");
    assert_eq!(one("file=/vm/a.img", "/vm/", "/new/"), "file=/new/a.img");
    assert_eq!(one("file=/vm2/a.img", "/vm", "/new"), "file=/vm2/a.img");
    assert_eq!(one("file=/old/vm/a.img", "/vm", "/new"), "file=/old/vm/a.img");
    assert_eq!(one("file=/vm/a,,b.img", "/vm/a,b.img", "/new,x"), "file=/new,,x");
    assert_eq!(
        one("file=nbd:unix:/vm/s:exportname=x", "/vm/s", "/n"),
        "file=nbd:unix:/n:exportname=x"
    );
    assert_eq!(one("file=vm/a.img", "vm", "new"), "file=new/a.img");
    assert_eq!(one("file=/ä/a.img,id=/äx", "/ä", "/ü"), "file=/ü/a.img,id=/äx");
    assert_eq!(one("file=/vm/a.img.bak", "/vm/a.img", "/x"), "file=/vm/a.img.bak");
    assert_eq!(
        one(r#"{"b":1,"file":{"filename":"/vm/a.img"}}"#, "/vm", "/n\"w"),
        r#"{"b":1,"file":{"filename":"/n\"w/a.img"}}"#
    );
    let untouched = r#"{ "z":1, "a":"/other" }"#;
    assert_eq!(one(untouched, "/vm", "/new"), untouched);
    // A TCP port is replaced by its text, as docs/bench.md says.
    let serial = ["-serial", "tcp:127.0.0.1:4444,server=on,wait=off"];
    let moved = rewritten(&serial, &[("127.0.0.1:4444", "127.0.0.1:4445")]).unwrap();
    assert_eq!(moved[1], "tcp:127.0.0.1:4445,server=on,wait=off");
    let forwarded = ["-netdev", "user,id=n,hostfwd=tcp::2222-:22"];
    let moved = rewritten(&forwarded, &[("tcp::2222-:22", "tcp::2223-:22")]).unwrap();
    assert_eq!(moved[1], "user,id=n,hostfwd=tcp::2223-:22");
    let swapped = rewritten(&["/a/x", "-hda", "/b/y"], &[("/a", "/b"), ("/b", "/a")]).unwrap();
    assert_eq!(swapped, ["/b/x", "-hda", "/a/y"]);
    let guests = rewritten(&["-kernel", "/vm/k,1", "-append", "root=/vm"], &[("/vm", "/n")]);
    assert_eq!(guests.unwrap(), ["-kernel", "/n/k,1", "-append", "root=/vm"]);
    for (old, new) in [("", "/x"), ("/", "/x"), ("/x", "/")] {
        assert!(matches!(rewritten(&[], &[(old, new)]), Err(GuestError::PathRule { .. })));
    }
    let mut machine = machine(&[]);
    machine.cwd = "/vm/here".to_owned();
    machine.env = vec![("QEMU_MODULE_DIR".to_owned(), "/vm/lib".to_owned())];
    let paths = vec![("/vm".to_owned(), "/new".to_owned())];
    let plan = rewrite(&machine, &RewriteOptions { paths, ..Default::default() }).unwrap();
    assert_eq!((plan.cwd, plan.env[0].1.as_str()), (PathBuf::from("/new/here"), "/new/lib"));
}

#[test]
fn inherited_descriptors_are_refused_by_name() {
    for (option, value) in [
        ("-add-fd", "fd=3,set=1"),
        ("-chardev", "socket,id=charmonitor,fd=22,server=on,wait=off"),
        (
            "-chardev",
            r#"{"id":"c","backend":{"type":"socket","data":{"addr":{"type":"fd","data":{"str":"3"}}}}}"#,
        ),
        ("-netdev", r#"{"type":"tap","fd":"24","vhost":true,"vhostfd":"26","id":"hostnet0"}"#),
        ("-netdev", "tap,id=n,fds=3:4"),
        ("-netdev", "stream,id=n,addr.type=fd,addr.str=5"),
        ("--device", r#"{"driver":"vhost-vsock-pci","vhostfd":"27","guest-cid":3}"#),
        ("-object", r#"{"qom-type":"iommufd","id":"iommufd0","fd":"28"}"#),
        ("-drive", "file=/dev/fdset/2,if=virtio"),
        ("-blockdev", r#"{"driver":"file","filename":"/dev/fdset/0","node-name":"n"}"#),
    ] {
        refused(&[option, value], "snapback serve");
        refused(&[option, value], &format!("{option} {value}"));
    }
    let kept =
        ["-netdev", "user,id=n", "-device", "e1000,netdev=n", "-append", "fd=3 /dev/fdset/1"];
    check(&kept, &kept);
}

#[test]
fn a_line_as_libvirt_writes_it_stays_as_it_is() {
    let line = [
        "-name",
        "guest=vm,debug-threads=on",
        "-machine",
        "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
        "-object",
        r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":1073741824}"#,
        "-no-user-config",
        "-nodefaults",
        "-no-shutdown",
        "-rtc",
        "base=utc,driftfix=slew",
        "-blockdev",
        r#"{"driver":"file","filename":"/nonexistent/a.qcow2","node-name":"s"}"#,
        "-device",
        r#"{"driver":"virtio-blk-pci","drive":"s","id":"virtio-disk0"}"#,
        "-chardev",
        "pty,id=charserial0",
        "-device",
        r#"{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}"#,
        "-sandbox",
        "on,obsolete=deny",
        "-msg",
        "timestamp=on",
    ];
    check(&line, &line);
}

/// A socket on which a living process, this one, listens.
fn listening(directory: &Path) -> (UnixListener, String) {
    let path = directory.join("socket");
    (UnixListener::bind(&path).unwrap(), path.to_str().unwrap().to_owned())
}

/// Has nobody listen there any more. A process that another test has just forked holds the socket
/// until it becomes another program.
fn close(listener: UnixListener, path: &str) {
    drop(listener);
    while UnixStream::connect(path).is_ok() {
        std::thread::yield_now();
    }
}

#[test]
fn control_sockets_in_use_give_way() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, path) = listening(directory.path());
    let server = format!("unix:{path},server=on,wait=off");
    for option in ["-qmp", "-monitor", "--qmp-pretty"] {
        check(&[option, &server, "-m", "1G"], &["-m", "1G"]);
    }
    let chardev = format!("socket,id=mon,path={path},server=on,wait=off");
    check(&["-chardev", &chardev, "-mon", "chardev=mon,mode=control", "-S"], &[]);
    check(&["-chardev", &chardev, "-mon", "mon"], &[]);
    check(&["-chardev", &chardev, "-qmp", "chardev:mon"], &[]);
    // Shared with a serial port it is the guest's.
    refused(&["-chardev", &chardev, "-mon", "mon", "-serial", "chardev:mon"], &path);
    // A client's socket is no collision, and neither is one that nobody uses.
    check(&["-qmp", &format!("unix:{path}")], &["-qmp", &format!("unix:{path}")]);
    close(listener, &path);
    check(&["-qmp", &server], &["-qmp", &server]);
}

#[test]
fn other_sockets_in_use_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let (listener, path) = listening(directory.path());
    for (option, value) in [
        ("-serial", format!("unix:{path},server=on,wait=off")),
        ("-serial", format!("mon:unix:{path},server,nowait")),
        ("-chardev", format!("socket,id=c,path={path},server=on")),
        (
            "-chardev",
            format!(
                r#"{{"id":"c","backend":{{"type":"socket","data":{{"addr":{{"type":"unix","data":{{"path":"{path}"}}}}}}}}}}"#
            ),
        ),
        ("-vnc", format!("unix:{path}")),
        ("-display", format!("vnc=unix:{path}")),
        ("-spice", format!("unix=on,addr={path}")),
        ("-netdev", format!("stream,id=n,server=on,addr.type=unix,addr.path={path}")),
    ] {
        refused(&[option, &value], &format!("`RewriteOptions::paths` {path}=NEW"));
        // The way out that the error names is one.
        let paths = vec![(path.clone(), "/nonexistent/new".to_owned())];
        let options = RewriteOptions { paths, ..Default::default() };
        try_rewritten(&[option, &value], &options).unwrap();
    }
    let options = RewriteOptions { qmp: Some(path.clone().into()), ..Default::default() };
    let error = try_rewritten(&[], &options).unwrap_err().to_string();
    assert!(error.contains(&path) && error.contains("listens"), "{error}");
    close(listener, &path);
    let socket = format!("unix:{path},server=on,wait=off");
    assert_eq!(try_rewritten(&[], &options).unwrap()[..2], ["-qmp", &socket]);
    // A recorded socket at the same place makes way for the one asked for.
    assert_eq!(try_rewritten(&["-qmp", &socket], &options).unwrap()[..2], ["-qmp", &socket]);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    assert!(try_rewritten(&[], &options).unwrap_err().to_string().contains("something else"));
}

#[test]
fn files_in_use_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file").to_str().unwrap().to_owned();
    let memory = format!("memory-backend-file,id=m,size=1M,share=on,mem-path={path}");
    let json = format!(
        r#"{{"qom-type":"memory-backend-file","id":"m","size":1,"share":true,"mem-path":"{path}"}}"#
    );
    let outputs = [
        ("-serial", format!("file:{path}")),
        ("-chardev", format!("file,id=c,path={path}")),
        ("-chardev", format!("null,id=c,logfile={path}")),
        ("-D", path.clone()),
    ];
    let memories = [("-object", memory), ("-object", json)];
    let writer = fs::File::create(&path).unwrap();
    for (option, value) in outputs.iter().chain(&memories) {
        refused(&[option, value], &path);
    }
    drop(writer);
    wait_taken(&outputs[0]);
    // Reading an output file harms nobody, sharing memory does.
    let reader = fs::File::open(&path).unwrap();
    let truncated = RewriteOptions { truncate_logs: true, ..Default::default() };
    for (option, value) in &outputs {
        let rewritten = try_rewritten(&[option, value], &truncated).unwrap();
        assert_eq!(rewritten[..rewritten.len() - 2], [*option, value]);
    }
    memories.iter().for_each(|(option, value)| refused(&[option, value], &path));
    drop(reader);
    wait_taken(&memories[0]);
    memories.iter().for_each(|(option, value)| check(&[option, value], &[option, value]));
}

/// Waits until an option is taken. Another test that is just starting a process holds all
/// our files for a moment, between its fork(2) and its execve(2).
fn wait_taken((option, value): &(&str, String)) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let taken = || rewrite(&machine(&[option, value]), &RewriteOptions::default()).is_ok();
    while !taken() && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
}

// From here on: with a real QEMU.

const SMALL: [&str; 8] =
    ["-nodefaults", "-display", "none", "-machine", "pc", "-m", "32", "-no-user-config"];

fn small(extra: &[&str], options: &RewriteOptions) -> StartPlan {
    rewrite(&machine(&[&SMALL[..], extra].concat()), options).unwrap()
}

/// Whether a process is there and not a zombie.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).is_some_and(|s| s != 'Z')
}

async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_rewritten_machine_starts_talks_and_dies() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp,1");
    let options = RewriteOptions { qmp: Some(socket.clone()), ..Default::default() };
    let plan = small(&["-S", "-serial", "stdio"], &options);
    let (mut process, qmp) = Process::start(plan).await.unwrap();
    assert_eq!(qmp.status().await.unwrap(), "inmigrate");
    // The caller's own control socket is there beside ours.
    let second = Qmp::connect(&socket, LONG).await.unwrap();
    assert_eq!(second.peer_pid(), Some(process.pid()));

    // Away from our terminal, and with no descriptor of ours but the socket.
    let pid = Pid::from_raw(process.pid());
    assert_eq!(getsid(Some(pid)).unwrap(), pid);
    assert_eq!(fs::read_link(format!("/proc/{pid}/fd/0")).unwrap(), Path::new("/dev/null"));
    assert!(process.has_exited().is_none());

    process.kill().await;
    assert!(process.has_exited().is_some());
    assert!(kill(pid, None).is_err(), "reaped, not a zombie");
    assert!(!socket.exists(), "nothing left behind");
    assert!(qmp.status().await.is_err());
}

#[tokio::test]
async fn only_named_descriptors_are_inherited() {
    // One that we got from elsewhere, without close-on-exec.
    let stray = fs::File::open("/etc/passwd").unwrap();
    nix::fcntl::fcntl(&stray, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut plan = small(&[], &RewriteOptions::default());
    let number = plan.inherit(OwnedFd::from(theirs));
    let (process, qmp) = Process::start(plan).await.unwrap();
    let links = fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
    let mut links = links.map(|entry| fs::read_link(entry.unwrap().path()).unwrap_or_default());
    assert!(!links.any(|link| link == Path::new("/etc/passwd")));

    qmp.set_migration_capabilities(&[("return-path", true)]).await.unwrap();
    qmp.migrate_incoming(&format!("fd:{number}")).await.unwrap();
    // QEMU has it, and only QEMU: it closes with QEMU.
    drop(process);
    assert_eq!(ours.read(&mut [0; 8]).unwrap_or(0), 0);
}

#[tokio::test]
async fn a_qemu_that_fails_is_told_in_its_own_words() {
    let plan = small(&["-device", "no-such-device"], &RewriteOptions::default());
    let error = Process::start(plan).await.unwrap_err();
    assert!(matches!(error, GuestError::Exited { .. }), "{error}");
    assert!(error.to_string().contains("'no-such-device' is not a valid device"), "{error}");

    let qemu = Some(PathBuf::from("/nonexistent/qemu"));
    let options = RewriteOptions { qemu, ..Default::default() };
    let error = Process::start(small(&[], &options)).await.unwrap_err();
    assert!(matches!(&error, GuestError::Start { .. }), "{error}");

    let mut plan = small(&[], &RewriteOptions::default());
    plan.cwd = "/nonexistent".into();
    let error = Process::start(plan).await.unwrap_err();
    assert!(matches!(error, GuestError::WorkingDirectory { .. }), "{error}");
}

#[tokio::test]
async fn a_program_that_does_not_talk_is_ended() {
    let mut plan = small(&[], &RewriteOptions::default());
    plan.binary = "/bin/echo".into();
    let error = Process::start(plan).await.unwrap_err();
    assert!(error.to_string().contains("-incoming defer"), "{error}");
}

#[tokio::test]
async fn dropped_it_dies_detached_it_lives() {
    let (process, qmp) = Process::start(small(&[], &Default::default())).await.unwrap();
    let pid = process.pid();
    drop((process, qmp));
    until(|| !lives(pid)).await;

    let (mut process, qmp) = Process::start(small(&[], &Default::default())).await.unwrap();
    let pid = process.pid();
    let pidfd = process.pidfd().as_fd().try_clone_to_owned().unwrap();
    process.detach();
    drop(process);
    assert_eq!(qmp.status().await.unwrap(), "inmigrate");
    // Without anybody on its control socket, too; then end it.
    drop(qmp);
    assert!(lives(pid));
    // SAFETY: a pidfd that is open, a signal number, no siginfo, no flags.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            std::os::fd::AsRawFd::as_raw_fd(&pidfd),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    assert_eq!(sent, 0);
    // Reaped even though nobody holds the process any more.
    until(|| kill(Pid::from_raw(pid), None).is_err()).await;
}

#[tokio::test]
async fn a_machine_is_captured_as_it_was_started_and_starts_again() {
    let mut plan = small(&["-nographic"], &RewriteOptions::default());
    plan.env = vec![
        ("QEMU_AUDIO_DRV".to_owned(), "none".to_owned()),
        ("SECRET".to_owned(), "x".to_owned()),
    ];
    plan.cwd = "/usr".into();
    let started = plan.argv.clone();
    let (process, qmp) = Process::start(plan).await.unwrap();
    let machine = capture(process.pid(), &qmp).await.unwrap();
    assert_eq!(machine.argv[..started.len()], started);
    assert_eq!(machine.cwd, "/usr");
    let recorded: Vec<&str> = machine.env.iter().map(|(name, _)| name.as_str()).collect();
    assert!(recorded.contains(&"QEMU_AUDIO_DRV") && !recorded.contains(&"SECRET"));
    assert!(Path::new(&machine.binary).ends_with("qemu-system-x86_64"));
    assert!(machine.machine_type.starts_with("pc-i440fx-") && !machine.running);
    assert_eq!(&machine.qemu, qmp.version());
    assert!(matches!(
        capture(std::process::id() as i32, &qmp).await.unwrap_err(),
        GuestError::NotQemu { .. }
    ));

    // Beside the living one, with our control socket of now and not of then.
    let again = rewrite(&machine, &RewriteOptions::default()).unwrap();
    assert_eq!(again.argv.iter().filter(|arg| arg.contains("snapback-control")).count(), 0);
    let (_second, qmp) = Process::start(again).await.unwrap();
    assert_eq!(qmp.machine_type().await.unwrap(), machine.machine_type);
}

/// The rules that lead the terminal nowhere must not change what the guest sees.
#[tokio::test]
async fn nographic_keeps_its_serial_port() {
    let devices = async |emulator: &str, args: &[&str]| {
        let binary = format!("/usr/bin/{emulator}");
        let machine = Machine { binary, ..machine(args) };
        let plan = rewrite(&machine, &RewriteOptions::default()).unwrap();
        let (_process, qmp) = Process::start(plan).await.unwrap();
        let answer = qmp.execute("query-chardev", ()).await.unwrap();
        let list = answer.as_array().unwrap().iter();
        let mut names: Vec<String> = list
            .map(|item| format!("{}={}", item["label"], item["filename"]).replace('"', ""))
            .filter(|name| !name.contains("snapback"))
            .collect();
        names.sort();
        names
    };
    let args = ["-machine", "pc", "-m", "32", "-nographic", "-net", "none"];
    let names = devices("qemu-system-x86_64", &args).await;
    assert_eq!(names, ["parallel0=null", "serial0=null"]);
    let args = ["-machine", "pc", "-m", "32", "-nographic", "-nodefaults"];
    let names = devices("qemu-system-x86_64", &args).await;
    assert!(names.is_empty(), "{names:?}");
    // A board without a parallel port; its serial port is no device of an ISA bus.
    let args = ["-machine", "virt", "-m", "32", "-nographic", "-net", "none"];
    let names = devices("qemu-system-aarch64", &args).await;
    assert_eq!(names, ["parallel0=null", "serial0=null"]);
}

#[test]
fn paths_that_each_qemu_needs_for_itself() {
    let argv = [
        "qemu",
        "-chardev",
        "socket,id=a,path=/vm/port,server=on",
        "-chardev",
        "socket,id=b,path=/elsewhere,server=off",
        "-serial",
        "file:/vm/serial.log",
        "-serial",
        "file:/dev/null",
        "-qmp",
        "unix:qmp.sock,server=on,wait=off",
        "-vnc",
        "unix:/vm/vnc",
        "-drive",
        "file=/vm/disk",
        "-D",
        "/vm/qemu.log",
    ];
    let machine = Machine { argv: argv.map(String::from).into(), ..Machine::default() };
    let paths = exclusive_paths(&machine);
    assert_eq!(paths, ["/vm/port", "/vm/qemu.log", "/vm/serial.log", "/vm/vnc", "qmp.sock"]);
    assert!(exclusive_paths(&Machine::default()).is_empty());
}

#[test]
fn what_no_two_guests_can_share_goes_to_a_place_of_its_own() {
    let argv = [
        "qemu",
        "-serial",
        "file:/vm/log",
        "-serial",
        "file:/vm/kept/log",
        "-chardev",
        "socket,id=c,path=/other/log,server=on,wait=off",
        "-qmp",
        "tcp:127.0.0.1:4444,server=on",
        "-drive",
        "file=/vm/disk",
    ];
    let machine = Machine {
        binary: "/usr/bin/qemu-system-x86_64".into(),
        argv: argv.map(String::from).into(),
        cwd: "/".into(),
        ..Machine::default()
    };
    let options = RewriteOptions {
        own: Some("/own".into()),
        paths: vec![("/vm/kept".into(), "/mine".into())],
        ..RewriteOptions::default()
    };
    let plan = rewrite(&machine, &options).unwrap();
    let line = plan.argv.join(" ");
    for part in ["=/own/log,", "=/own/log-2,", "=/mine/log,", "file=/vm/disk"] {
        assert!(line.replace("append=on", ",").contains(part), "{part}: {line}");
    }
    let new = plan.reach.ports[&4444];
    assert!(new != 4444 && line.contains(&format!("tcp:127.0.0.1:{new},")), "{line}");
    assert!(!std::path::Path::new("/own").exists());
}
