//! Shares the userfaultfd of a QEMU in postcopy, and finds out where its RAMBlocks lie.
//!
//! QEMU keeps one userfaultfd while it listens for a postcopy migration. A copy of it
//! (pidfd_getfd(2)) installs pages as well as QEMU itself does, without the socket's
//! copies and round trip. QEMU doesn't tell which of its mappings holds which block, so an
//! address is a guess until it has been *proven*: a page that is present in none of the
//! mappings is sent by the socket, and the mapping in which it then appears, at the right
//! offset and with the right content, is the block's.

use std::io;

use std::path::PathBuf;

use crate::host::memory;
use crate::host::procfs::{Mapping, Pagemap, ranges_of_len};
use crate::host::rights::{Lack, tracing_lack};
use crate::host::uffd::Uffd;
use crate::kind::{Details, ErrorKind};
use crate::page::{Block, PAGE_SIZE};

/// Why pages can't be installed directly. They go by the socket then.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// QEMU's process is not known.
    #[error("QEMU's process can't be seen from here")]
    Unseen,
    /// Something of QEMU's process can't be used.
    #[error(
        "{what} of process {pid} can't be used ({source}): it takes root, or the same user \
             and the right to trace it (ptrace(2)){}",
        .lack.as_ref().map(|lack| format!("; {lack}")).unwrap_or_default()
    )]
    Process {
        /// QEMU's process id.
        pid: i32,
        /// What of it.
        what: &'static str,
        /// What the system said.
        source: io::Error,
        /// The setting that may have forbidden it.
        lack: Option<Lack>,
    },
    /// QEMU has another number of userfaultfds than one.
    #[error("process {pid} has {count} userfaultfds where one was expected")]
    Count {
        /// QEMU's process id.
        pid: i32,
        /// How many it has.
        count: usize,
    },
}

impl AttachError {
    /// The error for what could not be had of process `pid`.
    pub(super) fn at(pid: i32, what: &'static str) -> impl FnOnce(io::Error) -> AttachError {
        move |source| {
            let forbidden = source.kind() == io::ErrorKind::PermissionDenied;
            let lack = forbidden.then(tracing_lack).flatten();
            AttachError::Process { pid, what, source, lack }
        }
    }

    /// What kind of error it is, for programs to act on.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::UserfaultfdUnavailable
    }

    /// What it is about.
    pub fn details(&self) -> Details {
        Details::new(&self.to_string(), None::<PathBuf>, None)
    }
}

/// A copy of the one userfaultfd that a QEMU in postcopy has.
///
/// # Errors
/// When QEMU may not be traced, or does not have just one.
pub(super) fn the_userfaultfd(pid: i32) -> Result<Uffd, AttachError> {
    let mut uffds = Uffd::all_of(pid).map_err(AttachError::at(pid, "the userfaultfd"))?;
    let (count, last) = (uffds.len(), uffds.pop());
    last.filter(|_| count == 1).ok_or(AttachError::Count { pid, count })
}

/// Finds the RAMBlocks of a QEMU in postcopy.
pub struct Locator {
    pid: i32,
    /// A copy of QEMU's userfaultfd.
    pub uffd: Uffd,
    /// The mappings that may hold guest memory.
    mappings: Vec<Mapping>,
    pagemap: Pagemap,
}

/// A page of a block that is going to be sent by the socket, and where it may appear.
pub struct Probe {
    /// The page's offset in its block, in bytes.
    offset: u64,
    content: Box<[u8; PAGE_SIZE]>,
    /// First addresses that the block may have: nothing is present there at `offset`.
    candidates: Vec<u64>,
}

impl Locator {
    /// Copies QEMU's userfaultfd and lists the mappings in which these blocks may lie.
    /// QEMU must have answered the PING behind LISTEN.
    ///
    /// # Errors
    /// When QEMU may not be traced, or does not have just one userfaultfd.
    pub fn attach(pid: i32, blocks: &[Block]) -> Result<Locator, AttachError> {
        let failed = |what| AttachError::at(pid, what);
        let uffd = the_userfaultfd(pid)?;
        // Only smaps tells the sizes of pages, but it takes the kernel several times as long
        // to write: milliseconds, in which the guest runs already.
        let mappings = match blocks.iter().all(|block| block.page_size == PAGE_SIZE as u64) {
            true => Mapping::all_of(pid).map(writable),
            false => Mapping::registered_of(pid),
        };
        let mappings = mappings.map_err(failed("the list of mappings"))?;
        let pagemap = Pagemap::open(pid).map_err(failed("the page map"))?;
        Ok(Locator { pid, uffd, mappings, pagemap })
    }

    /// Prepares to prove a block's address by the page at `offset`, which nobody has
    /// installed yet. Nothing when no mapping can be the block's.
    pub fn probe(&self, block: &Block, offset: u64, content: &[u8; PAGE_SIZE]) -> Option<Probe> {
        let candidates: Vec<u64> = ranges_of_len(&self.mappings, block.len)
            .into_iter()
            .map(|range| range.start)
            .filter(|start| start.is_multiple_of(block.page_size))
            .filter(|start| self.page_size_at(*start) == block.page_size)
            .filter(|start| !self.pagemap.is_present(start + offset))
            .collect();
        (!candidates.is_empty()).then(|| Probe { offset, content: Box::new(*content), candidates })
    }

    /// Size of the pages at an address, in bytes.
    fn page_size_at(&self, address: u64) -> u64 {
        let mapping = self.mappings.iter().find(|mapping| mapping.range().contains(&address));
        // Where only maps was read, all pages are taken to be of the usual size.
        mapping.and_then(|mapping| mapping.page_size).unwrap_or(PAGE_SIZE as u64)
    }

    /// Notes the addresses that probes prove, each with its block's index. Probes that place
    /// two blocks at overlapping addresses prove neither.
    pub fn locate(
        &self,
        blocks: &[Block],
        probes: &[(usize, Probe)],
        addresses: &mut [Option<u64>],
    ) {
        // Zeros may appear in the heap at the same moment. What is no RAMBlock is not
        // registered, which costs too much time to ask of every block.
        let mut guest_memory = None;
        let mut is_registered = |start: &u64| {
            let mappings = guest_memory
                .get_or_insert_with(|| Mapping::registered_of(self.pid).unwrap_or_default());
            mappings.iter().any(|mapping| mapping.range().contains(start))
        };
        for (index, probe) in probes {
            let mut found = self.arrivals(probe);
            if found.len() > 1 {
                found.retain(&mut is_registered);
            }
            addresses[*index] = found.pop().filter(|_| found.is_empty());
        }
        for doubtful in overlapping(blocks, addresses) {
            addresses[doubtful] = None;
        }
    }

    /// The candidates where a block's probe has arrived. QEMU must have taken it in.
    fn arrivals(&self, probe: &Probe) -> Vec<u64> {
        let arrived = |start: &u64| {
            let address = start + probe.offset;
            self.pagemap.is_present(address) && self.reads(address, &probe.content)
        };
        probe.candidates.iter().copied().filter(arrived).collect()
    }

    fn reads(&self, address: u64, expected: &[u8; PAGE_SIZE]) -> bool {
        let mut found = [0; PAGE_SIZE];
        memory::read(self.pid, address, &mut found).is_ok() && found == *expected
    }
}

/// The blocks whose ranges overlap another's.
fn overlapping(blocks: &[Block], addresses: &[Option<u64>]) -> Vec<usize> {
    let range = |index: usize| addresses[index].map(|start| start..start + blocks[index].len);
    let overlaps = |one: usize, other: usize| match (range(one), range(other)) {
        (Some(a), Some(b)) => one != other && a.start < b.end && b.start < a.end,
        _ => false,
    };
    let all = 0..blocks.len();
    all.clone().filter(|one| all.clone().any(|other| overlaps(*one, other))).collect()
}

/// The mappings that can be written to but not executed.
fn writable(mut mappings: Vec<Mapping>) -> Vec<Mapping> {
    mappings.retain(|mapping| mapping.readable && mapping.writable && !mapping.executable);
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_constants_are_no_guest_memory() {
        let us = std::process::id() as i32;
        let found = writable(Mapping::all_of(us).unwrap());
        let (heap, code) = (Box::new(1u8), overlapping as fn(&_, &_) -> _ as usize as u64);
        let holds = |address: u64| found.iter().any(|mapping| mapping.range().contains(&address));
        assert!(holds(&raw const *heap as u64) && !holds(code));
    }

    #[test]
    fn two_blocks_at_one_address_prove_neither() {
        let block = |len| Block { name: "b".into(), len, page_size: 4096 };
        let blocks = [block(0x4000), block(0x4000), block(0x1000)];
        assert_eq!(overlapping(&blocks, &[Some(0x1000), Some(0x5000), None]), [0usize; 0]);
        assert_eq!(overlapping(&blocks, &[Some(0x1000), Some(0x9000), Some(0x4000)]), [0, 2]);
    }

    const PAGE: u64 = PAGE_SIZE as u64;

    /// This process, as if it were a QEMU with some blocks of four pages.
    fn ourselves(blocks: usize) -> (Locator, Vec<memmap2::MmapMut>, Vec<Block>) {
        let pid = std::process::id() as i32;
        let uffd = Uffd::create().unwrap();
        let map = || memmap2::MmapMut::map_anon(4 * PAGE_SIZE).unwrap();
        let maps: Vec<_> = std::iter::repeat_with(map).take(blocks).collect();
        let mapping = |map: &memmap2::MmapMut| {
            let start = map.as_ptr() as u64;
            // SAFETY: a mapping of ours that nobody reads before it is filled.
            unsafe { uffd.register(start, 4 * PAGE) }.unwrap();
            Mapping {
                start,
                end: start + 4 * PAGE,
                readable: true,
                writable: true,
                executable: false,
                shared: false,
                offset: 0,
                device: (0, 0),
                inode: 0,
                path: None,
                page_size: Some(PAGE),
                flags: vec![*b"um"],
            }
        };
        let mappings = maps.iter().map(mapping).collect();
        let pagemap = Pagemap::open(pid).unwrap();
        let block = Block { name: "b".into(), len: 4 * PAGE, page_size: PAGE };
        (Locator { pid, uffd, mappings, pagemap }, maps, vec![block; blocks])
    }

    fn install(locator: &Locator, block: usize, offset: u64, content: &[u8; PAGE_SIZE]) {
        let at = locator.mappings[block].start + offset;
        // SAFETY: memory of ours.
        unsafe { locator.uffd.copy(at, content, PAGE) }.unwrap();
    }

    #[test]
    fn blocks_that_look_alike_are_proven_one_by_one() {
        let (locator, _maps, blocks) = ourselves(3);
        for (offset, content) in [(2 * PAGE, [7; PAGE_SIZE]), (0, [0; PAGE_SIZE])] {
            let probe = |index: usize, offset| {
                (index, locator.probe(&blocks[index], offset, &content).unwrap())
            };
            let mut found = vec![None; 3];
            let probes: Vec<_> = (0..3).map(|index| probe(index, offset)).collect();
            (0..3).for_each(|index| install(&locator, index, offset, &content));
            locator.locate(&blocks, &probes, &mut found);
            assert_eq!(found, [None; 3]);
            for index in 0..3 {
                let probe = probe(index, offset + PAGE);
                install(&locator, index, offset + PAGE, &content);
                locator.locate(&blocks, &[probe], &mut found);
            }
            let starts: Vec<_> = locator.mappings.iter().map(|m| Some(m.start)).collect();
            assert_eq!(found, starts);
        }
    }

    #[test]
    fn what_arrives_with_another_content_or_nowhere_proves_nothing() {
        let (locator, _maps, blocks) = ourselves(2);
        let mut found = vec![None; 2];
        let probe = |index: usize| (index, locator.probe(&blocks[index], 0, &[7; PAGE_SIZE]));
        let probes = [0, 1].map(|index| (index, probe(index).1.unwrap()));
        install(&locator, 0, 0, &[8; PAGE_SIZE]);
        locator.locate(&blocks, &probes, &mut found);
        assert_eq!(found, [None, None]);
        // Where something is already, it can't be seen to arrive.
        install(&locator, 1, 0, &[7; PAGE_SIZE]);
        assert!(probe(0).1.is_none());
    }

    #[test]
    fn a_process_without_userfaultfd_is_named() {
        // Not this process, in which other tests have some.
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = other.id() as i32;
        let error = Locator::attach(pid, &[]).err().map(|e| e.to_string());
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(error, Some(format!("process {pid} has 0 userfaultfds where one was expected")));
    }
}
