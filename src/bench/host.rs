//! Facts of the operating system about a process and the machine.

use std::io;
use std::time::Duration;

use memmap2::MmapMut;
use nix::time::ClockId;
use nix::unistd::Pid;
use schemars::JsonSchema;
use serde::Serialize;

use crate::host::procfs::{MemInfo, cpu_model};
use crate::page::PAGE_SIZE;

/// The machine on which runs were measured.
#[derive(Debug, Clone, Serialize, JsonSchema)]
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
        let unknown = || "unknown".to_owned();
        let kernel = nix::sys::utsname::uname().map_or_else(
            |_| unknown(),
            |names| {
                let (name, release) = (names.sysname(), names.release());
                format!("{} {}", name.to_string_lossy(), release.to_string_lossy())
            },
        );
        let build = if cfg!(debug_assertions) { " (not optimized)" } else { "" };
        Host {
            cpu: cpu_model().unwrap_or_else(unknown),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            kernel,
            ram_bytes: MemInfo::read().map_or(0, |memory| memory.total),
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
    let free = MemInfo::read()?.free;
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
