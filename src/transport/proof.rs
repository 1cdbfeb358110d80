//! Shares the userfaultfd of a QEMU in postcopy, and finds out where its RAMBlocks lie.
//!
//! QEMU keeps one userfaultfd while it listens for a postcopy migration. A copy of it
//! (pidfd_getfd(2)) installs pages as well as QEMU itself does, without the socket's
//! copies and round trip. Which of QEMU's mappings holds which block is nowhere told,
//! so an address is a guess until it has been *proven*: a page that is nowhere present
//! is sent by the socket, and the mapping in which it then appears, at the right
//! offset and with the right content, is the block's.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::host::uffd::Uffd;
use crate::page::{Block, PAGE_SIZE};

/// Why pages can't be installed directly. They go by the socket then.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// QEMU's process is not known.
    #[error("QEMU's process can't be seen from here")]
    Unseen,
    /// Something of QEMU's process can't be used.
    #[error(
        "{what} of process {pid} can't be used ({source}): it takes root, or the same user \
             and the right to trace it (ptrace(2))"
    )]
    Process {
        /// QEMU's process id.
        pid: i32,
        /// What of it.
        what: &'static str,
        /// What the system said.
        source: io::Error,
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

/// A mapping that may hold guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Size of its pages in bytes.
    page_size: u64,
}

/// A QEMU whose memory we may touch.
pub struct Adopted {
    pid: i32,
    /// A copy of its userfaultfd.
    pub uffd: Uffd,
    mappings: Vec<Mapping>,
    pagemap: File,
}

/// A page of a block that is going to be sent by the socket, and where it may appear.
pub struct Probe {
    /// The page's offset in its block, in bytes.
    offset: u64,
    content: Box<[u8; PAGE_SIZE]>,
    /// First addresses that the block may have: nothing is present there at `offset`.
    candidates: Vec<u64>,
}

impl Adopted {
    /// Copies QEMU's userfaultfd and lists the mappings in which these blocks may lie.
    /// QEMU must have answered the PING behind LISTEN.
    pub fn adopt(pid: i32, blocks: &[Block]) -> Result<Adopted, AdoptError> {
        let failed = |what| move |source| AdoptError::Process { pid, what, source };
        let mut uffds = Uffd::all_of(pid).map_err(failed("the userfaultfd"))?;
        let (count, last) = (uffds.len(), uffds.pop());
        let Some(uffd) = last.filter(|_| count == 1) else {
            return Err(AdoptError::Count { pid, count });
        };
        let list = |name: &str| {
            let list = fs::read_to_string(format!("/proc/{pid}/{name}"));
            list.map_err(failed("the list of mappings"))
        };
        // Only smaps tells the sizes of pages, but it takes the kernel several times as long
        // to write: milliseconds, in which the guest runs already.
        let mappings = match blocks.iter().all(|block| block.page_size == PAGE_SIZE as u64) {
            true => writable(&list("maps")?),
            false => registered_mappings(&list("smaps")?),
        };
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(failed("the page map"))?;
        Ok(Adopted { pid, uffd, mappings, pagemap })
    }

    /// Prepares to prove a block's address by the page at `offset`, which nobody has
    /// installed yet. Nothing when no mapping can be the block's.
    pub fn probe(&self, block: &Block, offset: u64, content: &[u8; PAGE_SIZE]) -> Option<Probe> {
        let mut candidates = Vec::new();
        for mapping in &self.mappings {
            let Some(spare) = (mapping.end - mapping.start).checked_sub(block.len) else {
                continue;
            };
            // Mappings of neighbouring blocks may have merged into one.
            for start in [mapping.start, mapping.start + spare] {
                let fits = mapping.page_size == block.page_size && start % block.page_size == 0;
                if fits && !candidates.contains(&start) && !self.is_present(start + offset) {
                    candidates.push(start);
                }
            }
        }
        (!candidates.is_empty()).then(|| Probe { offset, content: Box::new(*content), candidates })
    }

    /// Notes the addresses that probes prove, each with its block's index. Two blocks that
    /// seem to lie in one place are a proof gone wrong: neither is believed.
    pub fn prove_all(
        &self,
        blocks: &[Block],
        probes: &[(usize, Probe)],
        addresses: &mut [Option<u64>],
    ) {
        // Zeros may appear in the heap at the same moment. What is no RAMBlock is not
        // registered, which costs too much time to ask of every block.
        let mut registered = None;
        let mut is_registered = |start: &u64| {
            let mappings = registered.get_or_insert_with(|| {
                let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.pid));
                registered_mappings(&smaps.unwrap_or_default())
            });
            mappings.iter().any(|mapping| (mapping.start..mapping.end).contains(start))
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
            self.is_present(address) && self.reads(address, &probe.content)
        };
        probe.candidates.iter().copied().filter(arrived).collect()
    }

    /// Whether QEMU has memory at this address. Asking touches nothing, unlike reading,
    /// which would wait for a page that is missing (proc_pid_pagemap(5)).
    fn is_present(&self, address: u64) -> bool {
        const PRESENT_OR_SWAPPED: u64 = 3 << 62;
        let mut entry = [0; 8];
        let at = address / PAGE_SIZE as u64 * 8;
        self.pagemap.read_exact_at(&mut entry, at).is_ok()
            && u64::from_ne_bytes(entry) & PRESENT_OR_SWAPPED != 0
    }

    fn reads(&self, address: u64, expected: &[u8; PAGE_SIZE]) -> bool {
        let mut found = [0; PAGE_SIZE];
        let remote = [RemoteIoVec { base: address as usize, len: PAGE_SIZE }];
        let local = &mut [io::IoSliceMut::new(&mut found)];
        process_vm_readv(Pid::from_raw(self.pid), local, &remote) == Ok(PAGE_SIZE)
            && found == *expected
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

/// The mappings in the text of /proc/PID/maps that can be written to but not executed
/// (proc_pid_maps(5)), as if all had pages of the usual size.
fn writable(maps: &str) -> Vec<Mapping> {
    let mapping = |line: &str| {
        let (start, end) = address_range(line)?;
        let perms = line.split_whitespace().nth(1)?;
        perms.starts_with("rw-").then_some(Mapping { start, end, page_size: PAGE_SIZE as u64 })
    };
    maps.lines().filter_map(mapping).collect()
}

/// The mappings in the text of /proc/PID/smaps whose VmFlags say `um`: registered with
/// userfaultfd for missing pages (proc_pid_smaps(5)).
fn registered_mappings(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        if let Some((start, end)) = address_range(line) {
            current = Some(Mapping { start, end, page_size: PAGE_SIZE as u64 });
        } else if let Some(mapping) = &mut current {
            if let Some(size) = line.strip_prefix("KernelPageSize:") {
                let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok());
                mapping.page_size = kib.unwrap_or(4) << 10;
            } else if let Some(flags) = line.strip_prefix("VmFlags:")
                && flags.split_whitespace().any(|flag| flag == "um")
            {
                found.push(*mapping);
            }
        }
    }
    found
}

/// The range at the beginning of a mapping's first line, `START-END perms …`.
fn address_range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registered_mappings_are_found_in_smaps() {
        let smaps = "\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \n\
Size:             524288 kB\nKernelPageSize:        4 kB\n\
VmFlags: rd wr mr mw me ac um \n\
7f0030000000-7f0030200000 rw-s 00000000 00:0f 77 /anon_hugepage (deleted)\n\
KernelPageSize:     2048 kB\nVmFlags: rd wr sh um ht\n\
7f0040000000-7f0040001000 r--p 00000000 08:01 5 /lib/vmlinum\n\
KernelPageSize:        4 kB\nVmFlags: rd mr mw me sd\n";
        let expected = [
            Mapping { start: 0x7f00_0000_0000, end: 0x7f00_2000_0000, page_size: 4096 },
            Mapping { start: 0x7f00_3000_0000, end: 0x7f00_3020_0000, page_size: 2 << 20 },
        ];
        assert_eq!(registered_mappings(smaps), expected);
        assert_eq!(registered_mappings("nonsense\nVmFlags: um"), []);
    }

    #[test]
    fn writable_mappings_are_found_in_maps() {
        let maps = "\
55d0c0000000-55d0c0a00000 r-xp 00001000 08:01 5    /usr/bin/qemu-system-x86_64\n\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \n\
7f0030000000-7f0040000000 rwxp 00000000 00:00 0 \n\
7f0050000000-7f0050200000 rw-s 00000000 00:01 77   /memfd:ram (deleted)\n\
nonsense rw-p\n";
        let starts: Vec<_> = writable(maps).iter().map(|mapping| mapping.start).collect();
        assert_eq!(starts, [0x7f00_0000_0000, 0x7f00_5000_0000]);
    }

    #[test]
    fn two_blocks_in_one_place_are_not_believed() {
        let block = |len| Block { name: "b".into(), len, page_size: 4096 };
        let blocks = [block(0x4000), block(0x4000), block(0x1000)];
        assert_eq!(overlapping(&blocks, &[Some(0x1000), Some(0x5000), None]), [0usize; 0]);
        assert_eq!(overlapping(&blocks, &[Some(0x1000), Some(0x9000), Some(0x4000)]), [0, 2]);
    }

    const PAGE: u64 = PAGE_SIZE as u64;

    /// This process, as if it were a QEMU with some blocks of four pages.
    fn ourselves(blocks: usize) -> (Adopted, Vec<memmap2::MmapMut>, Vec<Block>) {
        let uffd = Uffd::create(0).unwrap();
        let map = || memmap2::MmapMut::map_anon(4 * PAGE_SIZE).unwrap();
        let maps: Vec<_> = std::iter::repeat_with(map).take(blocks).collect();
        let mapping = |map: &memmap2::MmapMut| {
            let start = map.as_ptr() as u64;
            // SAFETY: a mapping of ours that nobody reads before it is filled.
            unsafe { uffd.register(start, 4 * PAGE) }.unwrap();
            Mapping { start, end: start + 4 * PAGE, page_size: PAGE }
        };
        let mappings = maps.iter().map(mapping).collect();
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let pid = std::process::id() as i32;
        let block = Block { name: "b".into(), len: 4 * PAGE, page_size: PAGE };
        (Adopted { pid, uffd, mappings, pagemap }, maps, vec![block; blocks])
    }

    fn install(adopted: &Adopted, block: usize, offset: u64, content: &[u8; PAGE_SIZE]) {
        let at = adopted.mappings[block].start + offset;
        // SAFETY: memory of ours.
        unsafe { adopted.uffd.copy(at, content, PAGE) }.unwrap();
    }

    #[test]
    fn blocks_that_look_alike_are_proven_one_by_one() {
        let (adopted, _maps, blocks) = ourselves(3);
        for (offset, content) in [(2 * PAGE, [7; PAGE_SIZE]), (0, [0; PAGE_SIZE])] {
            let probe = |index: usize, offset| {
                (index, adopted.probe(&blocks[index], offset, &content).unwrap())
            };
            let mut found = vec![None; 3];
            let probes: Vec<_> = (0..3).map(|index| probe(index, offset)).collect();
            (0..3).for_each(|index| install(&adopted, index, offset, &content));
            adopted.prove_all(&blocks, &probes, &mut found);
            assert_eq!(found, [None; 3]);
            for index in 0..3 {
                let probe = probe(index, offset + PAGE);
                install(&adopted, index, offset + PAGE, &content);
                adopted.prove_all(&blocks, &[probe], &mut found);
            }
            let starts: Vec<_> = adopted.mappings.iter().map(|m| Some(m.start)).collect();
            assert_eq!(found, starts);
        }
    }

    #[test]
    fn what_arrives_with_another_content_or_nowhere_proves_nothing() {
        let (adopted, _maps, blocks) = ourselves(2);
        let mut found = vec![None; 2];
        let probe = |index: usize| (index, adopted.probe(&blocks[index], 0, &[7; PAGE_SIZE]));
        let probes = [0, 1].map(|index| (index, probe(index).1.unwrap()));
        install(&adopted, 0, 0, &[8; PAGE_SIZE]);
        adopted.prove_all(&blocks, &probes, &mut found);
        assert_eq!(found, [None, None]);
        // Where something is already, it can't be seen to arrive.
        install(&adopted, 1, 0, &[7; PAGE_SIZE]);
        assert!(probe(0).1.is_none());
    }

    #[test]
    fn a_process_without_userfaultfd_is_named() {
        // Not this process, in which other tests have some.
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = other.id() as i32;
        let error = Adopted::adopt(pid, &[]).err().map(|e| e.to_string());
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(error, Some(format!("process {pid} has 0 userfaultfds where one was expected")));
    }
}
