//! What a server's successor has to know, in shared memory.
//!
//! ```text
//! words 0..16        the fields below
//! then               one word per block: its address in QEMU, or 0
//! then               the map of claims (`memory::ClaimMap`)
//! then               the details: text that never changes
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::host::procfs;
use crate::host::shared_memory::SharedMemory;
use crate::memory::claim::{self, Words};

/// "SNAPKEE" and the version.
const MAGIC: u64 = u64::from_be_bytes(*b"SNAPKEE1");

/// Bytes of details at most: the manifest of a snapshot of a repository is part of them.
const MOST_DETAILS: u64 = 128 << 20;

mod field {
    pub const MAGIC: usize = 0;
    pub const BLOCKS: usize = 1;
    pub const CLAIM_WORDS: usize = 2;
    pub const DETAILS_BYTES: usize = 3;
    pub const RUNNING: usize = 4;
    pub const DIRECT: usize = 5;
    pub const RESTARTS: usize = 6;
    pub const DIED_AT: usize = 7;
    pub const TORN: usize = 8;
    pub const LAST_BLOCK: usize = 9;
    pub const HALTED: usize = 10;
    pub const QEMU: usize = 11;
    pub const RESIDENT: usize = 12;
    pub const COUNT: usize = 16;
}

/// What a ledger says of how far its session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Pages of 4096 bytes that are in place.
    pub present: u64,
    /// Requests for pages so far.
    pub requests: u64,
    /// How many servers have followed the first.
    pub restarts: u64,
}

/// The ledger of one session. Clones share it.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<SharedMemory>);

impl Ledger {
    /// What a descriptor of one refers to, in /proc/PID/fd, begins with this.
    const LINK: &str = "/memfd:snapback-ledger";

    /// The ledgers that a process has open: it is a server or a keeper. None where it can't be
    /// looked into.
    pub fn of_process(pid: i32) -> impl Iterator<Item = File> {
        let is_ledger = move |fd: &i32| {
            let link = procfs::descriptor_link(pid, *fd);
            link.is_ok_and(|link| link.to_string_lossy().starts_with(Ledger::LINK))
        };
        let descriptors = procfs::descriptors(pid).unwrap_or_default();
        let ledgers = descriptors.into_iter().filter(is_ledger);
        ledgers.filter_map(move |fd| File::open(procfs::path(pid, &format!("fd/{fd}"))).ok())
    }

    /// What tells it from all other ledgers that there are: the number of its inode.
    pub fn mark(ledger: impl AsFd) -> io::Result<u64> {
        Ok(nix::sys::stat::fstat(ledger)?.st_ino)
    }

    /// Reads how far a session is, which may be another process's, from its ledger's file.
    ///
    /// # Errors
    /// When it is no ledger, or can't be read.
    pub fn figures(file: &File) -> io::Result<Figures> {
        let word = |index: u64| {
            let mut bytes = [0; size_of::<u64>()];
            let position =
                index.checked_mul(bytes.len() as u64).ok_or(io::ErrorKind::InvalidData)?;
            file.read_exact_at(&mut bytes, position)?;
            io::Result::Ok(u64::from_ne_bytes(bytes))
        };
        if word(field::MAGIC as u64)? != MAGIC {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let claims = (field::COUNT as u64).saturating_add(word(field::BLOCKS as u64)?);
        Ok(Figures {
            present: word(claims.saturating_add(claim::PRESENT as u64))?,
            requests: word(claims.saturating_add(claim::REQUESTS as u64))?,
            restarts: word(field::RESTARTS as u64)?,
        })
    }

    /// A new ledger for a machine of so many blocks, with room for a map of claims.
    ///
    /// # Errors
    /// When the kernel gives no memory.
    pub fn create(blocks: usize, claim_words: usize, details: &[u8]) -> io::Result<Ledger> {
        let words = field::COUNT + blocks + claim_words;
        let len = (words * size_of::<u64>() + details.len()) as u64;
        let ledger = Ledger(Arc::new(SharedMemory::create(c"snapback-ledger", len)?));
        ledger.0.write(details, (words * size_of::<u64>()) as u64)?;
        ledger.set(field::BLOCKS, blocks as u64);
        ledger.set(field::CLAIM_WORDS, claim_words as u64);
        ledger.set(field::DETAILS_BYTES, details.len() as u64);
        ledger.set(field::MAGIC, MAGIC);
        Ok(ledger)
    }

    /// Opens one that another process has made.
    ///
    /// # Errors
    /// When the descriptor is not one of a ledger.
    pub fn open(fd: OwnedFd) -> io::Result<Ledger> {
        let ledger = Ledger(Arc::new(SharedMemory::open(fd)?));
        let words = ledger.0.words();
        let field = |field: usize| words.get(field).map_or(0, |word| word.load(Ordering::Acquire));
        let needed = (field::COUNT as u64)
            .checked_add(field(field::BLOCKS))
            .and_then(|sum| sum.checked_add(field(field::CLAIM_WORDS)));
        let fits = needed.is_some_and(|needed| needed <= words.len() as u64);
        match field(field::MAGIC) == MAGIC && fits && field(field::DETAILS_BYTES) <= MOST_DETAILS {
            true => Ok(ledger),
            false => Err(io::Error::new(io::ErrorKind::InvalidData, "no ledger of this version")),
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.0.words()[index]
    }

    fn get(&self, field: usize) -> u64 {
        self.word(field).load(Ordering::Acquire)
    }

    fn set(&self, field: usize, value: u64) {
        self.word(field).store(value, Ordering::Release);
    }

    /// The details that it was made with.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn details(&self) -> io::Result<Vec<u8>> {
        let words = field::COUNT as u64 + self.get(field::BLOCKS) + self.get(field::CLAIM_WORDS);
        let mut details = vec![0; self.get(field::DETAILS_BYTES) as usize];
        self.0.read(&mut details, words * size_of::<u64>() as u64)?;
        Ok(details)
    }

    /// The words of the map of claims.
    pub fn claim_words(&self) -> Box<dyn Words> {
        let first = field::COUNT + self.get(field::BLOCKS) as usize;
        let count = self.get(field::CLAIM_WORDS) as usize;
        Box::new(ClaimWords { memory: Arc::clone(&self.0), first, count })
    }

    /// Notes QEMU's process id.
    pub fn set_qemu(&self, pid: i32) {
        self.set(field::QEMU, pid as u64);
    }

    /// QEMU's process id, where it was noted.
    pub fn qemu(&self) -> Option<i32> {
        i32::try_from(self.get(field::QEMU)).ok().filter(|pid| *pid > 0)
    }

    /// Notes that the guest runs: from now on a successor can go on.
    pub fn set_running(&self) {
        self.set(field::RUNNING, 1);
    }

    /// Whether the guest runs.
    pub fn is_running(&self) -> bool {
        self.get(field::RUNNING) != 0
    }

    /// Notes that all memory is in place, and QEMU has ended the migration: a successor is needed for
    /// disks alone.
    pub fn set_resident(&self) {
        self.set(field::RESIDENT, 1);
    }

    /// Whether all memory is in place, and QEMU has ended the migration.
    pub fn is_resident(&self) -> bool {
        self.get(field::RESIDENT) != 0
    }

    /// Notes where the blocks lie in QEMU's memory, as far as that is proven, and that pages
    /// go there directly.
    pub fn set_direct(&self, addresses: &[Option<u64>]) {
        for (index, address) in addresses.iter().enumerate().take(self.get(field::BLOCKS) as usize)
        {
            self.set(field::COUNT + index, address.unwrap_or(0));
        }
        self.set(field::DIRECT, 1);
    }

    /// The blocks' addresses, where pages go directly.
    pub fn direct(&self) -> Option<Vec<Option<u64>>> {
        let address = |index| Some(self.get(field::COUNT + index)).filter(|address| *address != 0);
        let blocks = self.get(field::BLOCKS) as usize;
        (self.get(field::DIRECT) != 0).then(|| (0..blocks).map(address).collect())
    }

    /// Notes that a section is being written, or has been, that the kernel may take in parts.
    pub fn set_torn(&self, torn: bool) {
        self.set(field::TORN, u64::from(torn));
    }

    /// Whether the stream may end inside a section.
    pub fn is_torn(&self) -> bool {
        self.get(field::TORN) != 0
    }

    /// Notes that QEMU has been told to stop the guest, which waits for memory that can't be read.
    pub fn set_halted(&self, halted: bool) {
        self.set(field::HALTED, u64::from(halted));
    }

    /// Whether QEMU has been told to stop the guest, and not to run it again.
    pub fn is_halted(&self) -> bool {
        self.get(field::HALTED) != 0
    }

    /// Notes the block of the last request on the return path: the next may not name its own.
    pub fn set_last_block(&self, index: usize) {
        self.set(field::LAST_BLOCK, index as u64 + 1);
    }

    /// The block of the last request on the return path.
    pub fn last_block(&self) -> Option<usize> {
        self.get(field::LAST_BLOCK).checked_sub(1).map(|index| index as usize)
    }

    /// Counts one more server, whose predecessor died at `now` (CLOCK_MONOTONIC, in
    /// nanoseconds).
    pub(super) fn count_restart(&self, now: u64) {
        self.word(field::RESTARTS).fetch_add(1, Ordering::AcqRel);
        self.set(field::DIED_AT, now);
    }

    /// How many servers have followed the first.
    pub fn restarts(&self) -> u64 {
        self.get(field::RESTARTS)
    }

    /// How many milliseconds ago the last server died.
    pub fn died_ms_ago(&self) -> f64 {
        monotonic_ns().saturating_sub(self.get(field::DIED_AT)) as f64 / 1e6
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

struct ClaimWords {
    memory: Arc<SharedMemory>,
    first: usize,
    count: usize,
}

impl Words for ClaimWords {
    fn words(&self) -> &[AtomicU64] {
        &self.memory.words()[self.first..self.first + self.count]
    }
}

/// The time by CLOCK_MONOTONIC in nanoseconds, the same in all processes.
pub(super) fn monotonic_ns() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from);
    now.map_or(0, |now| now.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_reads_what_was_noted() {
        let ledger = Ledger::create(2, 10, b"details").unwrap();
        ledger.set_running();
        ledger.set_direct(&[None, Some(0x7000)]);
        ledger.set_last_block(1);
        ledger.set_qemu(4711);
        ledger.claim_words().words()[9].store(9, Ordering::Release);
        ledger.count_restart(monotonic_ns());
        let other = Ledger::open(ledger.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert!(other.is_running() && !other.is_torn());
        assert_eq!(other.direct(), Some(vec![None, Some(0x7000)]));
        assert_eq!((other.last_block(), other.restarts()), (Some(1), 1));
        assert_eq!(other.qemu(), Some(4711));
        assert_eq!(other.claim_words().words()[9].load(Ordering::Acquire), 9);
        assert_eq!(other.details().unwrap(), b"details");
        assert!(other.died_ms_ago() < 60e3);
        ledger.claim_words().words()[claim::PRESENT].store(5, Ordering::Release);
        ledger.claim_words().words()[claim::REQUESTS].store(3, Ordering::Release);
        let file = File::from(ledger.as_fd().try_clone_to_owned().unwrap());
        let figures = Figures { present: 5, requests: 3, restarts: 1 };
        assert_eq!(Ledger::figures(&file).unwrap(), figures);
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert!(link.to_string_lossy().starts_with(Ledger::LINK));
    }

    #[test]
    fn other_memory_is_refused() {
        let memory = SharedMemory::create(c"test", 4096).unwrap();
        assert!(Ledger::open(memory.as_fd().try_clone_to_owned().unwrap()).is_err());
        memory.words()[field::MAGIC].store(MAGIC, Ordering::Release);
        memory.words()[field::BLOCKS].store(u64::MAX, Ordering::Release);
        assert!(Ledger::open(memory.as_fd().try_clone_to_owned().unwrap()).is_err());
        assert!(Ledger::figures(&memory.as_fd().try_clone_to_owned().unwrap().into()).is_err());
    }
}
