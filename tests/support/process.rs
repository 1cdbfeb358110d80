//! Processes: started so that they can't outlive the tests, ended by their own id.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use super::{Result, SOON, wait_until};

/// Whether the process is no more, or only its exit code is left.
pub fn process_gone(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The name in parentheses may itself hold any character; the state follows it.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('Z' | 'X') | None)
}

/// The process's resident memory in KiB (`VmRSS`, proc_pid_status(5)).
///
/// # Errors
/// When the process is gone.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.strip_suffix("kB"));
    Ok(kib.ok_or("the process has no memory any more")?.trim().parse()?)
}

type Order = (Command, Sender<io::Result<Child>>);

/// Starts a process that the kernel kills when this one ends, however it ends.
///
/// # Errors
/// When it can't be started.
pub fn spawn_bound(mut command: Command) -> Result<Child> {
    // PR_SET_PDEATHSIG speaks of the thread which started the process, not of the
    // whole parent (prctl(2)), and a test may start guests from threads that end
    // before it. So one thread that lasts starts them all.
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in orders {
                // A caller that went away gets its process killed with the rest.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl and getppid are called, both of
    // which are async-signal-safe; an error of a bare code allocates nothing.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the call above.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    let (reply, answer) = channel();
    spawner.send((command, reply)).map_err(|_| "the thread that starts processes has ended")?;
    Ok(answer.recv()??)
}

/// Bytes in huge pages of a QEMU's guest memory of so many MiB (proc_pid_smaps(5)): in anonymous
/// mappings at least as large that can be written to but not executed.
pub fn huge_bytes(pid: u32, mib: u64) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let kib = |line: &str, name| -> Option<u64> {
        line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok()
    };
    let (mut is_data, mut is_large, mut huge) = (false, false, 0);
    for line in smaps.lines() {
        if line.split(' ').nth(1).is_some_and(|rights| rights.len() == 4) {
            is_data = line.contains(" rw-");
        } else if let Some(size) = kib(line, "Size:") {
            is_large = size >= mib << 10;
        } else if let Some(kib) = kib(line, "AnonHugePages:") {
            huge += if is_data && is_large { kib << 10 } else { 0 };
        }
    }
    Ok(huge)
}

/// A process that somebody else started, held by a descriptor: its id can't come
/// to mean another process.
pub struct Pidfd {
    pid: u32,
    fd: OwnedFd,
}

impl Pidfd {
    /// Takes hold of a living process.
    ///
    /// # Errors
    /// When there is none of that id.
    pub fn open(pid: u32) -> Result<Pidfd> {
        // SAFETY: pidfd_open takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(format!("pidfd_open {pid}: {}", io::Error::last_os_error()).into());
        }
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        Ok(Pidfd { pid, fd: unsafe { OwnedFd::from_raw_fd(fd as i32) } })
    }

    /// Kills the process and waits until it is gone.
    ///
    /// # Errors
    /// When it may not be killed, or lives on.
    pub fn kill(&self) -> Result<()> {
        let (fd, info) = (self.fd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: the descriptor is open, and a null info is allowed.
        let done =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, info, 0) };
        let error = io::Error::last_os_error();
        if done != 0 && error.raw_os_error() != Some(libc::ESRCH) {
            return Err(format!("killing process {}: {error}", self.pid).into());
        }
        wait_until(SOON, "a killed process to end", || process_gone(self.pid))
    }
}
