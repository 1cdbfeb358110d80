//! The record of a running QEMU, from /proc (proc(5)) and its control socket.

use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::guest::GuestError;
use crate::guest::command_line::CommandLine;
use crate::host::procfs;
use crate::machine::{Hotplug, Machine};
use crate::qmp::Qmp;

/// Records the machine that process `pid` runs and `qmp` talks to. Its disks are
/// for the caller to add.
///
/// # Errors
/// [`GuestError::NotQemu`] when `pid` is a proxy or manager in front of QEMU,
/// [`GuestError::ReadProcess`] when the process has exited or belongs to another
/// user, [`GuestError::Qmp`] when QEMU does not answer.
pub async fn capture(pid: i32, qmp: &Qmp) -> Result<Machine, GuestError> {
    let process = ProcessInfo { pid };
    let argv = process.argv()?;
    let environ = process.environ()?;
    let cwd = process.cwd(&argv, &environ)?;
    let binary = process.binary(&argv, &cwd)?;
    Ok(Machine {
        binary,
        qemu: qmp.version().clone(),
        machine_type: qmp.machine_type().await?,
        argv,
        cwd,
        env: environ.into_iter().filter(|(name, _)| is_recorded(name)).collect(),
        running: qmp.status().await? == "running",
        uncaptured_disks: Vec::new(),
        disks: Vec::new(),
        libvirt_xml: None,
        libvirt_inactive_xml: None,
        hotplug: Hotplug::default(),
    })
}

/// Whether an environment variable changes how QEMU finds its parts.
pub(super) fn is_recorded(name: &str) -> bool {
    name.starts_with("QEMU_") || name == "LD_LIBRARY_PATH"
}

/// Whether a program's file name is that of a QEMU system emulator, as upstream
/// and the distributions name it (wrappers put a dot before or words behind).
pub(super) fn is_system_emulator(name: &str) -> bool {
    name.contains("qemu-system-") || name.contains("qemu-kvm") || name == "kvm"
}

/// One process, seen through /proc.
struct ProcessInfo {
    pid: i32,
}

impl ProcessInfo {
    fn path(&self, entry: &str) -> PathBuf {
        procfs::path(self.pid, entry)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> GuestError {
        let pid = self.pid;
        move |source| GuestError::ReadProcess { pid, what, source }
    }

    fn utf8(&self, what: &'static str, bytes: Vec<u8>) -> Result<String, GuestError> {
        String::from_utf8(bytes).map_err(|error| GuestError::NotUtf8 {
            pid: self.pid,
            what,
            text: String::from_utf8_lossy(error.as_bytes()).into_owned(),
        })
    }

    /// The command line; a process without one (a kernel thread) is not QEMU.
    fn argv(&self) -> Result<Vec<String>, GuestError> {
        let what = "the command line";
        let bytes = fs::read(self.path("cmdline")).map_err(self.failed(what))?;
        let Some(bytes) = bytes.strip_suffix(b"\0") else {
            return Err(GuestError::NotQemu { pid: self.pid, exe: "no command line".to_owned() });
        };
        bytes.split(|&byte| byte == 0).map(|arg| self.utf8(what, arg.to_vec())).collect()
    }

    /// The environment; what is not UTF-8 in it is none of ours.
    fn environ(&self) -> Result<Vec<(String, String)>, GuestError> {
        let bytes = fs::read(self.path("environ")).map_err(self.failed("the environment"))?;
        let variable = |entry: &[u8]| {
            let (name, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        };
        Ok(bytes.split(|&byte| byte == 0).filter_map(variable).collect())
    }

    /// The directory that relative paths started from. A QEMU that went to the
    /// background has left it for `/` since (QEMU's `os_setup_post`); the shell's
    /// `PWD` still has it then.
    fn cwd(&self, argv: &[String], environ: &[(String, String)]) -> Result<String, GuestError> {
        let what = "the working directory";
        let cwd = fs::read_link(self.path("cwd")).map_err(self.failed(what))?;
        let daemonized =
            CommandLine::parse(argv.iter().skip(1).map(String::as_str)).has("daemonize");
        if daemonized && cwd == Path::new("/") {
            let pwd = environ.iter().find(|(name, _)| name == "PWD").map(|(_, value)| value);
            if let Some(pwd) = pwd.filter(|pwd| Path::new(pwd).is_absolute()) {
                return Ok(pwd.clone());
            }
        }
        self.utf8(what, cwd.into_os_string().into_vec())
    }

    /// The program's absolute path. An upgrade deletes the running program's
    /// file, often with a new one in its place.
    fn binary(&self, argv: &[String], cwd: &str) -> Result<String, GuestError> {
        let what = "the executable";
        let link = fs::read_link(self.path("exe")).map_err(self.failed(what))?;
        let bytes = link.as_os_str().as_bytes();
        let exe = match bytes.strip_suffix(b" (deleted)") {
            Some(path) if !link.exists() => self.utf8(what, path.to_vec())?,
            _ => self.utf8(what, bytes.to_vec())?,
        };
        let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
        let program = argv.first().map(String::as_str).unwrap_or_default();
        if !is_system_emulator(&name(&exe)) && !is_system_emulator(&name(program)) {
            return Err(GuestError::NotQemu { pid: self.pid, exe });
        }
        if Path::new(&exe).is_file() {
            return Ok(exe);
        }
        // `argv[0]` with a slash is a path; without one PATH found it, which by
        // now may find anything.
        let named = Path::new(cwd).join(program);
        match named.to_str() {
            Some(path) if program.contains('/') && named.is_file() => Ok(path.to_owned()),
            _ => Ok(exe),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_emulators() {
        for name in ["qemu-system-x86_64", ".qemu-system-x86_64-wrapped", "qemu-kvm", "kvm"] {
            assert!(is_system_emulator(name), "{name}");
        }
        for name in ["libvirtd", "virtqemud", "qemu-storage-daemon", "qemu-ga", "socat"] {
            assert!(!is_system_emulator(name), "{name}");
        }
    }

    #[test]
    fn of_the_environment_only_qemus_own_is_kept() {
        assert!(is_recorded("QEMU_MODULE_DIR") && is_recorded("LD_LIBRARY_PATH"));
        assert!(!is_recorded("AWS_SECRET_ACCESS_KEY") && !is_recorded("PWD"));
    }

    #[test]
    fn another_process_is_not_taken_for_qemu() {
        let us = ProcessInfo { pid: std::process::id() as i32 };
        let argv = us.argv().unwrap();
        assert!(matches!(us.binary(&argv, "/"), Err(GuestError::NotQemu { .. })));
        let gone = ProcessInfo { pid: i32::MAX };
        assert!(matches!(gone.argv(), Err(GuestError::ReadProcess { .. })));
    }
}
