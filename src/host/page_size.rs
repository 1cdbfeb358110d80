//! The size of the host's pages.

use nix::unistd::{SysconfVar, sysconf};

use crate::kind::{Details, ErrorKind};
use crate::page::PAGE_SIZE;

/// The host's pages have a size that nothing here is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this host's pages have {} KiB: guests are saved and reverted on hosts with pages of {} KiB \
     only; on ARM, start a kernel with those (CONFIG_ARM64_4K_PAGES)",
    .0 >> 10, PAGE_SIZE >> 10
)]
pub struct PageSizeError(pub u64);

impl PageSizeError {
    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::HostUnsupported
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<std::path::PathBuf>, None)
    }
}

/// Whether the host's pages have the size in which images hold memory: those of a process
/// are protected, installed and counted one by one.
///
/// # Errors
/// When they have another, which is told in words.
pub fn check_page_size() -> Result<(), PageSizeError> {
    // _SC_PAGESIZE is always known (sysconf(3)).
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or_default();
    check(size as u64)
}

fn check(size: u64) -> Result<(), PageSizeError> {
    match size == PAGE_SIZE as u64 {
        true => Ok(()),
        false => Err(PageSizeError(size)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_pages_are_refused_in_words() {
        assert_eq!(check(4096), Ok(()));
        let error = check(64 << 10).unwrap_err().to_string();
        assert!(error.contains("have 64 KiB") && error.contains("of 4 KiB"), "{error}");
        assert!(check(16 << 10).is_err());
    }
}
