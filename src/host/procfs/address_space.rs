//! A process's memory as /proc shows it, held open.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use super::mappings::{Mapping, parse};
use super::pagemap::Pagemap;

/// The mappings and the page map of a process. Opening them takes the right to trace it
/// (ptrace(2)), reading them does not: whoever is passed the descriptors can look as well.
#[derive(Debug)]
pub struct AddressSpace {
    mappings: File,
    pagemap: Pagemap,
}

impl AddressSpace {
    /// Opens those of a process.
    ///
    /// # Errors
    /// When the process has ended or may not be traced.
    pub fn open(pid: i32) -> io::Result<AddressSpace> {
        let mappings = File::open(super::path(pid, "smaps"))?;
        Ok(AddressSpace { mappings, pagemap: Pagemap::open(pid)? })
    }

    /// Those that another process has opened, [`AddressSpace::descriptors`].
    pub fn of(mappings: OwnedFd, page_map: OwnedFd) -> AddressSpace {
        AddressSpace { mappings: mappings.into(), pagemap: Pagemap::of(page_map) }
    }

    /// The descriptors of the mappings and of the page map.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.mappings.as_fd(), self.pagemap.as_fd()]
    }

    /// The mappings in detail, as they are now.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn mappings(&self) -> io::Result<Vec<Mapping>> {
        let (mut text, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        loop {
            match self.mappings.read_at(&mut piece, text.len() as u64)? {
                0 => return Ok(parse(&text)),
                count => text.extend_from_slice(&piece[..count]),
            }
        }
    }

    /// Whether the process has ended: it has no memory then.
    pub fn has_ended(&self) -> bool {
        self.mappings.read_at(&mut [0], 0).map_or(true, |count| count == 0)
    }

    /// Those that are registered with a userfaultfd for missing pages.
    ///
    /// # Errors
    /// As for [`AddressSpace::mappings`].
    pub fn registered(&self) -> io::Result<Vec<Mapping>> {
        let mut mappings = self.mappings()?;
        mappings.retain(Mapping::is_registered);
        Ok(mappings)
    }

    /// The page map.
    pub fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_open_shows_memory_as_it_is_now() {
        let space = AddressSpace::open(std::process::id() as i32).unwrap();
        let map = memmap2::MmapMut::map_anon(4096).unwrap();
        let address = map.as_ptr() as u64;
        let holds = |mapping: &Mapping| mapping.range().contains(&address);
        let [mappings, page_map] = space.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
        let other = AddressSpace::of(mappings, page_map);
        for space in [&space, &other] {
            let found = space.mappings().unwrap();
            assert!(found.iter().any(|mapping| holds(mapping) && mapping.page_size == Some(4096)));
            assert!(!space.pagemap().is_present(address));
        }
    }
}
