//! What must hold of an image, whatever is written to it and whatever becomes of
//! the file afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::image::format::layout::*;
use crate::image::read::verify::MAX_DAMAGES;
use crate::image::write::index::check_index;
use crate::machine::{Machine, QemuVersion};
use crate::page::{
    Block, BlockId, Location, PAGE_SIZE, Page, PageBytes, PageSource, Run, SourceError,
};

pub(super) fn block(name: &str, pages: u64) -> Block {
    Block { name: name.into(), len: pages * PAGE_SIZE as u64, page_size: PAGE_SIZE as u64 }
}

pub(super) fn page(block: u16, number: u64) -> Page {
    Page { block: BlockId(block), number }
}

/// A page that only `seed` makes: 0 zeros, odd ones random, even ones repetitive.
pub(super) fn contents(seed: u32) -> PageBytes {
    let mut bytes = [0; PAGE_SIZE];
    if seed.is_multiple_of(2) {
        bytes.chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&seed.to_le_bytes()));
        return bytes;
    }
    let mut state = u64::from(seed) | 1 << 40;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

pub(super) fn options(chunk_pages: usize, compression: Compression) -> WriterOptions {
    WriterOptions { chunk_pages, compression, workers: 2, ..WriterOptions::default() }
}

pub(super) fn details() -> Details {
    Details {
        machine: Machine {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            qemu: QemuVersion { major: 7, minor: 2, micro: 22, package: String::new() },
            machine_type: "pc-i440fx-7.2".into(),
            argv: vec!["qemu-system-x86_64".into(), "-m".into(), "1".into()],
            cwd: "/".into(),
            env: vec![],
            running: true,
            uncaptured_disks: vec![],
            disks: vec![],
            libvirt_xml: None,
            libvirt_inactive_xml: None,
            hotplug: Default::default(),
        },
        moment_unix_us: 1_700_000_000_000_000,
        pause_us: Some(1500),
    }
}

pub(super) fn sections() -> Sections {
    Sections { config: b"config".into(), devices: vec![7; 300], vmdesc: b"{}".into() }
}

/// A machine's memory: the seed of each page's contents.
pub(super) type Memory = BTreeMap<Page, u32>;

/// Reads every page through the public face.
pub(super) fn read_all(image: &Arc<Image>) -> Result<BTreeMap<Page, PageBytes>, SourceError> {
    let mut reader = image.reader()?;
    let mut pages = BTreeMap::new();
    for (number, block) in image.blocks().iter().enumerate() {
        for page in (0..block.pages()).map(|at| page(number as u16, at)) {
            let bytes = match image.locate(page)? {
                Location::Zero => [0; PAGE_SIZE],
                Location::Stored { chunk, slot } => {
                    let chunk = reader.read(chunk)?;
                    chunk[slot * PAGE_SIZE..(slot + 1) * PAGE_SIZE].try_into()?
                }
            };
            pages.insert(page, bytes);
        }
    }
    Ok(pages)
}

/// Reads the rest of a cursor's pages, which come in ascending order.
fn read_in_order(cursor: &mut Cursor) -> Result<BTreeMap<Page, PageBytes>, ImageError> {
    let mut pages = BTreeMap::new();
    while let Some(piece) = cursor.next_piece()? {
        let run = piece.run();
        assert!(
            pages.last_key_value().is_none_or(|(last, _)| *last < page(run.block.0, run.first))
        );
        match piece {
            Piece::Zeros(run) => pages.extend(run.pages().map(|page| (page, [0; PAGE_SIZE]))),
            Piece::Data(run, bytes) => {
                assert_eq!(bytes.len() as u64, run.bytes());
                pages.extend(run.pages().zip(bytes.as_chunks().0.iter().copied()));
            }
        }
    }
    Ok(pages)
}

pub(super) fn expected(memory: &Memory) -> BTreeMap<Page, PageBytes> {
    memory.iter().map(|(page, seed)| (*page, contents(*seed))).collect()
}

/// A directory with an image of a small machine: blocks of 5, 0 and 37 pages with
/// zeros, repetitive and random pages.
struct Small {
    directory: TempDir,
    path: PathBuf,
    memory: Memory,
}

impl Small {
    fn write(options: WriterOptions) -> Small {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.snap");
        let memory = write_small(&path, options);
        Small { directory, path, memory }
    }

    fn open(&self) -> Result<Arc<Image>, ImageError> {
        Image::open(&self.path)
    }

    fn edit(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(&self.path).unwrap();
        change(&mut bytes);
        fs::write(&self.path, bytes).unwrap();
    }

    /// Changes the superblock and makes its checksum right again.
    fn edit_superblock(&self, change: impl FnOnce(&mut [u8; SUPERBLOCK_BYTES])) {
        self.edit(|bytes| {
            let head: &mut [u8; SUPERBLOCK_BYTES] =
                (&mut bytes[..SUPERBLOCK_BYTES]).try_into().unwrap();
            change(head);
            seal_superblock(head);
        });
    }

    /// Changes a table's first piece and makes its checksum right again.
    fn edit_table(&self, region: Region, change: impl FnOnce(&mut [u8; PIECE_BYTES])) {
        let superblock = self.open().unwrap().own().superblock.clone();
        let at = superblock.region(region).offset as usize;
        self.edit(|bytes| {
            let piece: &mut [u8; PIECE_BYTES] =
                (&mut bytes[at..at + PIECE_BYTES]).try_into().unwrap();
            change(piece);
            let checksum = piece_checksum(region.seed(superblock.identity), 0, piece);
            put(piece, PIECE_CHECKSUM_OFFSET, &checksum.to_le_bytes());
        });
    }

    /// The names in the directory.
    fn names(&self) -> Vec<String> {
        names(self.directory.path())
    }
}

pub(super) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A third zeros, one chunk that does not compress, the rest repetitive.
fn small_seed(block: u16, at: u64) -> u32 {
    match at as u32 {
        at if at % 3 == 0 => 0,
        at if block == 0 && at < 3 => 2 * at + 1,
        at => 2 * at + 100 * u32::from(block),
    }
}

fn write_small(path: &Path, options: WriterOptions) -> Memory {
    let blocks = vec![block("pc.ram", 5), block("empty", 0), block("vga.vram", 37)];
    let mut memory = Memory::new();
    for (number, pages) in [(0, 5), (2, 37)] {
        for at in 0..pages {
            memory.insert(page(number, at), small_seed(number, at));
        }
    }
    let mut writer = ImageWriter::create(path, options, blocks).unwrap();
    for (page, seed) in &memory {
        writer.page(*page, &contents(*seed)).unwrap();
    }
    writer.finish(details(), sections()).unwrap();
    memory
}

fn small() -> Small {
    Small::write(options(4, Compression::Zstd(1)))
}

// Round trips.

/// What is done to a writer, in this order.
#[derive(Debug, Clone)]
struct Plan {
    blocks: Vec<u64>,
    chunk_pages: usize,
    compression: Compression,
    memory: usize,
    workers: usize,
    /// Block, page, seed: some pages ahead, again, or both.
    early: Vec<(prop::sample::Index, prop::sample::Index, u32)>,
    /// Whether the sweep that follows goes down instead of up.
    down: bool,
    /// Seeds of the sweep, by page.
    seeds: Vec<u32>,
    late: Vec<(prop::sample::Index, prop::sample::Index, u32)>,
}

fn any_plan() -> impl Strategy<Value = Plan> {
    let seed = || prop_oneof![Just(0u32), 1..50u32];
    let touch =
        move || vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), seed()), 0..40);
    let compression = prop_oneof![
        Just(Compression::None),
        Just(Compression::Zstd(1)),
        Just(Compression::Zstd(-3))
    ];
    (
        vec(0u64..150, 1..5),
        (0..7u32).prop_map(|shift| 1 << shift),
        compression,
        prop_oneof![Just(0usize), Just(1 << 20), Just(64 << 20)],
        1..4usize,
        touch(),
        any::<bool>(),
        vec(seed(), 600),
        touch(),
    )
        .prop_map(
            |(blocks, chunk_pages, compression, memory, workers, early, down, seeds, late)| Plan {
                blocks,
                chunk_pages,
                compression,
                memory,
                workers,
                early,
                down,
                seeds,
                late,
            },
        )
}

impl Plan {
    /// The pages in the order in which they are given.
    fn steps(&self) -> Vec<(Page, u32)> {
        let touch = |(block, at, seed): &(prop::sample::Index, prop::sample::Index, u32)| {
            let number = block.index(self.blocks.len());
            let pages = self.blocks[number] as usize;
            (pages > 0).then(|| (page(number as u16, at.index(pages) as u64), *seed))
        };
        let mut sweep: Vec<_> = self
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(number, pages)| (0..*pages).map(move |at| page(number as u16, at)))
            .zip(self.seeds.iter().copied())
            .collect();
        if self.down {
            sweep.reverse();
        }
        let mut steps: Vec<_> = self.early.iter().filter_map(touch).collect();
        steps.extend(sweep);
        steps.extend(self.late.iter().filter_map(touch));
        steps
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn what_was_written_is_read(plan in any_plan()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.snap");
        let options = WriterOptions {
            compression: plan.compression,
            chunk_pages: plan.chunk_pages,
            force: false,
            memory: plan.memory,
            workers: plan.workers,
            ..WriterOptions::default()
        };
        let chunk_bytes = plan.chunk_pages * PAGE_SIZE;
        let bound = plan.memory.max((4 + 2 * plan.workers) * chunk_bytes);
        let blocks: Vec<Block> =
            plan.blocks.iter().enumerate().map(|(n, pages)| block(&format!("b{n}"), *pages)).collect();
        let mut writer = ImageWriter::create(&path, options, blocks.clone()).unwrap();
        let mut memory = Memory::new();
        for (page, seed) in plan.steps() {
            match seed {
                0 if page.number % 2 == 0 => writer.zero(page).unwrap(),
                seed => writer.page(page, &contents(seed)).unwrap(),
            }
            memory.insert(page, seed);
            let stats = writer.stats();
            let zeros = memory.values().filter(|seed| **seed == 0).count() as u64;
            prop_assert_eq!(stats.zero_pages, zeros);
            prop_assert_eq!(stats.data_pages, memory.len() as u64 - zeros);
            prop_assert!(stats.buffered_bytes <= bound);
        }
        let saved = writer.finish(details(), sections()).unwrap();
        prop_assert_eq!(saved.data_pages + saved.zero_pages, plan.blocks.iter().sum::<u64>());
        prop_assert_eq!(saved.image_bytes, fs::metadata(&path).unwrap().len());

        let image = Image::open(&path).unwrap();
        prop_assert_eq!(image.identity(), saved.identity);
        prop_assert_eq!(image.blocks(), &blocks[..]);
        prop_assert_eq!(image.chunk_pages(), plan.chunk_pages);
        prop_assert_eq!(image.sections().unwrap(), sections());
        prop_assert_eq!(&image.manifest().machine, &details().machine);
        prop_assert!(read_all(&image).unwrap() == expected(&memory));
        prop_assert!(read_in_order(&mut Cursor::over_all(&image).unwrap()).unwrap() == expected(&memory));
        let report = verify(&image, |_, _| {}).unwrap();
        prop_assert!(report.is_whole(), "{:?}", report.damages);
        prop_assert_eq!(report.chunks, image.chunk_count());
        if plan.chunk_pages == 1 {
            let given: BTreeSet<u32> = plan.steps().iter().map(|(_, seed)| *seed).collect();
            prop_assert!(image.chunk_count() <= given.len() as u64);
        }
    }
}

#[test]
fn a_cursor_goes_up_to_damage_and_stands_before_it() {
    let small = small();
    let image = small.open().unwrap();
    let some = Run { block: BlockId(2), first: 1, count: 7 };
    let read = read_in_order(&mut Cursor::over(&image, some).unwrap()).unwrap();
    let wanted: BTreeMap<_, _> =
        some.pages().map(|page| (page, contents(small.memory[&page]))).collect();
    assert!(read == wanted);

    // The entry of the third block's second page.
    small.edit_table(Region::PageIndex, |piece| piece[6 * PAGE_ENTRY_BYTES] = 9);
    let mut cursor = Cursor::over_all(&small.open().unwrap()).unwrap();
    for _ in 0..2 {
        let error = read_in_order(&mut cursor).unwrap_err().to_string();
        assert!(error.contains("kind 9 is not known"), "{error}");
        assert_eq!(cursor.page(), Some(page(2, 1)));
    }
}

/// Whatever threads find it, and whether it has been written when it is met again.
#[test]
fn equal_chunks_are_stored_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    for compression in [Compression::None, Compression::Zstd(1)] {
        let options =
            WriterOptions { workers: 4, force: true, memory: 1 << 20, ..options(4, compression) };
        let blocks = vec![block("ram", 4000), block("rom", 2)];
        let mut writer = ImageWriter::create(&path, options, blocks).unwrap();
        // Ten different groups, again and again, and half of one of them.
        let mut memory: Memory = (0..4000).map(|at| (page(0, at), at as u32 % 40 + 1)).collect();
        memory.extend([(page(1, 0), 1), (page(1, 1), 2)]);
        for (page, seed) in &memory {
            writer.page(*page, &contents(*seed)).unwrap();
        }
        let saved = writer.finish(details(), sections()).unwrap();
        assert_eq!((saved.data_pages, saved.repeated_pages), (4002, 3960));
        let image = Image::open(&path).unwrap();
        assert_eq!(image.chunk_count(), 11);
        assert_eq!(image.find(page(0, 5)).unwrap(), image.find(page(0, 3965)).unwrap());
        assert!(image.own().superblock.region(Region::Data).len <= 42 * PAGE_SIZE as u64);
        assert!(read_all(&image).unwrap() == expected(&memory));
        assert!(verify(&image, |_, _| {}).unwrap().is_whole());
    }
}

#[test]
fn pages_of_a_chunk_stand_in_order_whatever_order_they_came_in() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let blocks = vec![block("ram", 8)];
    let mut writer = ImageWriter::create(&path, options(8, Compression::None), blocks).unwrap();
    writer.zero(page(0, 2)).unwrap();
    for at in [6, 0, 7, 1, 5, 3, 4] {
        writer.page(page(0, at), &contents(at as u32 + 1)).unwrap();
    }
    writer.finish(details(), sections()).unwrap();
    let image = Image::open(&path).unwrap();
    assert_eq!(image.chunk_count(), 1);
    for (slot, at) in [0, 1, 3, 4, 5, 6, 7].into_iter().enumerate() {
        let stored = Location::Stored { chunk: crate::page::ChunkId(0), slot };
        assert_eq!(image.find(page(0, at)).unwrap(), stored);
    }
}

#[test]
fn threads_may_all_read_at_once() {
    let small = small();
    let image = small.open().unwrap();
    let expected = expected(&small.memory);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(read_all(&image).unwrap() == expected));
        }
    });
}

#[test]
fn an_image_without_any_page_is_an_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let writer = ImageWriter::create(&path, WriterOptions::default(), vec![]).unwrap();
    let saved = writer.finish(details(), Sections::default()).unwrap();
    assert_eq!((saved.data_pages, saved.zero_pages), (0, 0));
    assert!(verify(&Image::open(&path).unwrap(), |_, _| {}).unwrap().is_whole());
}

// The writer's refusals.

#[test]
fn a_missing_page_is_named_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let blocks = vec![block("rom", 3), block("empty", 0), block("ram", 20)];
    let mut writer = ImageWriter::create(&path, options(4, Compression::None), blocks).unwrap();
    for number in 0..20 {
        if number < 3 {
            writer.zero(page(0, number)).unwrap();
        }
        if number != 9 && number != 12 {
            writer.page(page(2, number), &contents(1)).unwrap();
        }
    }
    let error = writer.finish(details(), sections()).unwrap_err();
    let ImageError::PagesMissing { block, offset, missing, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!((block.as_str(), *offset, *missing), ("ram", 9 * 4096, 2));
    assert!(names(directory.path()).is_empty());
}

#[test]
fn a_page_that_does_not_exist_is_refused_and_the_rest_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let mut writer =
        ImageWriter::create(&path, WriterOptions::default(), vec![block("ram", 2)]).unwrap();
    writer.page(page(0, 0), &contents(1)).unwrap();
    for page in [page(0, 2), page(1, 0), page(0, u64::MAX)] {
        assert!(matches!(writer.page(page, &contents(1)), Err(ImageError::NoSuchPage { .. })));
        assert!(matches!(writer.zero(page), Err(ImageError::NoSuchPage { .. })));
    }
    writer.page(page(0, 1), &contents(2)).unwrap();
    writer.finish(details(), sections()).unwrap();
    let image = Image::open(&path).unwrap();
    assert!(matches!(image.find(page(0, 2)), Err(ImageError::NoSuchPage { .. })));
    assert!(matches!(image.find(page(1, 0)), Err(ImageError::NoSuchPage { .. })));
}

#[test]
fn blocks_and_options_are_checked_before_anything_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let big = 1 << 63;
    let bad_blocks = [
        vec![Block { len: 4097, ..block("ram", 1) }],
        vec![Block { page_size: 4095, ..block("ram", 1) }],
        vec![Block { page_size: 2048, ..block("ram", 1) }],
        vec![Block { len: big, ..block("a", 1) }, Block { len: big, ..block("b", 1) }],
        vec![block("ram", 1), block("ram", 1)],
        vec![block(&"x".repeat(256), 1)],
        (0..65536).map(|n| block(&n.to_string(), 0)).collect(),
    ];
    for blocks in bad_blocks {
        let made = ImageWriter::create(&path, WriterOptions::default(), blocks);
        assert!(matches!(made.err(), Some(ImageError::Blocks(_))));
    }
    let plain = WriterOptions::default();
    for options in [
        options(3, Compression::None),
        options(0, Compression::None),
        options(128, Compression::None),
        options(16, Compression::Zstd(23)),
        WriterOptions { workers: 0, ..plain },
    ] {
        let made = ImageWriter::create(&path, options, vec![]);
        assert!(matches!(made.err(), Some(ImageError::Options(_))));
    }
    assert!(names(directory.path()).is_empty());
}

#[test]
fn an_existing_file_stays_unless_forced() {
    let small = small();
    let before = fs::read(&small.path).unwrap();
    let made = ImageWriter::create(&small.path, WriterOptions::default(), vec![]);
    assert!(matches!(made.err(), Some(ImageError::Exists(_))));
    let force = WriterOptions { force: true, ..WriterOptions::default() };
    drop(ImageWriter::create(&small.path, force.clone(), vec![]).unwrap());
    assert_eq!(fs::read(&small.path).unwrap(), before);
    write_small(&small.path, force);
    assert_ne!(fs::read(&small.path).unwrap(), before);
    assert_eq!(small.names(), ["vm.snap"]);
    assert_eq!(fs::metadata(&small.path).unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let mut writer =
        ImageWriter::create(&path, WriterOptions::default(), vec![block("ram", 4096)]).unwrap();
    for number in 0..4000 {
        writer.page(page(0, number), &contents(1)).unwrap();
    }
    drop(writer);
    assert!(names(directory.path()).is_empty());
}

/// A small tmpfs, if we may mount one.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(size: &str) -> Option<Tmpfs> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(directory.path());
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then(|| Tmpfs(directory))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_an_error_and_nothing_is_left() {
    let Some(disk) = Tmpfs::mount("size=1m") else {
        eprintln!("skipped: a small tmpfs can't be mounted here");
        return;
    };
    let path = disk.0.path().join("vm.snap");
    let blocks = vec![block("ram", 4096)];
    let memory = 1 << 20;
    let mut writer =
        ImageWriter::create(&path, WriterOptions { memory, ..WriterOptions::default() }, blocks)
            .unwrap();
    // 16 MiB through 1 MiB of buffers: a page must be refused, and then again.
    let first =
        (0..4096).find_map(|at| writer.page(page(0, at), &contents(2 * at as u32 + 1)).err());
    for error in [first, writer.zero(page(0, 0)).err()] {
        assert!(matches!(error, Some(ImageError::NoSpace { .. })), "{error:?}");
    }
    let error = writer.finish(details(), sections()).unwrap_err();
    assert!(matches!(error, ImageError::NoSpace { .. }), "{error}");
    assert!(names(disk.0.path()).is_empty());

    // All chunks fit, the sections do not.
    let mut writer =
        ImageWriter::create(&path, WriterOptions::default(), vec![block("ram", 1)]).unwrap();
    writer.page(page(0, 0), &contents(1)).unwrap();
    let devices = vec![1; 2 << 20];
    let error = writer.finish(details(), Sections { devices, ..sections() }).unwrap_err();
    assert!(error.to_string().contains("free some space"), "{error}");
    assert!(names(disk.0.path()).is_empty());
}

/// Incompressible pages, each different, through 1 MiB of buffers.
fn slow(path: &Path, bandwidth: u64) -> ImageWriter {
    let options = WriterOptions {
        bandwidth: Some(bandwidth),
        memory: 1 << 20,
        ..options(4, Compression::None)
    };
    ImageWriter::create(path, options, vec![block("ram", 512)]).unwrap()
}

#[test]
fn the_rate_is_kept_and_the_wait_for_it_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    // On a busy machine these come more slowly than the rate.
    let pages: Vec<_> = (0..512).map(|at| contents(2 * at + 1)).collect();
    let start = std::time::Instant::now();
    let mut writer = slow(&path, 4 << 20);
    for (at, bytes) in pages.iter().enumerate() {
        writer.page(page(0, at as u64), bytes).unwrap();
        assert!(writer.stats().buffered_bytes <= 1 << 20);
    }
    assert!(!writer.stats().stalled.is_zero());
    writer.finish(details(), sections()).unwrap();
    // 2 MiB at 4 MiB a second, of which a first piece of 1/16 s goes at once.
    assert!(start.elapsed().as_millis() >= 500 - 63 - 50);
    assert!(verify(&Image::open(&path).unwrap(), |_, _| {}).unwrap().is_whole());
}

#[test]
fn a_writer_is_stopped_wherever_it_waits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    // At this rate it would take six hours.
    for pages in [512, 100] {
        let mut writer = slow(&path, 100);
        let stop = writer.cancellation();
        let stopped = std::thread::scope(|scope| {
            let writing = scope.spawn(move || {
                for at in 0..512 {
                    match at < pages {
                        true => writer.page(page(0, at), &contents(2 * at as u32 + 1))?,
                        false => writer.zero(page(0, at))?,
                    }
                }
                writer.finish(details(), sections())
            });
            stop.request();
            writing.join().unwrap()
        });
        assert!(matches!(stopped, Err(ImageError::Interrupted(_))), "{stopped:?}");
        assert!(names(directory.path()).is_empty());
    }
}

#[test]
fn an_image_need_not_stay_in_the_page_cache() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    for cache in [CacheUse::Drop, CacheUse::Keep, CacheUse::WhatIsFree] {
        let options = WriterOptions { cache, force: true, ..options(16, Compression::None) };
        let blocks = vec![block("ram", 10_000)];
        let mut writer = ImageWriter::create(&path, options, blocks).unwrap();
        let memory: Memory = (0..10_000).map(|at| (page(0, at), 2 * at as u32 + 1)).collect();
        for (page, seed) in &memory {
            writer.page(*page, &contents(*seed)).unwrap();
        }
        writer.finish(details(), sections()).unwrap();
        let image = Image::open(&path).unwrap();
        assert!(verify(&image, |_, _| {}).unwrap().is_whole());
    }
}

// Files that are not what was written.

#[test]
fn a_file_cut_anywhere_is_refused() {
    let small = small();
    let whole = fs::read(&small.path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&small.path).unwrap();
    for len in (0..whole.len()).rev() {
        file.set_len(len as u64).unwrap();
        match small.open().err().expect("a cut image must not open") {
            ImageError::Truncated { found, .. } => assert_eq!(found, len as u64),
            other => panic!("{other}"),
        }
        if len == 5000 {
            let error = small.open().err().unwrap().to_string();
            assert!(
                error.contains(&format!("truncated: 5000 of {} bytes", whole.len())),
                "{error}"
            );
        }
    }
    fs::write(&small.path, [&whole[..], b"x"].concat()).unwrap();
    assert!(matches!(small.open().err(), Some(ImageError::Damaged { .. })));
}

#[test]
fn a_file_cut_while_open_is_an_error_not_a_signal() {
    let small = small();
    let image = small.open().unwrap();
    let file = fs::OpenOptions::new().write(true).open(&small.path).unwrap();
    file.set_len(SUPERBLOCK_BYTES as u64).unwrap();
    assert!(matches!(image.find(page(0, 0)), Err(ImageError::Damaged { .. })));
    assert!(image.sections().is_err());
    assert!(!verify(&image, |_, _| {}).unwrap().is_whole());
}

/// Bytes of a small image are changed in turn, all at the start of each 4 KiB and
/// every seventh elsewhere: opening or verifying says so, or all that is read is as before (padding; a bit of a zstd frame that the
/// decompressor ignores). No wrong page is ever given.
#[test]
fn a_changed_byte_is_found_wherever_it_is() {
    let small = small();
    let expected = expected(&small.memory);
    let file = fs::OpenOptions::new().read(true).write(true).open(&small.path).unwrap();
    let tables = small.open().unwrap().own().superblock.region(Region::ChunkTable).offset;
    let len = file.metadata().unwrap().len();
    for at in (0..len).filter(|at| at % 4096 < 300 || at % 7 == 0) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << (at % 8))], at).unwrap();
        if let Ok(image) = small.open() {
            let whole = verify(&image, |_, _| {}).unwrap().is_whole();
            let (pages, found) = (read_all(&image), image.sections());
            assert_eq!(whole, pages.is_ok() && found.is_ok(), "byte {at}");
            assert!(!whole || (SUPERBLOCK_BYTES as u64..tables).contains(&at), "byte {at}");
            assert!(pages.is_err() || pages.unwrap() == expected, "byte {at} changes a page");
            assert!(found.is_err() || found.unwrap() == sections(), "byte {at}: section");
        }
        file.write_all_at(&byte, at).unwrap();
    }
    assert!(verify(&small.open().unwrap(), |_, _| {}).unwrap().is_whole());
}

#[test]
fn other_files_are_told_apart() {
    let small = small();
    small.edit_superblock(|head| put(head, VERSION_OFFSET, &2u32.to_le_bytes()));
    let error = small.open().err().unwrap();
    assert!(matches!(error, ImageError::NewerVersion { version: 2, .. }), "{error}");

    let path = small.directory.path().join("other");
    fs::write(&path, [b'x'; 5000]).unwrap();
    assert!(matches!(Image::open(&path).err(), Some(ImageError::NotAnImage(_))));
    fs::write(&path, [0; 5000]).unwrap();
    assert!(matches!(Image::open(&path).err(), Some(ImageError::Unfinished(_))));
    let error = Image::open(small.directory.path()).err();
    assert!(matches!(error, Some(ImageError::NotRegular(_))), "{error:?}");
    let fifo = small.directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(Image::open(&fifo).err(), Some(ImageError::NotRegular(_))));
    let link = small.directory.path().join("link");
    symlink("nowhere", &link).unwrap();
    assert!(matches!(Image::open(&link).err(), Some(ImageError::Io { .. })));
}

#[test]
fn unknown_features_are_refused_or_ignored_by_their_kind() {
    let small = small();
    small.edit_superblock(|head| put(head, COMPATIBLE_OFFSET, &u64::MAX.to_le_bytes()));
    assert!(read_all(&small.open().unwrap()).unwrap() == expected(&small.memory));
    small.edit_superblock(|head| put(head, INCOMPATIBLE_OFFSET, &8u64.to_le_bytes()));
    let error = small.open().err().unwrap();
    assert!(matches!(error, ImageError::UnknownFeatures { bits: 8, .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// A superblock whose checksum is right may still say anything.
    #[test]
    fn a_hostile_superblock_does_no_harm(
        at in 12..240usize,
        values in vec(prop_oneof![any::<u64>(), 0..300u64, (0..64u32).prop_map(|s| 1 << s)], 1..4),
    ) {
        let small = small();
        small.edit_superblock(|head| {
            for (n, value) in values.iter().enumerate() {
                put(head, at + 8 * n, &value.to_le_bytes());
            }
        });
        if let Ok(image) = small.open() {
            let _ = verify(&image, |_, _| {}).unwrap();
            let _ = read_all(&image);
        }
    }

    /// So may the tables.
    #[test]
    fn hostile_tables_do_no_harm(
        index in any::<bool>(),
        at in 0..4080usize,
        value in any::<[u8; 8]>(),
        few in 1..8usize,
    ) {
        let small = small();
        let region = if index { Region::PageIndex } else { Region::ChunkTable };
        // Mostly where there are entries.
        let at = if at % 4 > 0 { at % 280 } else { at };
        small.edit_table(region, |piece| put(piece, at, &value[..few]));
        let image = small.open().unwrap();
        let report = verify(&image, |_, _| {}).unwrap();
        let pages = read_all(&image);
        if report.is_whole() {
            prop_assert!(pages.is_ok());
        }
        prop_assert!(pages.is_err() || index || pages.unwrap() == expected(&small.memory));
    }
}

#[test]
fn each_kind_of_bad_entry_is_named() {
    let stored = |chunk, slot| PageEntry::Stored { layer: 0, chunk, slot }.encode();
    for (raw, problem) in [
        (0, "never written"),
        (7, "kind 7 is not known"),
        (1 | 1 << 8, "stray bits"),
        (stored(0, 0) | 1 << 16, "layer 1, of 0"),
        (stored(1 << 39, 0), "does not exist"),
        (stored(0, 63), "not a page 63"),
    ] {
        let small = small();
        small.edit_table(Region::PageIndex, |piece| put(piece, 8, &raw.to_le_bytes()));
        let image = small.open().unwrap();
        let error = image.find(page(0, 1)).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
        assert!(error.contains("\"pc.ram\", offset 0x1000"), "{error}");
        let report = verify(&image, |_, _| {}).unwrap();
        let range = DamagedRange { block: "pc.ram".into(), offset: 4096, len: 4096 };
        assert_eq!(report.damages.len(), 1);
        assert_eq!(report.damages[0].ranges, [range]);
    }
    for (at, bytes, problem) in [
        (CHUNK_CODEC_OFFSET, &[9][..], "codec 9"),
        (CHUNK_PAGES_IN_OFFSET, &[0], "it has 0 pages"),
        (CHUNK_PAGES_IN_OFFSET, &[5], "it has 5 pages"),
        (CHUNK_STORED_LEN_OFFSET, &[0, 0, 0, 0], "0 stored bytes"),
        (CHUNK_STORED_LEN_OFFSET, &[255, 255, 255, 255], "4294967295 stored bytes"),
        (CHUNK_FILE_OFFSET, &[0; 8], "within the data region"),
        (CHUNK_FILE_OFFSET, &[255; 8], "within the data region"),
    ] {
        let small = small();
        small.edit_table(Region::ChunkTable, |piece| put(piece, at, bytes));
        let image = small.open().unwrap();
        let report = verify(&image, |_, _| {}).unwrap();
        assert!(report.damages[0].error.to_string().contains(problem), "{:?}", report.damages);
        assert!(report.damages[0].bytes > 0);
        assert!(read_all(&image).unwrap_err().to_string().contains(problem));
    }
}

#[test]
fn verify_names_the_guest_memory_that_a_bad_chunk_costs() {
    let small = Small::write(options(4, Compression::None));
    let superblock = small.open().unwrap().own().superblock.clone();
    small.edit(|bytes| {
        for at in (superblock.region(Region::Data).offset as usize..).step_by(PAGE_SIZE).take(2) {
            bytes[at] ^= 1;
        }
    });
    let image = small.open().unwrap();
    let mut last = (0, 0);
    let report = verify(&image, |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    })
    .unwrap();
    assert_eq!(last.0, last.1);
    assert!(!report.is_whole());
    for damage in &report.damages {
        assert!(matches!(damage.error, ImageError::Chunk { .. }), "{}", damage.error);
        for range in &damage.ranges {
            let number = image.blocks().iter().position(|b| b.name == range.block).unwrap() as u16;
            for at in (range.offset..range.offset + range.len).step_by(PAGE_SIZE) {
                let page = page(number, at / PAGE_SIZE as u64);
                let Location::Stored { chunk, .. } = image.find(page).unwrap() else { panic!() };
                assert!(image.reader().unwrap().read(chunk).is_err());
            }
        }
    }
    let bytes: u64 = report.damages.iter().map(|damage| damage.bytes).sum();
    let readable = |(page, _): &(&Page, &u32)| match image.find(**page).unwrap() {
        Location::Zero => true,
        Location::Stored { chunk, .. } => image.reader().unwrap().read(chunk).is_ok(),
    };
    let lost = small.memory.iter().filter(|entry| !readable(entry)).count();
    assert_eq!(bytes, (lost * PAGE_SIZE) as u64);
}

#[test]
fn a_wholly_damaged_image_makes_a_short_report() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let blocks = vec![block("a", 700), block("b", 700)];
    let mut writer = ImageWriter::create(&path, options(1, Compression::None), blocks).unwrap();
    for at in 0..700 {
        writer.page(page(1, at), &contents(4 * at as u32 + 1)).unwrap();
        writer.page(page(0, at), &contents(4 * at as u32 + 3)).unwrap();
    }
    writer.finish(details(), sections()).unwrap();
    let image = Image::open(&path).unwrap();
    let data = image.own().superblock.region(Region::Data);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&vec![1; data.len as usize], data.offset).unwrap();
    let report = verify(&image, |_, _| {}).unwrap();
    assert_eq!(report.damages.len(), MAX_DAMAGES);
    assert_eq!(report.damages.len() as u64 + report.more_damages, 1400);

    // A piece of the page index costs the pages it speaks of, in both blocks.
    let at = image.own().superblock.region(Region::PageIndex).offset + PIECE_BYTES as u64;
    file.write_all_at(&[0xff], at).unwrap();
    file.write_all_at(&[0; 1], data.offset).unwrap();
    let image = Image::open(&path).unwrap();
    assert!(image.find(page(0, 510)).is_ok());
    for lost in [page(0, 511), page(1, 0)] {
        let error = image.find(lost).unwrap_err().to_string();
        assert!(error.contains("page index piece 1"), "{error}");
    }
}

#[test]
fn a_table_piece_of_another_place_does_not_pass() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let mut writer =
        ImageWriter::create(&path, options(1, Compression::None), vec![block("ram", 2000)])
            .unwrap();
    for at in 0..2000 {
        writer.zero(page(0, at)).unwrap();
    }
    writer.finish(details(), sections()).unwrap();
    let at = Image::open(&path).unwrap().own().superblock.region(Region::PageIndex).offset;
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // The first two pieces hold the same entries.
    let mut piece = [0; PIECE_BYTES];
    file.read_exact_at(&mut piece, at).unwrap();
    file.write_all_at(&piece, at + PIECE_BYTES as u64).unwrap();
    let image = Image::open(&path).unwrap();
    assert!(image.find(page(0, 510)).is_ok());
    assert!(matches!(image.find(page(0, 511)), Err(ImageError::Damaged { .. })));
    let report = verify(&image, |_, _| {}).unwrap();
    let range = DamagedRange { block: "ram".into(), offset: 511 * 4096, len: 511 * 4096 };
    assert_eq!(report.damages[0].ranges, [range]);
}

#[test]
fn a_hostile_manifest_is_refused() {
    type Change = fn(&mut serde_json::Value);
    let changes: [(Change, &str); 6] = [
        (|json| json["blocks"][0]["len"] = 4097.into(), "not a multiple"),
        (|json| json["blocks"][0]["len"] = (1u64 << 63).into(), "more than"),
        (|json| json["blocks"][0]["len"] = 4096.into(), "the page index has 42"),
        (|json| json["blocks"][0]["page_size"] = 3.into(), "not a power of two"),
        (|json| json["blocks"] = serde_json::Value::Null, "invalid type"),
        (|json| json["identity"] = "00000000-0000-0000-0000-000000000000".into(), "another image"),
    ];
    for (change, problem) in changes {
        let small = small();
        let superblock = small.open().unwrap().own().superblock.clone();
        let extent = superblock.region(Region::Manifest);
        let bytes = fs::read(&small.path).unwrap();
        let old = &bytes[extent.offset as usize..extent.end().unwrap() as usize];
        let mut json = serde_json::from_slice(old).unwrap();
        change(&mut json);
        // The new one stands behind everything else.
        let new = serde_json::to_vec(&json).unwrap();
        small.edit(|bytes| bytes.extend(&new));
        small.edit_superblock(|head| {
            let mut superblock = superblock.clone();
            superblock.regions[Region::Manifest as usize] = Extent {
                offset: superblock.file_len,
                len: new.len() as u64,
                checksum: Region::Manifest.checksum(superblock.identity, &new),
            };
            superblock.file_len += new.len() as u64;
            *head = superblock.encode();
        });
        let error = small.open().err().expect(problem).to_string();
        assert!(error.contains(problem), "{error}");
    }
}

/// Says it is huge, and is sparse: opening takes neither time nor memory for it.
#[test]
fn a_huge_image_opens_at_once() {
    let small = small();
    let mut superblock = small.open().unwrap().own().superblock.clone();
    let pages = 1u64 << 30; // 4 TiB of guest memory
    let manifest = {
        let mut manifest = small.open().unwrap().manifest().clone();
        manifest.blocks = vec![block("ram", pages)];
        serde_json::to_vec(&manifest).unwrap()
    };
    let index = Extent {
        offset: superblock.file_len.next_multiple_of(4096),
        len: table_bytes(Region::PageIndex, pages),
        checksum: 0,
    };
    let checksum = Region::Manifest.checksum(superblock.identity, &manifest);
    superblock.page_count = pages;
    superblock.regions[Region::PageIndex as usize] = index;
    superblock.regions[Region::Manifest as usize] =
        Extent { offset: index.end().unwrap(), len: manifest.len() as u64, checksum };
    superblock.file_len = index.end().unwrap() + manifest.len() as u64;
    let file = fs::OpenOptions::new().write(true).open(&small.path).unwrap();
    file.write_all_at(&manifest, index.end().unwrap()).unwrap();
    file.write_all_at(&superblock.encode(), 0).unwrap();
    let image = small.open().unwrap();
    for number in [0, pages / 2, pages - 1] {
        assert!(matches!(image.find(page(0, number)), Err(ImageError::Damaged { .. })));
    }
}

// The files of old.

fn checked_in() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/v1.snap")
}

/// An image of version 1 opens for ever.
#[test]
fn the_image_of_version_1_opens() {
    let image = Image::open(checked_in()).unwrap();
    assert_eq!(image.manifest().machine, details().machine);
    assert_eq!(image.manifest().moment_unix_us, details().moment_unix_us);
    assert_eq!(image.sections().unwrap(), sections());
    let report = verify(&image, |_, _| {}).unwrap();
    assert!(report.is_whole(), "{:?}", report.damages);
    let pages = read_all(&image).unwrap();
    assert_eq!(pages.len(), 42);
    for (page, bytes) in pages {
        let seed = small_seed(page.block.0, page.number);
        assert!(bytes == contents(seed), "{page:?}");
    }
}

/// Makes that image. Only for a new version, under a new name:
/// `cargo test --lib make_the_checked_in_image -- --ignored`
#[test]
#[ignore = "makes tests/data/v1.snap, which exists"]
fn make_the_checked_in_image() {
    fs::create_dir_all(checked_in().parent().unwrap()).unwrap();
    write_small(&checked_in(), options(4, Compression::Zstd(3)));
}

#[test]
fn an_index_beyond_this_host_is_refused() {
    let path = Path::new("vm.snap");
    check_index(path, (64 << 30) / PAGE_SIZE as u64).unwrap();
    let error = check_index(path, 1 << 50).unwrap_err();
    assert!(matches!(error, ImageError::IndexTooLarge { .. }), "{error}");
}
