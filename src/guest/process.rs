//! A QEMU process: started, supervised, ended or detached.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::guest::GuestError;
use crate::guest::disks::overlay::Overlays;
use crate::guest::start::own::OwnDirectory;
use crate::guest::start::plan::{CONTROL_ID, StartPlan};
use crate::host::in_use;
use crate::host::in_use::Address;
use crate::host::pidfd::Pidfd;
use crate::host::procfs::descriptor_link;
use crate::host::shared_memory::sealed_file;
use crate::qmp::{Qmp, QmpError};

/// How long QEMU may take from its start until it answers on QMP. It takes 40 ms; a loaded
/// host may take far longer, and a QEMU that fails ends the wait at once.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may take to end after it has closed its control socket.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The most bytes of QEMU's output that are kept. The first ones matter: why QEMU did not
/// start. Further writes fail, which QEMU ignores.
const LOG_CAPACITY: u64 = 1 << 20;

/// What the name of the file of its output begins with. The plan's label follows.
const LOG_NAME: &str = "qemu-log of ";

/// The most bytes of the log shown at once.
const LOG_TAIL: u64 = 4096;

/// A QEMU process. Dropping it kills QEMU and waits until it is gone, unless it has
/// been [detached]; the overlays that were made for it go too, unless they are kept.
///
/// [detached]: Process::detach
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: Pidfd,
    log: Log,
    /// Its exit status; `None` while it runs.
    ended: watch::Receiver<Option<ExitStatus>>,
    /// The thread that reaps it and cleans up behind it.
    reaper: Option<JoinHandle<()>>,
    detached: bool,
    /// Its listening sockets with a file, which is removed when it has ended.
    sockets: Vec<PathBuf>,
    /// The overlays that it writes to.
    overlays: Overlays,
}

impl Process {
    /// Starts QEMU as planned and connects to it.
    ///
    /// It runs in a session of its own, so that signals of our terminal don't reach it. It
    /// inherits our environment and the descriptors named in the plan, and nothing else.
    ///
    /// # Errors
    /// [`GuestError::Exited`] with QEMU's own words when it ends at once,
    /// [`GuestError::Start`] and [`GuestError::WorkingDirectory`] when it can't be started.
    pub async fn start(mut plan: StartPlan) -> Result<(Process, Qmp), GuestError> {
        if let Err(source) = fs::read_dir(&plan.cwd) {
            return Err(GuestError::WorkingDirectory { path: plan.cwd, source });
        }
        let log = Log::new(&plan.label).map_err(failed_to("keep QEMU's output"))?;
        let (ours, theirs) = control_pair().map_err(failed_to("make a control socket"))?;
        let mut own = plan.own.as_deref().map(OwnDirectory::make).transpose()?;
        let overlays = plan.make_overlays()?;
        let child = spawn(&plan, theirs, &log)?;
        // QEMU's end of everything inherited has to close with QEMU, not with us. It has bound its
        // ports when it answers.
        let StartPlan { binary, sockets, reserved: _reserved, .. } = plan;
        let process = Process::watch(child, log, sockets, overlays)?;

        match Qmp::over(ours, START_TIMEOUT).await {
            Ok(qmp) => {
                own.iter_mut().for_each(OwnDirectory::keep);
                Ok((process, qmp))
            }
            Err(source) => Err(process.failed_start(binary, source).await),
        }
    }

    /// Supervises a child from now on.
    fn watch(
        mut child: Child,
        log: Log,
        sockets: Vec<PathBuf>,
        overlays: Overlays,
    ) -> Result<Process, GuestError> {
        // A pid is at most 2^22 (proc(5), pid_max).
        let pid = child.id() as i32;
        let pidfd = match Pidfd::open(pid) {
            Ok(pidfd) => pidfd,
            Err(source) => {
                // Not reaped yet, so the pid is still QEMU's.
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed_to("open a pidfd of QEMU")(source));
            }
        };
        let (tell, ended) = watch::channel(None);
        let mut process = Process {
            pid,
            pidfd,
            log,
            ended,
            reaper: None,
            detached: false,
            sockets: sockets.clone(),
            overlays,
        };
        // A thread and not a task: it reaps QEMU even when the runtime has ended.
        let reaper = move || {
            let status = child.wait();
            sockets.iter().for_each(|socket| remove_stale_socket(socket));
            // `wait` fails only if other code has reaped the child: its status is lost then,
            // but it has ended.
            tell.send_replace(Some(status.unwrap_or_default()));
        };
        match std::thread::Builder::new().name("qemu-reaper".to_owned()).spawn(reaper) {
            Ok(reaper) => {
                process.reaper = Some(reaper);
                Ok(process)
            }
            // Dropping the process kills it; it stays unreaped until we end.
            Err(source) => Err(failed_to("start a thread that reaps QEMU")(source)),
        }
    }

    /// The error of a start whose connection failed.
    async fn failed_start(mut self, binary: PathBuf, source: QmpError) -> GuestError {
        let status = match source {
            QmpError::NoGreeting { .. } => None,
            _ => self.wait_exit(END_TIMEOUT).await,
        };
        let log = self.log_tail();
        match status {
            Some(status) => GuestError::Exited { binary, status, log },
            None => {
                self.kill().await;
                GuestError::NoControl { binary, source, log }
            }
        }
    }

    /// QEMU's process number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor of QEMU's process (pidfd_open(2)), readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// QEMU's exit status, or `None` while it runs.
    pub fn has_exited(&self) -> Option<ExitStatus> {
        *self.ended.borrow()
    }

    /// Waits until QEMU has ended; `None` if it still runs after `timeout`. Cancel-safe.
    pub async fn wait_exit(&mut self, timeout: Duration) -> Option<ExitStatus> {
        // Fails once the reaper has ended, which stores the status before.
        let _ = tokio::time::timeout(timeout, self.ended.wait_for(Option::is_some)).await;
        self.has_exited()
    }

    /// Waits until QEMU has ended. Cancel-safe.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut ended = self.ended.clone();
        // As in `wait_exit`.
        async move { _ = ended.wait_for(Option::is_some).await }
    }

    /// Kills QEMU (SIGKILL) and waits until it is gone.
    pub async fn kill(&mut self) {
        self.send_sigkill();
        self.ended().await;
    }

    /// The last 4 KiB of QEMU's standard output and error, of which the first MiB is kept. It
    /// holds no output of the guest, which a rewritten command line directs elsewhere.
    pub fn log_tail(&self) -> String {
        self.log.tail()
    }

    /// The file that its output goes to, for a process that may have to take over
    /// ([`Log::of`]).
    pub fn output(&self) -> BorrowedFd<'_> {
        self.log.file.as_fd()
    }

    /// Its listening sockets with a file, which is removed when it has ended.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Keeps the overlays of its disks when QEMU ends, since a guest has written to them.
    pub fn keep_overlays(&mut self) {
        self.overlays.keep();
    }

    /// Lets QEMU run on after this process. Until then it is still reaped.
    pub fn detach(&mut self) {
        self.detached = true;
        self.overlays.keep();
    }

    fn send_sigkill(&self) {
        // Fails when it has ended already, which is what we want.
        let _ = self.pidfd.kill();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.detached {
            return;
        }
        if self.has_exited().is_none() {
            self.send_sigkill();
        }
        // QEMU and its sockets are gone even if the program ends right after this.
        if let Some(reaper) = self.reaper.take() {
            let _ = reaper.join();
        }
    }
}

fn failed_to(what: &'static str) -> impl FnOnce(io::Error) -> GuestError {
    move |source| GuestError::Supervise { what, source }
}

/// Our end and QEMU's end of the control socket.
fn control_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// Starts QEMU with `control` as its control socket.
fn spawn(plan: &StartPlan, control: OwnedFd, log: &Log) -> Result<Child, GuestError> {
    let program = plan.argv.first().ok_or(GuestError::EmptyCommandLine)?;
    let keep = log.file.try_clone().and_then(|out| Ok((out, log.file.try_clone()?)));
    let (stdout, stderr) = keep.map_err(failed_to("keep QEMU's output"))?;
    let number = control.as_raw_fd();
    let mut inherited: Vec<RawFd> = plan.inherit.iter().map(AsRawFd::as_raw_fd).collect();
    inherited.push(number);

    let mut command = Command::new(&plan.binary);
    command
        .arg0(program)
        .args(&plan.argv[1..])
        .args(["-chardev", &format!("socket,id={CONTROL_ID},fd={number}")])
        .args(["-mon", &format!("chardev={CONTROL_ID},mode=control")])
        .current_dir(&plan.cwd)
        .envs(plan.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr);
    // SAFETY: between fork and exec the closure makes system calls only, which
    // are async-signal-safe (signal-safety(7)); it neither allocates nor locks.
    // The descriptors it names are open in the child, which is a copy of us
    // while `control` and `plan` are borrowed or owned here.
    unsafe {
        command.pre_exec(move || before_exec(&inherited));
    }
    command.spawn().map_err(|source| GuestError::Start { binary: plan.binary.clone(), source })
}

/// In the child: a session of its own, and no descriptors except those named. Allocates
/// nothing, not even on failure.
fn before_exec(inherited: &[RawFd]) -> io::Result<()> {
    nix::unistd::setsid()?;
    let first: libc::c_uint = 3;
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC changes flags of this
    // process's descriptors and nothing else. Linux before 5.11 refuses; what
    // we opened ourselves is close-on-exec anyway.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_uint,
        );
    }
    for &fd in inherited {
        // SAFETY: F_SETFD changes one flag of a descriptor.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Removes the socket file that a killed QEMU leaves behind, unless another process
/// listens there by now.
fn remove_stale_socket(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let address = Address::Unix(path.to_string_lossy().into_owned());
    if is_socket && in_use::is_listening(&address, Path::new("/")).is_ok_and(|lives| !lives) {
        // If this fails, a socket file without a listener stays, which harms nothing.
        let _ = fs::remove_file(path);
    }
}

/// The label of the plan by which process `pid` was started; nothing where it was not started by
/// one, or its output can't be seen.
pub fn label_of(pid: i32) -> Option<String> {
    let link = descriptor_link(pid, libc::STDERR_FILENO).ok()?;
    let label = link.to_str()?.strip_prefix("/memfd:")?.strip_prefix(LOG_NAME)?;
    Some(label.strip_suffix(" (deleted)").unwrap_or(label).to_owned())
}

/// QEMU's output, in a memfd of bounded size: it needs no thread to drain it, and is freed
/// with its last descriptor.
#[derive(Debug)]
pub struct Log {
    file: File,
}

impl Log {
    fn new(label: &str) -> io::Result<Log> {
        let name = CString::new(format!("{LOG_NAME}{label}"))?;
        Ok(Log { file: sealed_file(&name, LOG_CAPACITY)? })
    }

    /// The output of a QEMU that another process has started ([`Process::output`]).
    pub fn of(file: OwnedFd) -> Log {
        Log { file: file.into() }
    }

    /// The last 4 KiB of it.
    pub fn tail(&self) -> String {
        // QEMU writes through copies of our descriptor: the offset is shared.
        let end = (&self.file).stream_position().unwrap_or(0);
        let start = end.saturating_sub(LOG_TAIL);
        let mut bytes = vec![0; (end - start) as usize];
        match self.file.read_exact_at(&mut bytes, start) {
            Ok(()) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(error) => format!("(QEMU's output can't be read: {error})"),
        }
    }
}
