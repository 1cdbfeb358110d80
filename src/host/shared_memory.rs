//! Memory that lives as long as any process holds its descriptor (memfd_create(2)).

use std::ffi::CStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Seals without which a mapping could lose its memory (SIGBUS, memfd_create(2)).
const SEALS: SealFlag = SealFlag::F_SEAL_GROW.union(SealFlag::F_SEAL_SHRINK);

/// An empty file in memory. `name` shows in /proc/PID/fd. It can't become a program, which somebody
/// who holds it in a sandbox could write and run.
///
/// # Errors
/// When the kernel has no memory or no descriptor left.
pub fn file(name: &CStr) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags)?);
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// A file of `len` bytes in memory, as [`file`] makes it, that keeps its length.
///
/// # Errors
/// When the kernel has no memory or no descriptor left.
pub fn sealed_file(name: &CStr, len: u64) -> io::Result<File> {
    let file = file(name)?;
    file.set_len(len)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SEALS))?;
    Ok(file)
}

/// Memory of a fixed size behind a descriptor, mapped. It begins as zeros, and takes no room
/// where it was never written.
#[derive(Debug)]
pub struct SharedMemory {
    file: File,
    map: MmapRaw,
}

impl SharedMemory {
    /// Makes `len` bytes, at least one. `name` shows in /proc/PID/fd.
    ///
    /// # Errors
    /// When the kernel has no memory or no descriptor left.
    pub fn create(name: &CStr, len: u64) -> io::Result<SharedMemory> {
        SharedMemory::map(sealed_file(name, len)?)
    }

    /// Maps the memory behind a descriptor that [`SharedMemory::create`] made.
    ///
    /// # Errors
    /// When it is another kind of file: one that could shrink.
    pub fn open(fd: OwnedFd) -> io::Result<SharedMemory> {
        let seals = fcntl(&fd, FcntlArg::F_GET_SEALS)?;
        if !SealFlag::from_bits_truncate(seals).contains(SEALS) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "memory that is not sealed"));
        }
        SharedMemory::map(File::from(fd))
    }

    fn map(file: File) -> io::Result<SharedMemory> {
        let map = MmapOptions::new().map_raw(&file)?;
        Ok(SharedMemory { file, map })
    }

    /// All of it as words; a last part of one is left out.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is readable, writable and at least this long, begins at a page and
        // so is aligned, and lives as long as `self`; its file is sealed and can't shrink. Any
        // bytes are a valid word, and other processes change them by atomics only.
        unsafe {
            std::slice::from_raw_parts(
                self.map.as_ptr().cast::<AtomicU64>(),
                self.map.len() / size_of::<AtomicU64>(),
            )
        }
    }

    /// Writes bytes; nobody may use these as words.
    ///
    /// # Errors
    /// When they don't fit.
    pub fn write(&self, bytes: &[u8], position: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, position)
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// When there are not that many.
    pub fn read(&self, bytes: &mut [u8], position: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, position)
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn memory_is_shared_and_keeps_its_size_and_is_no_program() {
        let one = SharedMemory::create(c"test", 8192).unwrap();
        assert_eq!(one.file.metadata().unwrap().permissions().mode() & 0o111, 0);
        let fd = one.as_fd().try_clone_to_owned().unwrap();
        let other = SharedMemory::open(fd).unwrap();
        assert_eq!((one.words().len(), other.words().len()), (1024, 1024));
        one.words()[7].store(7, Ordering::Release);
        assert_eq!(other.words()[7].load(Ordering::Acquire), 7);
        assert!(one.file.set_len(4096).is_err() && one.file.set_len(1 << 20).is_err());
        assert!(one.write(&[1], 8192).is_err());
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(SharedMemory::open(file.into()).is_err());
    }
}
