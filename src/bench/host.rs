//! Facts of the operating system about a process and the machine.

use std::fs;
use std::io;
use std::time::Duration;

use memmap2::MmapMut;
use nix::time::ClockId;
use nix::unistd::Pid;
use serde::Serialize;

use crate::page::PAGE_SIZE;

/// The machine on which runs were measured.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// The processor's name, from /proc/cpuinfo.
    pub cpu: String,
    /// Processors that this program may use.
    pub cpus: usize,
    /// The kernel's name and release.
    pub kernel: String,
    /// Memory, in bytes.
    pub ram_bytes: u64,
    /// This program's version, and whether it was built without optimization.
    pub snapback: String,
}

impl Host {
    /// The machine that this program runs on. What can't be found out is called
    /// `unknown`, or is 0.
    pub(super) fn here() -> Host {
        let field = |file: &str, name: &str| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
        };
        let unknown = || "unknown".to_owned();
        let kib = field("/proc/meminfo", "MemTotal").unwrap_or_default();
        let kib = kib.trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0);
        let kernel = nix::sys::utsname::uname().map_or_else(
            |_| unknown(),
            |names| {
                let (name, release) = (names.sysname(), names.release());
                format!("{} {}", name.to_string_lossy(), release.to_string_lossy())
            },
        );
        let build = if cfg!(debug_assertions) { " (not optimized)" } else { "" };
        Host {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            kernel,
            ram_bytes: kib << 10,
            snapback: format!("{}{build}", env!("CARGO_PKG_VERSION")),
        }
    }
}

/// Takes so many bytes of memory and gives them back, as far as free memory reaches.
///
/// On a virtual machine whose hypervisor takes free memory away, a run would otherwise
/// wait for it to come back, or not, depending on what was freed just before.
pub(super) fn touch_memory(bytes: u64) -> io::Result<()> {
    const LEAVE: u64 = 256 << 20;
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    let free = kib.unwrap_or(0) << 10;
    let bytes = bytes.min(free.saturating_sub(LEAVE));
    if bytes > 0 {
        let mut memory = MmapMut::map_anon(bytes as usize)?;
        memory.iter_mut().step_by(PAGE_SIZE).for_each(|byte| *byte = 1);
    }
    Ok(())
}

/// The CPU time that all threads of a process have used
/// (clock_getcpuclockid(3)).
pub(super) fn cpu_time_of(pid: i32) -> io::Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid))?;
    Ok(Duration::from(clock.now()?))
}

/// The CPU time that all threads of this process have used.
pub(super) fn own_cpu_time() -> io::Result<Duration> {
    Ok(Duration::from(ClockId::CLOCK_PROCESS_CPUTIME_ID.now()?))
}

/// A process's resident memory in bytes (`/proc/PID/statm`, proc_pid_statm(5)). Memory
/// on hugetlbfs is not counted.
pub(super) fn resident_bytes(pid: i32) -> io::Result<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm"))?;
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    let page_size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
    Ok(pages.ok_or(io::ErrorKind::InvalidData)? * page_size as u64)
}
