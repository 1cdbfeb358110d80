//! A process's memory, held open: /proc/PID/mem (proc_pid_mem(5)).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The memory of a process. Opening it takes the right to trace the process (ptrace(2)); reading
/// and writing it does not, so that a process can give up that right and go on.
#[derive(Debug)]
pub struct ProcessMemory(File);

impl ProcessMemory {
    /// Opens the memory of a process, for as long as that lives.
    ///
    /// # Errors
    /// When the process has ended or may not be traced.
    pub fn open(pid: i32) -> io::Result<ProcessMemory> {
        let file = File::options().read(true).write(true).open(super::path(pid, "mem"))?;
        Ok(ProcessMemory(file))
    }

    /// Reads memory.
    ///
    /// # Errors
    /// When the process has ended, and EIO where some of it is not mapped, or is missing and
    /// served by a userfaultfd: nobody is waited for.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, address)
    }

    /// Writes memory.
    ///
    /// # Safety
    /// The range must be memory of which the process expects that somebody else writes to it,
    /// such as that of a guest: anything else in the process may be corrupted.
    ///
    /// # Errors
    /// As for [`ProcessMemory::read`], and EIO where some of it is write-protected by a userfaultfd.
    /// What stands before that may have been written.
    pub unsafe fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_and_written_from_outside() {
        let mut map = memmap2::MmapMut::map_anon(8192).unwrap();
        map[4096] = 7;
        let memory = ProcessMemory::open(std::process::id() as i32).unwrap();
        let address = map.as_ptr() as u64 + 4096;
        let mut byte = [0];
        memory.read(address, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        // SAFETY: the range is a mapping of this test's, which nothing else uses.
        unsafe { memory.write(address, &[8]) }.unwrap();
        memory.read(address, &mut byte).unwrap();
        assert_eq!((byte, map[4096]), ([8], 8));
        assert!(memory.read(0, &mut byte).is_err());
    }
}
