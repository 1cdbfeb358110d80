//! Where an image's bytes go: into its file, one behind the other, no faster than is
//! allowed, and without pushing other files out of the host's page cache.
//!
//! What is written lies in the page cache, where the next revert finds it, and where it
//! costs others nothing as long as there is memory that nobody uses. When that gets
//! scarce, what has been written is taken out of the cache again, some way behind the
//! last write, so that the disk may still lag by so much before anybody waits for it.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::uio::pwritev;

use crate::cancel::Cancellation;
use crate::image::write::options::CacheUse;

/// Bytes after which the kernel is told to begin writing them out, and asked how much
/// memory is free.
const WINDOW: u64 = 16 << 20;

/// Bytes that stay in the page cache behind the last write when memory is scarce: a
/// disk that lags by less is not waited for.
const LAG: u64 = 256 << 20;

/// The share of memory that is to stay free, as a divisor: below, memory is scarce. The
/// kernel begins to take pages back at a far smaller share, but writes out ever more slowly
/// before, and what reclaims memory ahead (DAMON) begins sooner: measured, a sixteenth cost
/// others 40 % of what they had in the cache, and the save a third of its rate.
const FREE_SHARE: u64 = 2;

/// How long a wait for the rate goes on without looking whether it is still wanted.
const NAP: Duration = Duration::from_millis(50);

/// A file that is written from one end to the other.
pub(in crate::image) struct Sink {
    file: File,
    /// Where the next byte goes.
    at: u64,
    cache: CacheUse,
    /// Up to where the kernel has been told to write.
    begun: u64,
    /// Up to where the file has been taken out of the page cache.
    dropped: u64,
    pace: Option<Pace>,
    /// Whoever has this written wants no more of it.
    cancel: Cancellation,
}

/// Bytes a second.
struct Pace {
    rate: u64,
    /// When the next byte may be written.
    due: Instant,
}

impl Sink {
    /// Writes to `file` from `at` on, `rate` bytes a second at most. `cancel` ends waiting
    /// for that.
    pub fn new(
        file: File,
        at: u64,
        rate: Option<u64>,
        cache: CacheUse,
        cancel: Cancellation,
    ) -> Sink {
        let pace = rate.map(|rate| Pace { rate: rate.max(1), due: Instant::now() });
        Sink { file, at, cache, begun: at, dropped: at, pace, cancel }
    }

    /// Where the next byte goes, in bytes from the start of the file.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Goes on at a later place.
    pub fn skip_to(&mut self, at: u64) {
        self.at = at;
    }

    /// How many bytes to write in one go, where `most` would be best: less at a low
    /// rate, so that it is kept evenly.
    pub fn piece(&self, most: usize) -> usize {
        match &self.pace {
            Some(pace) => most.min((pace.rate / 16) as usize),
            None => most,
        }
    }

    /// Writes all the slices, one behind the other.
    ///
    /// # Errors
    /// What the system says, or that nobody wants them any more.
    pub fn write_slices(&mut self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.wait_for_turn();
        if self.cancel.is_requested() {
            return Err(io::Error::other("it was stopped"));
        }
        let start = self.at;
        while !slices.is_empty() {
            match pwritev(&self.file, slices, self.at as i64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.at += written as u64;
                    IoSlice::advance_slices(&mut slices, written);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if let Some(pace) = &mut self.pace {
            let nanos = u128::from(self.at - start) * 1_000_000_000 / u128::from(pace.rate);
            // What was not used is not saved up.
            pace.due = pace.due.max(Instant::now() - NAP)
                + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
        if self.at - self.begun >= WINDOW {
            self.keep_the_cache_clear()?;
        }
        Ok(())
    }

    fn wait_for_turn(&self) {
        let Some(pace) = &self.pace else { return };
        while !self.cancel.is_requested() {
            let left = pace.due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }

    /// Has the kernel write what is there, and takes out of the cache what has been
    /// written, if that is wanted.
    fn keep_the_cache_clear(&mut self) -> io::Result<()> {
        if self.cache == CacheUse::Keep {
            return Ok(());
        }
        sync(&self.file, self.begun, self.at, libc::SYNC_FILE_RANGE_WRITE)?;
        self.begun = self.at;
        self.drop_up_to(self.at.saturating_sub(LAG))
    }

    fn drop_up_to(&mut self, end: u64) -> io::Result<()> {
        if end <= self.dropped || !self.is_scarce() {
            return Ok(());
        }
        let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        sync(&self.file, self.dropped, end, all)?;
        // From the start of the file: a page that was only written in part when its
        // neighbours were dropped goes now. Advice that is not taken does no harm.
        let _ = posix_fadvise(&self.file, 0, end as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        self.dropped = end;
        Ok(())
    }

    fn is_scarce(&self) -> bool {
        match self.cache {
            CacheUse::Keep => false,
            CacheUse::Drop => true,
            CacheUse::WhatIsFree => memory_is_scarce().unwrap_or(false),
        }
    }

    /// Ends writing.
    pub fn finish(mut self) -> io::Result<()> {
        self.drop_up_to(self.at)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.piece(bytes.len()).max(1).min(bytes.len());
        self.write_slices(&mut [IoSlice::new(&bytes[..len])])?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has a part of a file written out, as sync_file_range(2) does.
///
/// # Errors
/// That writing failed. The kernel tells it once per open file, so it must not be lost
/// here: fsync(2) would not say it again. A system or a file that the call is not for is no
/// error.
fn sync(file: &File, start: u64, end: u64, flags: u32) -> io::Result<()> {
    let (start, len) = (start as i64, (end - start) as i64);
    // SAFETY: the descriptor is open as long as the borrow; the call takes no pointer.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, flags) };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::ESPIPE | libc::ENOSYS | libc::EOPNOTSUPP) => Ok(()),
        _ => Err(error),
    }
}

/// Whether little memory is unused (`MemFree` in proc_meminfo(5)). Nothing where that
/// can't be read.
fn memory_is_scarce() -> Option<bool> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    Some(kib("MemFree:")? < kib("MemTotal:")? / FREE_SHARE)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn only_what_the_call_is_not_for_is_no_error() {
        let sync = |file: &File| sync(file, 0, 4096, libc::SYNC_FILE_RANGE_WRITE);
        sync(&tempfile::tempfile().unwrap()).unwrap();
        let (_, pipe) = io::pipe().unwrap();
        sync(&OwnedFd::from(pipe).into()).unwrap();
        // Of what can go wrong, the one that can be had without a broken disk.
        let unopened = File::options().read(true).custom_flags(libc::O_PATH).open("/").unwrap();
        assert_eq!(sync(&unopened).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn this_system_tells_of_its_memory() {
        assert!(memory_is_scarce().is_some());
    }

    #[test]
    fn a_wait_for_the_rate_ends_when_nobody_wants_it() {
        let cancel = Cancellation::new();
        let file = tempfile::tempfile().unwrap();
        let mut sink = Sink::new(file, 0, Some(1), CacheUse::Keep, cancel.clone());
        let bytes = [1; 1 << 20];
        sink.write_slices(&mut [IoSlice::new(&bytes)]).unwrap();
        // It would take twelve days.
        cancel.request();
        assert!(sink.write_slices(&mut [IoSlice::new(&bytes)]).is_err());
        assert_eq!((sink.at(), sink.piece(1 << 20)), (1 << 20, 0));
    }
}
