//! A process's mappings: /proc/PID/maps (proc_pid_maps(5)) and, with more of each,
//! /proc/PID/smaps (proc_pid_smaps(5)).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// A part of a process's address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address behind the last.
    pub end: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written to.
    pub writable: bool,
    /// Whether it can be executed.
    pub executable: bool,
    /// Whether changes are seen by others who map the same file.
    pub shared: bool,
    /// Where it begins in its file, in bytes.
    pub offset: u64,
    /// Its file's device, major and minor. On some file systems stat(2) tells another.
    pub device: (u32, u32),
    /// Its file's inode number; 0 without a file.
    pub inode: u64,
    /// Its file, or a name like `[heap]`. The file of a mapping may have been deleted, which
    /// the name then ends with.
    pub path: Option<PathBuf>,
    /// Size of its pages in bytes (`KernelPageSize`). Only smaps tells it.
    pub page_size: Option<u64>,
    /// Its flags (`VmFlags`), two letters each. Only smaps tells them.
    pub flags: Vec<[u8; 2]>,
}

impl Mapping {
    /// A process's mappings, in the order of their addresses.
    ///
    /// # Errors
    /// When the process has ended or may not be looked into.
    pub fn all_of(pid: i32) -> io::Result<Vec<Mapping>> {
        Ok(parse(&fs::read(super::path(pid, "maps"))?))
    }

    /// The same with sizes of pages and flags. It takes the kernel several times as long:
    /// milliseconds for a process with gigabytes of memory.
    ///
    /// # Errors
    /// As for [`Mapping::all_of`].
    pub fn all_of_in_detail(pid: i32) -> io::Result<Vec<Mapping>> {
        Ok(parse(&fs::read(super::path(pid, "smaps"))?))
    }

    /// Those that are registered with a userfaultfd for missing pages, in detail.
    ///
    /// # Errors
    /// As for [`Mapping::all_of`].
    pub fn registered_of(pid: i32) -> io::Result<Vec<Mapping>> {
        let mut mappings = Mapping::all_of_in_detail(pid)?;
        mappings.retain(Mapping::is_registered);
        Ok(mappings)
    }

    /// Whether it is registered with a userfaultfd for missing pages. Only smaps tells.
    pub fn is_registered(&self) -> bool {
        self.has_flag(*b"um")
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.start..self.end
    }

    /// Whether smaps tells this flag.
    pub fn has_flag(&self, flag: [u8; 2]) -> bool {
        self.flags.contains(&flag)
    }

    /// Mappings of memory that the process keeps to itself when it forks (MADV_DONTFORK,
    /// madvise(2)), those as one that could be parts of one, in detail.
    ///
    /// # Errors
    /// As for [`Mapping::all_of`].
    pub fn kept_from_children_of(pid: i32) -> io::Result<Vec<Mapping>> {
        let mut mappings = Mapping::all_of_in_detail(pid)?;
        mappings.retain(|mapping| mapping.has_flag(*b"dc"));
        Ok(joined(mappings))
    }

    /// Whether `next` could be the other half of this mapping: it begins where this one
    /// ends, with the same rights, on the same file and at the right offset of it. What
    /// smaps tells beyond that may differ.
    fn continues_with(&self, next: &Mapping) -> bool {
        let kind = |mapping: &Mapping| {
            let rights = (mapping.readable, mapping.writable, mapping.executable, mapping.shared);
            (rights, mapping.device, mapping.inode)
        };
        let offset = match self.inode {
            0 => next.offset,
            _ => self.offset + self.size(),
        };
        self.end == next.start && kind(self) == kind(next) && offset == next.offset
    }
}

/// Where `len` bytes may lie that a process has mapped in one call: everywhere where they
/// begin or end as a mapping does and are mapped throughout, by one mapping or by neighbours
/// of equal kind.
///
/// What was mapped in one call need not be one mapping: the kernel splits mappings where a
/// part is advised differently (madvise(2)) and merges neighbours of equal kind.
/// `mappings` are in the order of their addresses.
pub fn ranges_of_len(mappings: &[Mapping], len: u64) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for run in mappings.chunk_by(Mapping::continues_with) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        let before = found.len();
        for mapping in run {
            for start in [Some(mapping.start), mapping.end.checked_sub(len)] {
                let range = start.and_then(|start| Some(start..start.checked_add(len)?));
                let fits = |range: &Range<u64>| range.start >= first.start && range.end <= last.end;
                let range = range.filter(fits).filter(|range| !found[before..].contains(range));
                found.extend(range);
            }
        }
    }
    found
}

/// The same mappings, neighbours as one that could be parts of one.
fn joined(mappings: Vec<Mapping>) -> Vec<Mapping> {
    let mut whole: Vec<Mapping> = Vec::new();
    for mapping in mappings {
        match whole.last_mut() {
            Some(last) if last.continues_with(&mapping) && last.page_size == mapping.page_size => {
                last.end = mapping.end;
            }
            _ => whole.push(mapping),
        }
    }
    whole
}

/// The mappings in the text of maps or smaps. Lines that are neither are passed over.
pub(super) fn parse(text: &[u8]) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        if let Some(mapping) = header(line) {
            mappings.push(mapping);
        } else if let (Ok(line), Some(mapping)) = (str::from_utf8(line), mappings.last_mut()) {
            add_detail(line, mapping);
        }
    }
    mappings
}

/// A mapping's first line: `START-END PERMS OFFSET MAJOR:MINOR INODE PATH`.
fn header(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let start = rest.iter().position(|byte| *byte != b' ')?;
        let end = rest[start..].iter().position(|byte| *byte == b' ');
        let end = end.map_or(rest.len(), |len| start + len);
        let found = str::from_utf8(&rest[start..end]);
        rest = &rest[end..];
        found.ok()
    };
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let minor_or_major = |text: &str| u32::from_str_radix(text, 16).ok();
    let (start, end) = field()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end).filter(|end| *end >= hex(start).unwrap_or(0))?);
    let &[read, write, execute, share] = field()?.as_bytes() else { return None };
    let offset = hex(field()?)?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse().ok()?;
    let path = rest.trim_ascii_start();
    Some(Mapping {
        start,
        end,
        readable: read == b'r',
        writable: write == b'w',
        executable: execute == b'x',
        shared: share == b's',
        offset,
        device: (minor_or_major(major)?, minor_or_major(minor)?),
        inode,
        path: (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path))),
        page_size: None,
        flags: Vec::new(),
    })
}

/// One of the lines that smaps has below a mapping's first.
fn add_detail(line: &str, mapping: &mut Mapping) {
    if let Some(size) = line.strip_prefix("KernelPageSize:") {
        let kib = size.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok());
        mapping.page_size = kib.map(|kib| kib << 10);
    } else if let Some(flags) = line.strip_prefix("VmFlags:") {
        let flag = |flag: &str| flag.as_bytes().try_into().ok();
        mapping.flags = flags.split_whitespace().filter_map(flag).collect();
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // lists of one range are meant
mod tests {
    use std::path::Path;

    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \n\
Size:             524288 kB\nKernelPageSize:        4 kB\n\
VmFlags: rd wr mr mw me ac um \n\
7f0030000000-7f0030200000 rw-s 00000000 00:0f 77 /anon_hugepage (deleted)\n\
KernelPageSize:     2048 kB\nVmFlags: rd wr sh um ht\n\
7f0040000000-7f0040001000 r-xp 00002000 08:01 5                          /lib/vm linum\n\
KernelPageSize:        4 kB\nVmFlags: rd mr mw me sd\n";

    #[test]
    fn smaps_is_read_line_by_line() {
        let mappings = parse(SMAPS.as_bytes());
        let ranges: Vec<_> = mappings.iter().map(Mapping::range).collect();
        let expected = [
            0x7f00_0000_0000..0x7f00_2000_0000,
            0x7f00_3000_0000..0x7f00_3020_0000,
            0x7f00_4000_0000..0x7f00_4000_1000u64,
        ];
        assert_eq!(ranges, expected);
        let [ram, huge, library] = &mappings[..] else { panic!("{mappings:?}") };
        assert!(ram.writable && !ram.executable && !ram.shared && ram.path.is_none());
        assert_eq!(
            (ram.page_size, ram.has_flag(*b"um"), ram.has_flag(*b"uw")),
            (Some(4096), true, false)
        );
        assert_eq!((huge.page_size, huge.device, huge.inode), (Some(2 << 20), (0, 15), 77));
        assert_eq!(huge.path.as_deref(), Some(Path::new("/anon_hugepage (deleted)")));
        assert!(huge.shared && library.executable && !library.writable);
        assert_eq!((library.offset, library.has_flag(*b"um")), (0x2000, false));
        assert_eq!(library.path.as_deref(), Some(Path::new("/lib/vm linum")));
    }

    #[test]
    fn what_is_no_mapping_is_passed_over() {
        for text in ["", "nonsense\nVmFlags: um", "7f00-", "9-8 rw-p 0 0:0 0", "a-b rw", "1-2 é"] {
            assert_eq!(parse(text.as_bytes()), [], "{text}");
        }
    }

    #[test]
    fn our_own_mappings_are_seen() {
        let pid = std::process::id() as i32;
        let here = our_own_mappings_are_seen as fn() as usize as u64;
        for mappings in [Mapping::all_of(pid), Mapping::all_of_in_detail(pid)] {
            let found = mappings.unwrap().into_iter().find(|m| m.range().contains(&here));
            assert!(found.is_some_and(|mapping| mapping.executable && mapping.inode != 0));
        }
    }

    fn mappings(lines: &[&str]) -> Vec<Mapping> {
        parse(lines.join("\n").as_bytes())
    }

    #[test]
    fn what_was_mapped_in_one_call_is_found_split_and_merged() {
        let whole = mappings(&["1000-5000 rw-p 0 0:0 0"]);
        assert_eq!(ranges_of_len(&whole, 0x4000), [0x1000..0x5000]);
        // With a neighbour on either side.
        assert_eq!(ranges_of_len(&whole, 0x3000), [0x1000..0x4000, 0x2000..0x5000]);
        assert_eq!(ranges_of_len(&whole, 0x5000), []);
        assert_eq!(ranges_of_len(&whole, u64::MAX), []);
        // In parts, with neighbours of their own on either side.
        let split =
            mappings(&["0-1000 rw-p 0 0:0 0", "1000-3000 rw-p 0 0:0 0", "3000-5000 rw-p 0 0:0 0"]);
        assert!(ranges_of_len(&split, 0x4000).contains(&(0x1000..0x5000)));
        assert_eq!(ranges_of_len(&split, 0x5000), [0..0x5000]);
    }

    #[test]
    fn parts_are_joined_to_what_was_mapped() {
        let parts = mappings(&[
            "1000-3000 rw-p 0 0:0 0",
            "3000-5000 rw-p 0 0:0 0",
            "6000-7000 rw-p 0 0:0 0",
            "7000-8000 rw-s 0 0:0 0",
        ]);
        let ranges: Vec<_> = joined(parts).iter().map(Mapping::range).collect();
        assert_eq!(ranges, [0x1000..0x5000, 0x6000..0x7000, 0x7000..0x8000]);
    }

    #[test]
    fn neighbours_of_another_kind_are_not_one() {
        for other in [
            "3000-5000 rw-s 0 0:0 0",
            "3000-5000 r--p 0 0:0 0",
            "4000-6000 rw-p 0 0:0 0",
            "3000-5000 rw-p 0 8:1 7 /file",
        ] {
            let lines = mappings(&["1000-3000 rw-p 0 0:0 0", other]);
            assert_eq!(ranges_of_len(&lines, 0x4000), [], "{other}");
        }
        let file = |offset| format!("3000-5000 rw-s {offset} 8:1 7 /file");
        let parts = |offset| mappings(&["1000-3000 rw-s 1000 8:1 7 /file", &file(offset)]);
        assert_eq!(ranges_of_len(&parts("3000"), 0x4000), [0x1000..0x5000]);
        assert_eq!(ranges_of_len(&parts("1000"), 0x4000), []);
    }
}
