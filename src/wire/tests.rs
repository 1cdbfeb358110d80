//! What is written is read back the same, however the bytes arrive; what is
//! damaged is an error, never a panic.

use std::io::{Cursor, Read};

use proptest::prelude::*;

use super::source::Opening;
use super::*;
use crate::page::{Block, BlockId, PAGE_SIZE, Page, Run};

/// Gives its bytes in pieces of the sizes that are listed, over and over.
struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: Vec<usize>,
    turn: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let size = self.sizes[self.turn % self.sizes.len()];
        self.turn += 1;
        let n = size.min(buffer.len()).min(self.bytes.len());
        buffer[..n].copy_from_slice(&self.bytes[..n]);
        self.bytes = &self.bytes[n..];
        Ok(n)
    }
}

fn config(name: &str) -> Vec<u8> {
    let mut bytes = [FILE_MAGIC.to_be_bytes(), FILE_VERSION.to_be_bytes()].concat();
    bytes.push(section::CONFIGURATION);
    bytes.extend_from_slice(&(name.len() as u32).to_be_bytes());
    bytes.extend_from_slice(name.as_bytes());
    bytes
}

/// The configuration section with a subsection of every kind that is known.
fn config_with_subsections() -> Vec<u8> {
    let mut bytes = config("pc-q35-10.0");
    let mut subsection = |name: &str, body: &[u8]| {
        bytes.push(section::SUBSECTION);
        bytes.push(name.len() as u8);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&1u32.to_be_bytes());
        bytes.extend_from_slice(body);
    };
    subsection("configuration/capabilities", b"\x00\x00\x00\x01\x03abc");
    subsection("configuration/target-page-bits", &12u32.to_be_bytes());
    subsection("configuration/uuid", &[7; 16]);
    bytes
}

/// The block list as a stream carries it, without the commands of a postcopy source.
fn block_list(config: &[u8], blocks: &[Block]) -> Vec<u8> {
    let opening = Opening { config, blocks, ping: 1, host_page_size: 4096 }.bytes();
    let start = [&[section::START][..], &source::RAM_SECTION.to_be_bytes(), b"\x03ram"].concat();
    let at = opening.windows(start.len()).position(|w| w == start).unwrap();
    let discard = [section::COMMAND, 0, command::POSTCOPY_RAM_DISCARD as u8];
    let end = opening.windows(3).position(|w| w == discard).unwrap();
    [config, &opening[at..end]].concat()
}

fn tail(devices: &[u8], vmdesc: &[u8]) -> Vec<u8> {
    let mut bytes = devices.to_vec();
    bytes.extend_from_slice(&[section::EOF, section::VMDESCRIPTION]);
    bytes.extend_from_slice(&(vmdesc.len() as u32).to_be_bytes());
    bytes.extend_from_slice(vmdesc);
    bytes
}

fn block(name: &str, pages: u64) -> Block {
    Block { name: name.into(), len: pages * PAGE_SIZE as u64, page_size: 4096 }
}

#[derive(Debug, Clone, PartialEq)]
enum Seen {
    Blocks(usize),
    Page(Page, Vec<u8>),
    Zero(Page),
    Tail(Tail),
}

fn read_all(input: impl Read) -> Result<(Vec<Seen>, Vec<u8>), WireError> {
    let mut reader = StreamReader::new(input);
    let mut seen = Vec::new();
    while let Some(item) = reader.next_item()? {
        seen.push(match item {
            Item::Blocks(blocks) => Seen::Blocks(blocks.len()),
            Item::Page(page, bytes) => Seen::Page(page, bytes.to_vec()),
            Item::Zero(page) => Seen::Zero(page),
            Item::Tail(tail) => Seen::Tail(tail),
        });
    }
    Ok((seen, reader.config().to_vec()))
}

/// A device's section of this number.
fn device(id: u32, name: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![section::FULL];
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.push(name.len() as u8);
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
    bytes.extend_from_slice(body);
    bytes.push(section::FOOTER);
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes
}

/// Runs of pages, each zero or of some content, within three blocks.
fn runs() -> impl Strategy<Value = Vec<(Run, Option<u8>)>> {
    let run = (0u16..3, 0u64..60, 1u64..5, prop::option::of(1u8..));
    let to_run = |(block, first, count, fill)| (Run { block: BlockId(block), first, count }, fill);
    prop::collection::vec(run.prop_map(to_run), 0..20)
}

fn stream_of(runs: &[(Run, Option<u8>)], devices: &[u8], vmdesc: &[u8]) -> (Vec<u8>, Vec<Seen>) {
    let blocks = [block("pc.ram", 64), block("pc.bios", 64), block("a b", 64)];
    let mut bytes = block_list(&config_with_subsections(), &blocks);
    let mut seen = vec![Seen::Blocks(3)];
    let mut frame = Frame::default();
    for (run, fill) in runs {
        let block = &blocks[run.block.index()];
        let page = [fill.unwrap_or(0); PAGE_SIZE];
        bytes.extend_from_slice(match fill {
            Some(_) => frame.pages(block, *run, std::iter::repeat(&page)),
            None => frame.zeros(block, *run),
        });
        seen.extend(run.pages().map(|at| match fill {
            Some(_) => Seen::Page(at, page.to_vec()),
            None => Seen::Zero(at),
        }));
    }
    bytes.extend_from_slice(&tail(devices, vmdesc));
    seen.push(Seen::Tail(Tail { devices: devices.to_vec(), vmdesc: vmdesc.to_vec() }));
    (bytes, seen)
}

fn devices() -> impl Strategy<Value = Vec<u8>> {
    let body = prop::collection::vec(any::<u8>(), 0..200);
    (0u32..100, body).prop_map(|(id, body)| device(id, "cpu_common", &body))
}

proptest! {
    #[test]
    fn a_stream_reads_back_however_its_bytes_arrive(
        runs in runs(),
        devices in devices(),
        vmdesc in "\\{[ -~]{0,80}\\}",
        sizes in prop::collection::vec(1usize..9000, 1..5),
    ) {
        let (bytes, expected) = stream_of(&runs, &devices, vmdesc.as_bytes());
        let (seen, config) = read_all(Pieces { bytes: &bytes, sizes, turn: 0 }).unwrap();
        prop_assert_eq!(seen, expected);
        prop_assert_eq!(config, config_with_subsections());
    }

    #[test]
    fn a_truncated_stream_is_an_error(
        runs in runs(), devices in devices(), cut in any::<prop::sample::Index>(),
    ) {
        let (bytes, _) = stream_of(&runs, &devices, b"{}");
        let cut = cut.index(bytes.len());
        // Between the end-of-file byte and the description's mark it is whole.
        let described = bytes.len() - 7;
        let outcome = read_all(Cursor::new(&bytes[..cut]));
        prop_assert_eq!(cut == described, outcome.is_ok());
    }

    #[test]
    fn flipped_bytes_never_panic(
        runs in runs(), devices in devices(), at in any::<prop::sample::Index>(), flip in 1u8..,
    ) {
        let (mut bytes, _) = stream_of(&runs, &devices, b"{}");
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let mut stream = StreamReader::new(Cursor::new(bytes));
        while let Ok(Some(_)) = stream.next_item() {}
        // At its end or behind an error, nothing more comes.
        prop_assert!(matches!(stream.next_item(), Ok(None)));
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read_all(Cursor::new(&bytes));
        let mut path = ReturnPath::new(Cursor::new(bytes));
        while let Ok(Some(_)) = path.next_message() {}
    }

    #[test]
    fn requests_read_back(offset in any::<u64>(), len in any::<u32>(), name in "[ -~]{0,255}") {
        let mut bytes = Vec::new();
        let range = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        bytes.extend_from_slice(&3u16.to_be_bytes());
        bytes.extend_from_slice(&(13 + name.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&range);
        bytes.push(name.len() as u8);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&[&[0, 4, 0, 12][..], &range, &[0, 2, 0, 4, 0, 0, 0, 9]].concat());
        let mut path = ReturnPath::new(Pieces { bytes: &bytes, sizes: vec![1, 3], turn: 0 });
        let named = ReturnPathMessage::RequestPages { block: Some(name), offset, len };
        prop_assert_eq!(path.next_message().unwrap(), Some(named));
        let same = ReturnPathMessage::RequestPages { block: None, offset, len };
        prop_assert_eq!(path.next_message().unwrap(), Some(same));
        prop_assert_eq!(path.next_message().unwrap(), Some(ReturnPathMessage::Pong(9)));
        prop_assert_eq!(path.next_message().unwrap(), None);
    }
}

#[test]
fn what_was_received_is_read_with_its_bitmap() {
    let mut bytes = [&[0, 5, 0, 7][..], &[6], b"pc.ram", &[0, 0, 0, 0, 0, 0, 0, 8]].concat();
    bytes.extend_from_slice(&[0b101, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&0x0123_4567_89ab_cdef_u64.to_be_bytes());
    bytes.extend_from_slice(&[0, 6, 0, 4, 0, 0, 0, 1]);
    let mut path = ReturnPath::new(Pieces { bytes: &bytes, sizes: vec![1, 3], turn: 0 });
    let pages = vec![0b101, 0, 0, 0, 0, 0, 0, 0];
    let received = ReturnPathMessage::Received { block: "pc.ram".into(), pages };
    assert_eq!(path.next_message().unwrap(), Some(received));
    assert_eq!(path.next_message().unwrap(), Some(ReturnPathMessage::Resumed));
    assert_eq!(path.next_message().unwrap(), None);
    // Another end, and a length that no block has.
    bytes[27] ^= 1;
    assert!(ReturnPath::new(Cursor::new(&bytes)).next_message().is_err());
    bytes[11] = 0xff;
    assert!(ReturnPath::new(Cursor::new(&bytes)).next_message().is_err());
}

#[test]
fn what_is_not_supported_is_named() {
    let early = [&config("pc")[..], &[section::FULL, 0, 0, 0, 9, 10], b"virtio-mem"].concat();
    let error = read_all(Cursor::new(early)).unwrap_err().to_string();
    assert!(error.contains("device `virtio-mem` sends state before RAM"), "{error}");

    let error = read_all(Cursor::new(b"\x7fELF\0\0\0\x01....")).unwrap_err().to_string();
    assert!(error.contains("not a QEMU migration stream (magic 0x7f454c46"), "{error}");

    let mut compressed = block_list(&config("pc"), &[block("pc.ram", 1)]);
    compressed.push(section::PART);
    compressed.extend_from_slice(&source::RAM_SECTION.to_be_bytes());
    compressed.extend_from_slice(&0x100u64.to_be_bytes());
    let error = read_all(Cursor::new(compressed)).unwrap_err().to_string();
    assert!(error.contains("RAM records with flags 0x100"), "{error}");
}

/// Device state has no lengths and is full of zeros: a cut in it must not look like an
/// end, whatever the bytes before it are.
#[test]
fn a_stream_that_ends_within_its_devices_is_truncated() {
    let zeros = [0; 3000];
    // What ends other sections, what ends streams, and numbers that look like either.
    let marks = b"\x7e\0\0\0\x01\0\0\x7e\0\0\0\x09\0\0\0\x06\0\0\0\0\0\x06\0\0\0\x08{}~~~~~~\0\0";
    let mut devices = device(9, "timer", &[&zeros[..], b"\0\0\0~\0\0\0\0\0\0"].concat());
    devices.extend(device(1, "cpu_common", &zeros));
    devices.extend(device(2, "0000:00:02.0/vga", marks));
    devices.extend(device(3, "globalstate", &[&zeros[..], marks].concat()));
    let head = [block_list(&config("pc"), &[block("pc.ram", 1)]), end_of_ram()].concat();
    for vmdesc in [&b"{}"[..], b""] {
        let whole = [&head[..], &super::tail(&devices, vmdesc)].concat();
        // Up to there, the description lacks and nothing else.
        let ended = head.len() + devices.len() + 1;
        for cut in 0..=whole.len() {
            let is_read = read_all(Cursor::new(&whole[..cut])).is_ok();
            assert_eq!(is_read, cut == ended || cut == whole.len(), "{cut}");
        }
    }
}

#[test]
fn commands_before_the_devices_are_passed_over() {
    let blocks = [block("pc.ram", 1)];
    let opening = Opening { config: &config("pc"), blocks: &blocks, ping: 1, host_page_size: 4096 };
    let discard = [section::COMMAND, 0, command::POSTCOPY_RAM_DISCARD as u8];
    let mut bytes = opening.bytes();
    bytes.truncate(bytes.windows(3).position(|w| w == discard).unwrap());
    bytes.extend_from_slice(&[section::COMMAND, 0, command::SWITCHOVER_START as u8, 0, 0]);
    bytes.extend_from_slice(
        Frame::default().zeros(&blocks[0], Run { block: BlockId(0), first: 0, count: 1 }),
    );
    bytes.extend_from_slice(&end_of_ram());
    bytes.extend_from_slice(&super::tail(&device(7, "timer", b"state"), b"{}"));
    let (seen, found) = read_all(Cursor::new(&bytes)).unwrap();
    assert_eq!(found, config("pc"));
    assert_eq!(seen.len(), 3);

    let huge = [Block { page_size: 2 << 20, ..block("pc.ram", 512) }];
    let bytes = Opening { blocks: &huge, ..opening }.bytes();
    let error = read_all(Cursor::new(bytes)).unwrap_err().to_string();
    assert!(error.contains("huge pages"), "{error}");
}

#[test]
fn a_mapped_ram_file_reads_back_around_its_pages() {
    let blocks = [block("pc.ram", 300), block("pc.bios", 64)];
    let devices = device(7, "timer", b"state");
    let layout = MappedLayout::new(&config_with_subsections(), &blocks, &devices, b"{}");
    let mut file = vec![0xaa; layout.len as usize];
    for (offset, bytes) in &layout.pieces {
        file[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    let mut reader = StreamReader::of_file(Cursor::new(&file));
    let Some(Item::Blocks(found)) = reader.next_item().unwrap() else { panic!() };
    let mapped: Vec<_> = found.iter().map(|block| block.mapped.unwrap()).collect();
    assert_eq!(mapped, layout.blocks);
    assert!(mapped.iter().all(|block| block.pages_offset.is_multiple_of(1 << 20)));
    let Some(Item::Tail(tail)) = reader.next_item().unwrap() else { panic!() };
    assert_eq!((&tail.devices, &tail.vmdesc[..]), (&devices, &b"{}"[..]));
    // Its mark is gone: what is made of it is an ordinary stream again.
    assert_eq!(reader.config(), config_with_subsections());

    let error = StreamReader::new(Cursor::new(&file)).next_item().unwrap_err().to_string();
    assert!(error.contains("can't be read from a pipe"), "{error}");
    for cut in [10, 200, 1 << 20, file.len() - 1] {
        let mut reader = StreamReader::of_file(Cursor::new(&file[..cut]));
        assert!((0..2).any(|_| reader.next_item().is_err()), "{cut}");
    }
}

#[test]
fn page_sizes_are_told_only_where_they_differ_from_the_hosts() {
    let huge = Block { name: "ram".into(), len: 4 << 20, page_size: 2 << 20 };
    let opening = |page_size| {
        let blocks = [Block { page_size, ..huge.clone() }];
        Opening { config: &config("pc"), blocks: &blocks, ping: 1, host_page_size: 4096 }.bytes()
    };
    assert_eq!(opening(2 << 20).len(), opening(4096).len() + 8);
}

#[test]
fn the_package_holds_listen_and_device_state_together() {
    let bytes = package(b"\x04devices", 2, 3);
    let inner = &bytes[9..];
    assert_eq!(bytes[..5], [section::COMMAND, 0, 7, 0, 4]);
    assert_eq!(bytes[5..9], (inner.len() as u32).to_be_bytes());
    assert!(inner.starts_with(&[section::COMMAND, 0, command::POSTCOPY_LISTEN as u8, 0, 0]));
    assert!(inner.ends_with(&[section::COMMAND, 0, command::POSTCOPY_RUN as u8, 0, 0]));
    assert!(inner.windows(8).any(|w| w == b"\x04devices"));
}
