//! The sandbox of a page server, from inside: a child of this test enters it and tries to
//! break out.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use snapback::host::pidfd::Pidfd;
use snapback::host::procfs::{Mapping, Pagemap};
use snapback::host::sandbox::{Access, Sandbox, is_inside};

/// Names the directory of the child that tries; unset in the test itself.
const PLACE: &str = "SNAPBACK_TEST_SANDBOX";

/// The process that the child is to leave alone.
const STRANGER: &str = "SNAPBACK_TEST_STRANGER";

/// Ends a process with this test.
struct Stranger(Child);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nothing_gets_out() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["image", "neighbour", "program"] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    for name in ["sockets", "record", "empty", "runs"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    fs::create_dir(folder.path().join("runs/one")).unwrap();
    fs::write(folder.path().join("record/state"), "").unwrap();
    fs::write(folder.path().join("sockets/qmp"), "").unwrap();
    let stranger = Stranger(Command::new("sleep").arg("600").spawn().unwrap());
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "from_inside", "--ignored", "--nocapture"])
        .env(PLACE, folder.path())
        .env(STRANGER, stranger.0.id().to_string())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let words = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{said}\n{words}");
    assert!(said.contains("1 passed"), "{said}\n{words}");
    // Nothing was written, and nobody killed.
    assert_eq!(fs::read_to_string(folder.path().join("neighbour")).unwrap(), "neighbour");
    assert!(!folder.path().join("sockets/qmp").exists() && !folder.path().join("new").exists());
    assert!(Pidfd::open(stranger.0.id() as i32).is_ok_and(|pidfd| pidfd.kill().is_ok()));
}

fn refused<T>(what: &str, result: io::Result<T>) {
    let error = result.err().unwrap_or_else(|| panic!("{what} is possible"));
    let forbidden = matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES));
    assert!(forbidden, "{what}: {error}");
}

/// The result of a system call.
fn call(number: libc::c_long, arguments: [libc::c_long; 6]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the callers pass numbers, null pointers, and pointers to what outlives the call.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// What can be opened from inside.
struct Inside {
    place: PathBuf,
    image: File,
    sandbox: Sandbox,
}

impl Inside {
    fn prepare(place: PathBuf) -> Inside {
        let image = File::open(place.join("image")).unwrap();
        let access = Access {
            read: vec![image.as_fd()],
            read_in: Vec::new(),
            remove_in: vec![place.join("sockets")],
            write_in: vec![place.join("record")],
            remove_directories_in: vec![place.join("runs")],
        };
        let sandbox = Sandbox::new(&access).unwrap();
        Inside { place, image, sandbox }
    }
}

/// Runs in the child only.
#[test]
#[ignore = "is run by the test above, in a process of its own"]
fn from_inside() {
    let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) else { return };
    let stranger: i32 = std::env::var(STRANGER).unwrap().parse().unwrap();
    let mut inside = Inside::prepare(place);
    let fenced = inside.sandbox.fences_files();
    // A thread that has begun before is inside as well, and one that waits goes on.
    let (go, begins) = mpsc::channel::<PathBuf>();
    let before = thread::spawn(move || {
        let place = begins.recv().unwrap();
        break_out(&place, stranger, fenced);
    });
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let waits = thread::spawn(move || {
        let mut byte = [0];
        // Unlike `read_exact`, which would try again.
        ours.read(&mut byte).map(|_| byte[0])
    });
    assert!(!is_inside());
    inside.sandbox.enter().unwrap();
    assert!(is_inside());
    if !fenced {
        println!("this kernel has no Landlock: files are not tried");
    }
    io::Write::write_all(&mut &theirs, b"x").unwrap();
    assert_eq!(waits.join().unwrap().unwrap(), b'x');

    go.send(inside.place.clone()).unwrap();
    before.join().unwrap();
    break_out(&inside.place, stranger, fenced);
    let place = inside.place.clone();
    thread::spawn(move || break_out(&place, stranger, fenced)).join().unwrap();

    // What serving takes is still there.
    let mut text = String::new();
    inside.image.read_to_string(&mut text).unwrap();
    assert_eq!(text, "image");
    if fenced {
        assert_eq!(fs::read_to_string(inside.place.join("image")).unwrap(), "image");
        fs::read("/proc/net/unix").unwrap();
        again(&inside.place);
    }
    fs::remove_file(inside.place.join("sockets/qmp")).unwrap();
    fs::write(inside.place.join("record/new"), "new").unwrap();
    fs::rename(inside.place.join("record/new"), inside.place.join("record/state")).unwrap();
    assert_eq!(fs::read_to_string(inside.place.join("record/state")).unwrap(), "new");
    fs::remove_dir(inside.place.join("runs/one")).unwrap();
    assert!(UnixStream::pair().is_ok());
    // Entering again is possible for a process alone, and changes nothing.
    Sandbox::of(None).enter_alone().unwrap();
}

/// Tries everything that a server that was taken over might try.
fn break_out(place: &Path, stranger: i32, fenced: bool) {
    if fenced {
        refused("reading another file", File::open("/etc/passwd"));
        refused("reading of the host", File::open("/proc/meminfo"));
        refused("reading what is beside the image", File::open(place.join("neighbour")));
        refused("writing the image", File::options().write(true).open(place.join("image")));
        refused("writing another file", fs::write(place.join("neighbour"), "x"));
        refused("a new file", File::create(place.join("new")));
        refused("a new file of a socket's", File::create(place.join("sockets/new")));
        refused("listing a directory", fs::read_dir("/"));
        refused("removing another file", fs::remove_file(place.join("neighbour")));
        refused("moving a file", fs::rename(place.join("neighbour"), place.join("image")));
        refused("removing a directory", fs::remove_dir(place.join("empty")));
        let out = fs::rename(place.join("record/state"), place.join("state"));
        // EXDEV for a file that is only out of place (landlock(7)).
        assert!(out.is_err(), "a record can be moved out");
        refused("another program", Err::<(), _>(Command::new("/bin/sh").arg("-c").arg(":").exec()));
        refused("a stranger's mappings", Mapping::all_of(stranger));
        refused("a stranger's memory", File::open(format!("/proc/{stranger}/mem")));
        refused("a stranger's page map", Pagemap::open(stranger));
    }
    refused("a link", fs::hard_link(place.join("neighbour"), place.join("new")));
    refused("a directory", fs::create_dir(place.join("new")));
    refused("a mode", call(libc::SYS_fchmodat, [libc::AT_FDCWD.into(), 0, 0o666, 0, 0, 0]));
    refused("an Internet socket", TcpStream::connect(("127.0.0.1", 9)));
    refused("a Unix socket", UnixStream::connect(place.join("sockets/qmp")));
    refused("a datagram socket", UnixDatagram::unbound());
    refused("a packet socket", call(libc::SYS_socket, [17, 3, 0, 0, 0, 0]));
    refused("killing a stranger", call(libc::SYS_kill, [stranger.into(), 9, 0, 0, 0, 0]));
    refused("a pidfd of a stranger", Pidfd::open(stranger));
    refused(
        "a signal to a stranger's thread",
        call(libc::SYS_tgkill, [stranger.into(), stranger.into(), 9, 0, 0, 0]),
    );
    let attach = libc::PTRACE_ATTACH.into();
    refused("tracing", call(libc::SYS_ptrace, [attach, stranger.into(), 0, 0, 0, 0]));
    for read in [libc::SYS_process_vm_readv, libc::SYS_process_vm_writev] {
        refused("a process's memory", call(read, [stranger.into(), 0, 0, 0, 0, 0]));
    }
    let on_itself = call(libc::SYS_process_madvise, [-1, 0, 0, 0, 0, 0]);
    refused("advice to other processes", on_itself);
    refused("copying a descriptor", call(libc::SYS_pidfd_getfd, [0; 6]));
    refused(
        "asynchronous calls around the filter",
        call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0, 0]),
    );
    refused("a namespace", call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0, 0]));
    let fork = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
    refused("a process in a namespace", call(libc::SYS_clone, [fork, 0, 0, 0, 0, 0]));
    refused("a mount", call(libc::SYS_mount, [0; 6]));
    refused("another root", call(libc::SYS_chroot, [0; 6]));
    refused("a kernel module", call(libc::SYS_init_module, [0; 6]));
    refused("a program for the kernel", call(libc::SYS_bpf, [0; 6]));
    refused("another user", call(libc::SYS_setuid, [0; 6]));
    let limits = [stranger.into(), libc::RLIMIT_CPU.into(), 0, 0, 0, 0];
    refused("a stranger's limits", call(libc::SYS_prlimit64, limits));
    let owner = [0, libc::F_SETOWN.into(), stranger.into(), 0, 0, 0];
    refused("a signal to who owns a descriptor", call(libc::SYS_fcntl, owner));
    refused(
        "a pidfd of a peer",
        call(libc::SYS_getsockopt, [0, libc::SOL_SOCKET.into(), 77, 0, 0, 0]),
    );
    refused("memory to run as a program", call(libc::SYS_memfd_create, [0; 6]));
    refused("limits of memory", call(libc::SYS_mlockall, [0; 6]));
    let types = call(libc::SYS_ioctl, [0, libc::TIOCSTI as _, 0, 0, 0, 0]);
    refused("typing into the terminal", types);
    refused("a core dump", call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0, 0, 0]));
    refused("other rules", call(libc::SYS_landlock_create_ruleset, [0, 0, 1, 0, 0, 0]));
}

/// Starts this program again, which is inside from its first instruction on.
fn again(place: &Path) {
    let child = Command::new("/proc/self/exe")
        .args(["--exact", "started_from_inside", "--ignored", "--nocapture"])
        .env(PLACE, place)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    let words = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && said.contains("1 passed"), "{said}\n{words}");
}

#[test]
#[ignore = "is run by the test above, from inside"]
fn started_from_inside() {
    let Some(place) = std::env::var_os(PLACE).map(PathBuf::from) else { return };
    let stranger: i32 = std::env::var(STRANGER).unwrap().parse().unwrap();
    let image = File::open(place.join("image")).unwrap();
    assert!(image.as_raw_fd() > 2);
    break_out(&place, stranger, true);
    // One that was started from inside is told to enter, and is there.
    Sandbox::of(None).enter_alone().unwrap();
}
