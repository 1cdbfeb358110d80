//! Files made warm or cold: in the kernel's page cache as a whole, or not at all.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use memmap2::Mmap;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use schemars::JsonSchema;
use serde::Serialize;

use super::BenchError;
use crate::page::PAGE_SIZE;

/// Whether the files that a run reads are in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// They have just been read.
    Warm,
    /// Their pages have just been dropped.
    Cold,
}

impl Cache {
    /// The name in tables and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Cache::Warm => "warm",
            Cache::Cold => "cold",
        }
    }

    /// Brings a file into this state.
    pub(super) fn prepare(self, path: &Path) -> Result<(), BenchError> {
        let failed = |doing| move |source| BenchError::File { doing, path: path.into(), source };
        match self {
            Cache::Warm => read_through(path).map_err(failed("read")),
            Cache::Cold => {
                drop_pages(path).map_err(failed("dropped from the page cache"))?;
                match cached_percent(path).map_err(failed("looked up in the page cache"))? {
                    // Tolerates a page or two that another process touches at this moment.
                    0 => Ok(()),
                    percent => Err(BenchError::NotCold { path: path.into(), percent }),
                }
            }
        }
    }
}

fn read_through(path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// posix_fadvise(2) drops only pages that are clean, hence the fsync(2).
fn drop_pages(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

/// The share of a file's pages that are in the page cache, in percent, rounded down.
fn cached_percent(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    // SAFETY: the mapping is never read; only its address is used, to ask about it.
    let map = unsafe { Mmap::map(&file)? };
    let pages = map.len().div_ceil(PAGE_SIZE);
    let mut states = vec![0u8; pages];
    // SAFETY: the range is that of a mapping which lives, at a page's start; the vector
    // has a byte for each page of 4096 bytes (mincore(2)), and no kernel has smaller ones.
    let done = unsafe { libc::mincore(map.as_ptr() as *mut _, map.len(), states.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let cached = states.iter().filter(|state| *state & 1 != 0).count();
    Ok(cached as u64 * 100 / pages.max(1) as u64)
}
