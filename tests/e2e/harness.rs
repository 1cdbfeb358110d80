//! A test's folder, and the program run in it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    Attached, Contact, Pidfd, Qemu, Result, SOON, SerialLog, process_gone, spawn_bound, wait_for,
    wait_until,
};

/// Allowed for one command, and for each of its events: far more than it takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs a test in a folder of its own, and checks that it leaves nothing.
pub fn in_a_folder(test: impl FnOnce(&Dir) -> Result<()>) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("snapback-e2e-").tempdir()?;
    let runtime = tempfile::Builder::new().prefix("snapback-e2e-runtime-").tempdir()?;
    let dir = Dir { folder, runtime };
    test(&dir)?;
    wait_for(SOON, "processes to end", || Ok(dir.processes().is_empty().then_some(())))
        .map_err(|e| format!("{e}: {:?} are left behind", dir.processes()))?;
    Ok(())
}

/// A test's folder.
pub struct Dir {
    folder: TempDir,
    /// The user's runtime directory.
    runtime: TempDir,
}

impl Dir {
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The directory in which the program records reverts.
    pub fn runs(&self) -> PathBuf {
        self.runtime.path().join("snapback")
    }

    /// A new folder in it.
    pub fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir(&path)?;
        Ok(path)
    }

    /// The program with these arguments and `--json`, to be run in the folder.
    pub fn snapback(&self, args: &[&str]) -> Snapback {
        let mut words: Vec<String> = args.iter().map(|arg| arg.to_string()).collect();
        words.insert(1, "--json".into());
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command.current_dir(self.folder.path()).env("XDG_RUNTIME_DIR", self.runtime.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Snapback { command, words }
    }

    /// `save` of a guest into an image of that name.
    pub fn save(&self, guest: &Contact, image: &str) -> Snapback {
        let image = self.path(image);
        self.snapback(&["save", "--qmp", text(&guest.qmp_path), text(&image)])
    }

    /// `revert` of an image whose guest had its files in `from`; they will be in `to`.
    pub fn revert(&self, image: &Path, from: &Path, to: &Path) -> Snapback {
        let path = format!("{}={}", text(from), text(to));
        self.snapback(&["revert", text(image), "--path", &path])
    }

    /// Reverts an image until the guest runs, its files in a new folder `name`.
    pub fn reverted(&self, image: &Path, from: &Path, name: &str) -> Result<Reverted> {
        Reverted::of(self.revert(image, from, &self.make(name)?), &self.path(name))
    }

    /// Names of all files in a folder of this name (`.` is the folder itself), in order.
    pub fn names(&self, folder: &str) -> Result<Vec<String>> {
        names(&self.path(folder))
    }

    /// Names of what the program has left of reverts: records and logs.
    pub fn recorded(&self) -> Result<Vec<String>> {
        match self.runs().exists() {
            true => names(&self.runs()),
            false => Ok(Vec::new()),
        }
    }

    /// Names of the sockets in a folder.
    pub fn sockets(&self, folder: &str) -> Result<Vec<String>> {
        let is_socket = |name: &String| {
            fs::symlink_metadata(self.path(folder).join(name))
                .is_ok_and(|meta| meta.file_type().is_socket())
        };
        Ok(self.names(folder)?.into_iter().filter(is_socket).collect())
    }

    /// Living processes that work in this folder or were started with its name: the
    /// program, and every QEMU that it started.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let describe = |pid: u32| {
            let command_line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command_line = String::from_utf8_lossy(&command_line).replace('\0', " ");
            let cwd = fs::read_link(format!("/proc/{pid}/cwd"));
            let here = cwd.is_ok_and(|cwd| cwd.starts_with(self.folder.path()))
                || command_line.contains(text(self.folder.path()));
            (here && pid != std::process::id() && !process_gone(pid)).then_some((pid, command_line))
        };
        pids.filter_map(describe).collect()
    }
}

/// Names of all files in a folder, in order.
fn names(folder: &Path) -> Result<Vec<String>> {
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let names = fs::read_dir(folder)?.map(|entry| entry.map(name));
    let mut names: Vec<_> = names.collect::<std::io::Result<_>>()?;
    names.sort();
    Ok(names)
}

impl Drop for Dir {
    /// A test that failed may have left something.
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let Ok(process) = Pidfd::open(pid) else { continue };
            // Held by the descriptor now: is it still one of ours?
            if self.processes().iter().any(|(other, _)| *other == pid) {
                let _ = process.kill();
            }
        }
    }
}

/// A path of these tests, all of which are UTF-8.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A command to run.
pub struct Snapback {
    command: Command,
    words: Vec<String>,
}

impl Snapback {
    /// Adds arguments at the end.
    pub fn with(mut self, args: &[&str]) -> Snapback {
        self.words.extend(args.iter().map(|arg| arg.to_string()));
        self
    }

    /// With a variable in its environment.
    pub fn env(mut self, name: &str, value: &str) -> Snapback {
        self.command.env(name, value);
        self
    }

    /// Without the right to trace processes that have it (CAP_SYS_PTRACE, capabilities(7)).
    pub fn without_ptrace(mut self) -> Snapback {
        const CAP_SYS_PTRACE: libc::c_ulong = 19;
        // SAFETY: prctl(2) is async-signal-safe and takes numbers only here; an error of a bare
        // code allocates nothing.
        unsafe {
            self.command.pre_exec(|| match libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_PTRACE) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        self
    }

    /// As this user, without any group.
    pub fn by_user(mut self, user: u32) -> Snapback {
        self.command.uid(user).gid(user);
        self
    }

    /// Where userfaultfd(2) is refused to everybody, as by a container's filter (seccomp(2)).
    pub fn without_userfaultfd(mut self) -> Snapback {
        // SAFETY: prctl(2) is async-signal-safe, and the filter that it reads lives until it
        // returns; an error of a bare code allocates nothing.
        unsafe { self.command.pre_exec(refuse_userfaultfd) };
        self
    }

    /// For people instead of programs: without `--json`.
    pub fn plain(mut self) -> Snapback {
        self.words.remove(1);
        self
    }

    pub fn start(mut self) -> Result<Running> {
        if let Ok(way) = std::env::var("SNAPBACK_TEST_PLACE")
            && ["revert", "serve"].contains(&self.words[0].as_str())
            && !self.words.iter().any(|word| word == "--place")
        {
            // Behind the image, ahead of what is QEMU's.
            let at = self.words.iter().position(|word| word == "--").unwrap_or(self.words.len());
            self.words.splice(at..at, ["--place".into(), way]);
        }
        self.command.args(&self.words);
        let mut child = spawn_bound(self.command)?;
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(|line| line.ok()) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut said = Vec::new();
            let _ = stderr.read_to_end(&mut said);
            String::from_utf8_lossy(&said).into_owned()
        });
        let json = self.words.get(1).is_some_and(|word| word == "--json");
        Ok(Running {
            child,
            lines,
            stderr: Some(stderr),
            json,
            said: Vec::new(),
            events: Vec::new(),
        })
    }

    /// Runs it to its end.
    pub fn end(self) -> Result<Ended> {
        self.start()?.end()
    }

    /// Runs it to its end, which must be a good one.
    pub fn succeed(self) -> Result<Ended> {
        self.start()?.succeed()
    }

    /// Runs it to its end, which must be an error, and returns its message.
    pub fn fail(self) -> Result<String> {
        self.end()?.failure()
    }
}

/// Has userfaultfd(2) fail with EPERM from now on, in this process and its children.
fn refuse_userfaultfd() -> std::io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let is_it = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let mut filter = [
        // The number of the system call comes first in `seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { jf: 1, ..statement(is_it, libc::SYS_userfaultfd as u32) },
        statement(libc::BPF_RET | libc::BPF_K, refusal),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: prctl(2) reads the program and the filter, which live until it returns.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// A command under way. Dropping it kills it.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
    json: bool,
    said: Vec<String>,
    events: Vec<Value>,
}

impl Running {
    /// The next event, none when the program has closed its output.
    pub fn next_event(&mut self) -> Result<Option<Value>> {
        let line = match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("no event in {PATIENCE:?} after {:?}", self.said).into());
            }
        };
        let event = match self.json {
            true => event(&line)?,
            false => Value::Null,
        };
        self.said.push(line);
        self.events.push(event);
        Ok(self.events.last().cloned())
    }

    /// Waits for the first event to come that has one of these names.
    pub fn wait_any(&mut self, names: &[&str]) -> Result<Value> {
        while let Some(event) = self.next_event()? {
            if names.iter().any(|name| event["event"] == *name) {
                return Ok(event);
            }
        }
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok());
        Err(format!("it ended without any of {names:?}: {:?} {stderr:?}", self.said).into())
    }

    /// All that it has said by now, for error messages.
    pub fn said(&mut self) -> &[String] {
        self.said.extend(self.lines.try_iter());
        &self.said
    }

    /// Waits for an event.
    pub fn wait(&mut self, name: &str) -> Result<Value> {
        self.wait_any(&[name])
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: i32) {
        send_signal(self.child.id(), signal);
    }

    /// Waits until it stands still (SIGSTOP).
    pub fn wait_stopped(&self) -> Result<()> {
        wait_stopped(self.pid())
    }

    /// Waits for its end.
    pub fn end(mut self) -> Result<Ended> {
        while self.next_event()?.is_some() {}
        let child = &mut self.child;
        let status = wait_for(PATIENCE, "the program to end", || Ok(child.try_wait()?))?;
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        assert!(!stderr.contains("panicked"), "{stderr}");
        let (said, events) = (std::mem::take(&mut self.said), std::mem::take(&mut self.events));
        Ok(Ended { code: status.code(), said, events, stderr })
    }

    /// Waits for its end, which must be a good one.
    pub fn succeed(self) -> Result<Ended> {
        let ended = self.end()?;
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{:?}", ended.said);
        Ok(ended)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails when it has ended, and does no harm then: it is reaped only here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process that has not been reaped, or is known to live.
pub fn send_signal(pid: u32, signal: i32) {
    // SAFETY: kill(2) takes numbers only.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Waits until a process stands still (SIGSTOP).
pub fn wait_stopped(pid: u32) -> Result<()> {
    wait_for(SOON, "the program to stand still", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name in parentheses may hold anything; the state follows it.
        match stat.rsplit_once(") ").map(|(_, rest)| &rest[..1]) {
            Some("T") => Ok(Some(())),
            Some("Z" | "X") | None => Err("it ended before".into()),
            Some(_) => Ok(None),
        }
    })
}

/// Codes of errors that come up once something has been touched; any other code but those of
/// damage and interrupts is a refusal.
const FAILED: &[&str] = &[
    "agent_failed",
    "backup_failed",
    "clones_failed",
    "guest_changed",
    "hook_failed",
    "internal",
    "io",
    "left_over",
    "libvirt_refused",
    "monitor_failed",
    "no_space",
    "not_proved",
    "nothing_demanded",
    "permission_denied",
    "qemu_ended",
    "qemu_failed",
    "qemu_not_started",
    "qemu_protocol",
    "qemu_refused",
    "qemu_timeout",
    "server_lost",
    "still_frozen",
    "store_unreachable",
];

/// A line of `--json`, which has to be as docs/events.schema.json says.
fn event(line: &str) -> Result<Value> {
    static SCHEMA: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
        let schema = include_str!("../../docs/events.schema.json");
        jsonschema::validator_for(&serde_json::from_str(schema).unwrap()).unwrap()
    });
    let event: Value = serde_json::from_str(line).map_err(|e| format!("{e} in `{line}`"))?;
    let wrong: Vec<_> = SCHEMA.iter_errors(&event).map(|error| error.to_string()).collect();
    match wrong.is_empty() {
        true => Ok(event),
        false => Err(format!("{wrong:?} in `{line}`").into()),
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    /// The lines of its output.
    pub said: Vec<String>,
    /// The same as JSON.
    pub events: Vec<Value>,
    pub stderr: String,
}

impl Ended {
    /// The first event of that name.
    pub fn event(&self, name: &str) -> Result<&Value> {
        let found = self.events.iter().find(|event| event["event"] == name);
        found.ok_or_else(|| format!("no event `{name}` in {:?}", self.said).into())
    }

    /// The names of its events, without those that have no fixed place among them or come with
    /// some transports only.
    pub fn steps(&self) -> Vec<&str> {
        let names = self.events.iter().filter_map(|event| event["event"].as_str());
        names.filter(|name| !["progress", "placing", "collapsed"].contains(name)).collect()
    }

    /// What it said of its failure: the exit code of its kind, the same in its events and on
    /// standard error, in one message that begins with the program's name.
    pub fn failure(&self) -> Result<String> {
        let error = self.event("error")?;
        let kind = error["code"].as_str().ok_or("an error without a code")?;
        let expected = match kind {
            "image_damaged" => 4,
            "interrupted" => 130,
            _ if FAILED.contains(&kind) => 1,
            _ => 3,
        };
        assert_eq!(self.code, Some(expected), "{self:?}");
        assert!(error["retryable"].is_boolean(), "{self:?}");
        let message = self.event("error")?["message"].as_str().ok_or("an error in no words")?;
        assert_eq!(self.events.last().unwrap()["event"], "error", "{self:?}");
        // Warnings may come before.
        assert!(self.stderr.ends_with(&format!("snapback: {message}\n")), "{self:?}");
        Ok(message.to_owned())
    }
}

/// A guest brought back by the program. Dropping it ends both.
pub struct Reverted {
    // Dropped in this order: without its server the guest would only wait.
    guest: Attached,
    /// The program, until it has been waited for.
    pub server: Option<Running>,
}

impl Reverted {
    /// Runs a `revert` until the guest runs; its files are in `folder`.
    pub fn of(command: Snapback, folder: &Path) -> Result<Reverted> {
        let mut server = command.start()?;
        let running = server.wait("running")?;
        let pid = running["pid"].as_u64().ok_or("the guest runs without a process")?;
        Reverted::take(server, pid as u32, folder)
    }

    /// Takes over the guest in QEMU process `pid`, which runs already.
    pub fn take(server: Running, pid: u32, folder: &Path) -> Result<Reverted> {
        Ok(Reverted { server: Some(server), ..Reverted::alone(pid, folder)? })
    }

    /// The guest in QEMU process `pid`, whose server is somebody else's.
    pub fn alone(pid: u32, folder: &Path) -> Result<Reverted> {
        let mut guest = Attached::to(pid, folder)?;
        // Its file is new: all of it is the reverted guest's.
        guest.log = SerialLog::whole(&folder.join("serial0.log"));
        Ok(Reverted { guest, server: None })
    }

    /// Waits until all memory is in place and the program has ended well.
    pub fn resident(&mut self) -> Result<Ended> {
        let ended = self.server.take().ok_or("it has been waited for")?.succeed()?;
        let resident = ended.event("resident")?;
        assert_eq!(resident["pages"], resident["total"]);
        Ok(ended)
    }

    /// The guest alone, once its server has been waited for.
    pub fn into_guest(self) -> Attached {
        self.guest
    }

    /// Checks that the guest is the one of this nonce, and its memory right.
    pub fn check(&mut self, nonce: &str) -> Result<()> {
        assert_eq!(self.oracle.nonce()?, nonce);
        check(&mut self.guest)
    }
}

impl Deref for Reverted {
    type Target = Contact;
    fn deref(&self) -> &Contact {
        &self.guest
    }
}

impl DerefMut for Reverted {
    fn deref_mut(&mut self) -> &mut Contact {
        &mut self.guest
    }
}

/// Checks that a guest lives and its memory is right.
pub fn check(guest: &mut Contact) -> Result<()> {
    let beat = guest.log.last_beat().map_or(0, |beat| beat.number);
    guest.log.wait_beat(beat, SOON)?;
    let verdict = guest.oracle.check()?;
    assert!(verdict.ok() && verdict.pages > 1000, "{verdict:?}; {:?}", guest.oracle.complaints());
    Ok(())
}

/// Prints the median of some times in milliseconds, and the least.
pub fn print_times(what: &str, times: &mut [f64]) {
    times.sort_by(f64::total_cmp);
    let (least, median) = (times[0], times[times.len() / 2]);
    println!("{what}: {median:.1} ms, least {least:.1}");
}

/// Waits until a process is gone.
pub fn wait_gone(pid: u32) -> Result<()> {
    wait_until(SOON, "a process to end", || process_gone(pid))
}

/// The variable that names the step at which a save stops: in builds for tests only.
pub const STOP_AT: &str = "SNAPBACK_TEST_STOP_AT";

/// What a save with two disks does, step by step.
pub const STEPS: [&str; 15] = [
    "journal",
    "settings",
    "overlay 0",
    "overlay 1",
    "ready",
    "held",
    "stopped",
    "switched",
    "migrating",
    "first page",
    "released",
    "moment",
    "received",
    "restored",
    "named",
];

/// The steps that are tried with this QEMU: every second one, and the other QEMU has the rest. With
/// SNAPBACK_TEST_EVERY_STEP, as `make torture` sets it, all of them.
pub fn steps_of<T>(qemu: Qemu, steps: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let (first, stride) = match std::env::var_os("SNAPBACK_TEST_EVERY_STEP") {
        Some(_) => (0, 1),
        None => (usize::from(qemu == Qemu::V7), 2),
    };
    steps.into_iter().skip(first).step_by(stride)
}

/// Makes tests of functions of a folder.
macro_rules! tests {
    ($($name:ident)*) => {$(
        mod $name {
            #[test]
            fn works() -> crate::support::Result<()> {
                crate::harness::in_a_folder(super::$name)
            }
        }
    )*};
}

pub(crate) use tests;
