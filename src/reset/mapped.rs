//! Memory that QEMU maps privately from a flat image.
//!
//! The kernel tracks its writes already: a page that was written is QEMU's own, and no part of the
//! file any more. What belongs there is in the file. A page can't be given back to the file from
//! outside (process_madvise(2) drops no memory of another process), so that those that were written
//! once stay QEMU's own: they are written back, and compared each time.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::ResetError;
use crate::host::procfs::{AddressSpace, Mapping, ProcessMemory};
use crate::identity::Identity;
use crate::image::Image;
use crate::page::PAGE_SIZE;

/// Bytes that are compared at once: 1 MiB.
const STEP: usize = 1 << 20;

/// Bytes from which on two threads are faster than one: 4 MiB.
const ENOUGH_FOR_TWO: u64 = 4 << 20;

/// Memory that QEMU maps privately from a flat image.
pub(crate) struct MappedMemory {
    image: Arc<Image>,
    parts: Vec<Part>,
    space: Arc<AddressSpace>,
    memory: ProcessMemory,
}

/// A block that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    address: u64,
    /// Where it begins in the file.
    offset: u64,
    len: u64,
}

impl MappedMemory {
    /// The memory of the guest of a flat image, of which QEMU maps the blocks of these names.
    ///
    /// # Errors
    /// [`ResetError::Obstacle`] where it is not found what is mapped.
    pub fn find(
        image: Arc<Image>,
        names: &[String],
        space: Arc<AddressSpace>,
        memory: ProcessMemory,
    ) -> Result<MappedMemory, ResetError> {
        let failed = |source| ResetError::Memory { what: "looked at", address: 0, source };
        let mappings = space.mappings().map_err(failed)?;
        let own = image.path().and_then(|path| std::path::absolute(path).ok());
        let of_image: Vec<&Mapping> = mappings
            .iter()
            .filter(|mapping| mapping.path.is_some() && mapping.path == own)
            .filter(|mapping| mapping.writable && !mapping.shared)
            .collect();
        let manifest = image.manifest();
        let blocks = manifest.blocks.iter().zip(&manifest.flat);
        let mut parts = Vec::new();
        for (block, offset) in blocks.filter(|(block, _)| names.contains(&block.name)) {
            let address = address_of(&of_image, *offset, block.len).ok_or_else(|| {
                ResetError::Obstacle(format!(
                    "it was not found where QEMU maps the memory of block `{}`",
                    block.name
                ))
            })?;
            parts.push(Part { address, offset: *offset, len: block.len });
        }
        match parts.len() == names.len() {
            true => Ok(MappedMemory { image, parts, space, memory }),
            false => Err(ResetError::Obstacle("QEMU maps what is not in the image".into())),
        }
    }

    /// Which image it is.
    pub fn image(&self) -> Identity {
        self.image.identity()
    }

    /// Has all of it be what it was at the moment of the image. Returns how many pages had been
    /// written. It blocks; the guest must stand still.
    ///
    /// # Errors
    /// When memory can't be read or written. Some of it is then what it was, and some is not.
    pub fn restore(&self) -> Result<u64, ResetError> {
        let mut steps = Vec::new();
        for part in &self.parts {
            for range in self.own_pages(part)? {
                let step = |start: u64| (*part, start..range.end.min(start + STEP as u64));
                steps.extend(range.clone().step_by(STEP).map(step));
            }
        }
        let bytes: u64 = steps.iter().map(|(_, range)| range.end - range.start).sum();
        if bytes < ENOUGH_FOR_TWO {
            return self.restore_all(&steps);
        }
        let (first, second) = steps.split_at(steps.len() / 2);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| self.restore_all(second));
            let first = self.restore_all(first);
            let second = second.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(first? + second?)
        })
    }

    fn restore_all(&self, steps: &[(Part, Range<u64>)]) -> Result<u64, ResetError> {
        let gone = || ResetError::Obstacle("the image is no file".into());
        let (_, file) = self.image.files().next().ok_or_else(gone)?;
        let mut buffers = [vec![0; STEP], vec![0; STEP]];
        let restore = |(part, range): &(Part, Range<u64>)| {
            self.restore_range(file, part, range, &mut buffers)
        };
        steps.iter().map(restore).sum()
    }

    /// How many pages are QEMU's own: those that were written at any time.
    pub fn own(&self) -> u64 {
        let pages = |range: Range<u64>| (range.end - range.start) / PAGE_SIZE as u64;
        let of = |part: &Part| self.own_pages(part).unwrap_or_default().into_iter().map(pages);
        self.parts.iter().flat_map(of).sum()
    }

    /// The pages of a block that are no part of the file any more.
    fn own_pages(&self, part: &Part) -> Result<Vec<Range<u64>>, ResetError> {
        let mut found = Vec::new();
        let (address, range) = (part.address, part.address..part.address + part.len);
        let pages = self.space.pagemap().private(range, |range| found.push(range));
        pages.map_err(|source| ResetError::Memory { what: "looked at", address, source })?;
        Ok(found)
    }

    fn restore_range(
        &self,
        file: &File,
        part: &Part,
        range: &Range<u64>,
        [now, old]: &mut [Vec<u8>; 2],
    ) -> Result<u64, ResetError> {
        let len = (range.end - range.start) as usize;
        let (now, old) = (&mut now[..len], &mut old[..len]);
        let failed = |what, address| move |source| ResetError::Memory { what, address, source };
        self.memory.read(range.start, now).map_err(failed("read", range.start))?;
        let place = part.offset + (range.start - part.address);
        file.read_exact_at(old, place).map_err(ResetError::Flat)?;
        let pages = now.chunks_exact(PAGE_SIZE).zip(old.chunks_exact(PAGE_SIZE));
        let differ: Vec<bool> = pages.map(|(now, old)| now != old).collect();
        let mut at = 0;
        for run in differ.chunk_by(|one, next| one == next) {
            let bytes = at * PAGE_SIZE..(at + run.len()) * PAGE_SIZE;
            if run[0] {
                let address = range.start + bytes.start as u64;
                // SAFETY: the range lies within a mapping of the guest's memory, which `find` has
                // seen QEMU make of this image, and QEMU keeps its RAMBlocks where they are: what
                // stands there is the guest's alone.
                let wrote = unsafe { self.memory.write(address, &old[bytes]) };
                wrote.map_err(failed("written", address))?;
            }
            at += run.len();
        }
        Ok(differ.iter().filter(|differs| **differs).count() as u64)
    }
}

/// Where a range of a file is mapped as a whole, be it by several mappings one behind the other. None
/// where it is not, or more than once.
fn address_of(mappings: &[&Mapping], offset: u64, len: u64) -> Option<u64> {
    let begins =
        |mapping: &&&Mapping| (mapping.offset..mapping.offset + mapping.size()).contains(&offset);
    let mut found = mappings.iter().filter(begins);
    let (first, None) = (found.next()?, found.next()) else { return None };
    let address = first.start + (offset - first.offset);
    let mut end = first.end;
    while end < address + len {
        let next = mappings.iter().find(|mapping| mapping.start == end)?;
        if next.offset != offset + (end - address) {
            return None;
        }
        end = next.end;
    }
    Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64, offset: u64) -> Mapping {
        Mapping {
            start,
            end,
            readable: true,
            writable: true,
            executable: false,
            shared: false,
            offset,
            device: (0, 0),
            inode: 1,
            path: None,
            page_size: None,
            flags: Vec::new(),
        }
    }

    #[test]
    fn a_range_of_a_file_is_found_where_it_is_mapped_once_and_as_a_whole() {
        let all = [mapping(0x1000, 0x3000, 0x8000), mapping(0x3000, 0x5000, 0xa000)];
        let [one, two] = &all;
        assert_eq!(address_of(&[one, two], 0x8000, 0x4000), Some(0x1000));
        assert_eq!(address_of(&[one, two], 0x9000, 0x1000), Some(0x2000));
        assert_eq!(address_of(&[one, two], 0x8000, 0x5000), None);
        assert_eq!(address_of(&[one], 0x8000, 0x4000), None);
        let again = mapping(0x9000, 0xb000, 0x8000);
        assert_eq!(address_of(&[one, two, &again], 0x8000, 0x2000), None);
        let elsewhere = mapping(0x3000, 0x5000, 0xb000);
        assert_eq!(address_of(&[one, &elsewhere], 0x8000, 0x4000), None);
    }
}
