//! Where a machine's blocks lie in the guest's physical memory.
//!
//! An image records blocks, not addresses. Those of main memory follow from its size
//! and the machine type. On PCs (QEMU's `pc_init1` and `pc_q35_init`) memory begins at 0
//! and leaves a hole for PCI below 4 GiB, behind which the rest goes on; on ARM's `virt`
//! (`base_memmap` in hw/arm/virt.c) it begins at 1 GiB and is in one piece.

use std::collections::HashSet;

use super::{Board, CommandLine, Params};
use crate::machine::Machine;
use crate::page::{Block, BlockId, Run};

const GIB: u64 = 1 << 30;
/// Where memory goes on behind the hole.
const ABOVE: u64 = 4 * GIB;
/// QEMU's `MAX_NODES`: as many blocks main memory may consist of.
const MAX_NODES: usize = 128;

/// A part of a block, and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The block.
    pub block: BlockId,
    /// Offset in the block in bytes.
    pub offset: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Range {
    /// The pages of `run` that lie here.
    pub fn overlap(&self, run: Run) -> Option<Run> {
        let (first, end) = (self.offset >> 12, (self.offset + self.len) >> 12);
        let (first, end) = (first.max(run.first), end.min(run.end()));
        (self.block == run.block && first < end).then(|| Run { first, count: end - first, ..run })
    }
}

/// Main memory's ranges in ascending order of address, and those of a PC's firmware.
///
/// # Errors
/// Says what is unknown: the machine type or its main memory is none of those known here.
pub fn ranges(machine: &Machine, blocks: &[Block]) -> Result<Vec<Range>, String> {
    let line = CommandLine::parse(machine.argv.iter().skip(1).map(String::as_str));
    let find = |name: &str| {
        // Machine types before 4.0 name blocks by their whole path.
        let named = |block: &Block| {
            let before = block.name.strip_suffix(name);
            before.is_some_and(|path| path.is_empty() || path.ends_with('/'))
        };
        blocks.iter().position(named).map(|index| BlockId(index as u16))
    };
    let Some(board) = Board::of(&machine.machine_type) else {
        let problem = "only `pc`, `q35` and ARM's `virt` have a layout that is known here";
        return Err(problem.into());
    };
    let backends = backends(&line, board);
    // QEMU starts with neither. So what follows is bounded, and no block lies in two places.
    if backends.len() > MAX_NODES {
        return Err(format!("it has more than {MAX_NODES} NUMA nodes"));
    }
    if backends.iter().collect::<HashSet<_>>().len() < backends.len() {
        return Err("two of its NUMA nodes have the same memory".into());
    }
    let main: Vec<BlockId> = backends.iter().filter_map(|name| find(name)).collect();
    if main.is_empty() {
        let names = backends.join("`, `");
        return Err(format!("its main memory is no block of a known name (`{names}`)"));
    }
    let size: u64 = main.iter().map(|id| blocks[id.index()].len).sum();
    // Up to where memory lies in one piece, and where it goes on.
    let (start, low) = match board {
        Board::Q35 if size < 0xb000_0000 => (0, 0xb000_0000),
        Board::Q35 => (0, 2 * GIB),
        Board::I440fx if size < 0xe000_0000 => (0, 0xe000_0000),
        Board::I440fx => (0, 3 * GIB),
        Board::ArmVirt => (GIB, u64::MAX),
    };
    let low = max_below(&line).map_or(low, |most| low.min(most));

    let (mut ranges, mut done) = (Vec::new(), 0);
    for block in main {
        let mut offset = 0;
        let whole = blocks[block.index()].len;
        while offset < whole {
            let left = whole - offset;
            let (address, len) = match low.checked_sub(done) {
                Some(room @ 1..) => (start + done, left.min(room)),
                _ => (ABOVE + (done - low), left),
            };
            ranges.push(Range { block, offset, address, len });
            (offset, done) = (offset + len, done + len);
        }
    }
    if let Some(bios) = find("pc.bios").filter(|bios| blocks[bios.index()].len <= GIB) {
        let len = blocks[bios.index()].len;
        ranges.push(Range { block: bios, offset: 0, address: ABOVE - len, len });
    }
    ranges.sort_by_key(|range| range.address);
    Ok(ranges)
}

/// The guest-physical address of a block's byte at `offset`; nothing where that is not known.
pub fn address(machine: &Machine, blocks: &[Block], block: BlockId, offset: u64) -> Option<u64> {
    let ranges = ranges(machine, blocks).ok()?;
    let at = |range: &Range| Some(range.address + offset.checked_sub(range.offset)?);
    let holds = |range: &&Range| {
        range.block == block && (range.offset..range.offset + range.len).contains(&offset)
    };
    ranges.iter().find(holds).and_then(at)
}

/// Names of the blocks that are main memory, in the order in which they are laid out.
fn backends(line: &CommandLine, board: Board) -> Vec<String> {
    let given = |options: &[&str], key: &str| -> Vec<String> {
        let options = line.options().filter(|option| options.contains(&option.name()));
        options
            .filter_map(|option| Params::parse(option.value()).get(key).map(str::to_owned))
            .collect()
    };
    let nodes = given(&["numa"], "memdev");
    if !nodes.is_empty() {
        return nodes;
    }
    let named = given(&["machine", "M"], "memory-backend");
    vec![named.last().cloned().unwrap_or_else(|| board.main_memory().into())]
}

/// What `-machine max-ram-below-4g=` says, in bytes.
fn max_below(line: &CommandLine) -> Option<u64> {
    let options = line.options().filter(|option| ["machine", "M"].contains(&option.name()));
    let value = |params: Params| params.get("max-ram-below-4g").map(str::to_owned);
    let text = options.filter_map(|option| value(Params::parse(option.value()))).last()?;
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].chars().next() {
        None | Some('b' | 'B') => 0,
        Some('k' | 'K') => 10,
        Some('m' | 'M') => 20,
        Some('g' | 'G') => 30,
        Some(_) => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|most| *most > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(machine_type: &str, args: &[&str], blocks: &[(&str, u64)]) -> Vec<(u64, u64, u64)> {
        let argv = [&["qemu"], args].concat().iter().map(|arg| arg.to_string()).collect();
        let machine = Machine { machine_type: machine_type.into(), argv, ..Machine::default() };
        let block = |(name, len): &(&str, u64)| Block {
            name: name.to_string(),
            len: *len,
            page_size: 4096,
        };
        let blocks: Vec<_> = blocks.iter().map(block).collect();
        let ranges = ranges(&machine, &blocks).unwrap();
        ranges.iter().map(|range| (range.address, range.offset, range.len)).collect()
    }

    #[test]
    fn memory_goes_on_behind_the_hole() {
        let (pc, q35) = ("pc-i440fx-7.2", "pc-q35-10.0");
        assert_eq!(layout(pc, &[], &[("pc.ram", GIB)]), [(0, 0, GIB)]);
        let two = [(0, 0, 2 * GIB), (ABOVE, 2 * GIB, 2 * GIB)];
        assert_eq!(layout(q35, &[], &[("pc.ram", 4 * GIB)]), two);
        let three = [(0, 0, 3 * GIB), (ABOVE, 3 * GIB, GIB)];
        assert_eq!(layout(pc, &[], &[("pc.ram", 4 * GIB)]), three);
        let capped = ["-machine", "pc,max-ram-below-4g=2G"];
        let two = [(0, 0, 2 * GIB), (ABOVE, 2 * GIB, GIB)];
        assert_eq!(layout(pc, &capped, &[("pc.ram", 3 * GIB)]), two);
    }

    #[test]
    fn backends_follow_one_another_and_firmware_ends_at_4_gib() {
        let args = ["-numa", "node,memdev=a", "-numa", "node,memdev=b"];
        let blocks = [("b", 3 * GIB), ("/objects/a", GIB), ("pc.bios", 1 << 18)];
        let expected = [
            (0, 0, GIB),
            (GIB, 0, 2 * GIB),
            (ABOVE - (1 << 18), 0, 1 << 18),
            (ABOVE, 2 * GIB, GIB),
        ];
        assert_eq!(layout("pc-i440fx-7.2", &args, &blocks), expected);
    }

    #[test]
    fn arms_memory_is_in_one_piece() {
        let flash = ("virt.flash0", 64 << 20);
        let expected = [(GIB, 0, 8 * GIB)];
        assert_eq!(layout("virt-7.2", &[], &[flash, ("mach-virt.ram", 8 * GIB)]), expected);
        let args = ["-numa", "node,memdev=a", "-numa", "node,memdev=b"];
        let expected = [(GIB, 0, 3 * GIB), (4 * GIB, 0, GIB)];
        assert_eq!(layout("virt-10.0", &args, &[("b", GIB), ("a", 3 * GIB)]), expected);
    }

    #[test]
    fn what_is_unknown_is_said() {
        let machine = |name: &str| Machine { machine_type: name.into(), ..Machine::default() };
        let ram = Block { name: "pc.ram".into(), len: GIB, page_size: 4096 };
        let error = ranges(&machine("microvm"), &[ram]).unwrap_err();
        assert!(error.contains("`q35`"), "{error}");
        let error = ranges(&machine("pc-q35-7.2"), &[]).unwrap_err();
        assert!(error.contains("`pc.ram`"), "{error}");
        let error = ranges(&machine("virt-7.2"), &[]).unwrap_err();
        assert!(error.contains("`mach-virt.ram`"), "{error}");
        let nodes = |count: usize, name: fn(usize) -> String| {
            let node = |number| ["-numa".to_owned(), format!("node,memdev={}", name(number))];
            let argv = ["qemu".to_owned()].into_iter().chain((0..count).flat_map(node)).collect();
            let block = |number| Block { name: name(number), len: 4096, page_size: 4096 };
            let blocks: Vec<_> = (0..count).map(block).collect();
            let machine = Machine { argv, ..machine("pc-q35-7.2") };
            ranges(&machine, &blocks).map(|ranges| ranges.len())
        };
        assert_eq!(nodes(MAX_NODES, |number| format!("m{number}")), Ok(MAX_NODES));
        let error = nodes(50_000, |number| format!("m{number}")).unwrap_err();
        assert!(error.contains("more than 128"), "{error}");
        let error = nodes(2, |_| "m".into()).unwrap_err();
        assert!(error.contains("the same memory"), "{error}");
    }
}
