//! The memory engine on real memory, under a real userfaultfd: no page is wrong, missing or
//! overwritten, no thread waits forever, and no error is lost.

#[path = "harness/mod.rs"]
mod harness;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use harness::{Backing, Engine, HugePages, Pattern, Ram, Random, write_image};
use snapback::host::procfs::Pagemap;
use snapback::image::{Compression, Image};
use snapback::memory::{MemoryError, Pace, preload};
use snapback::page::{
    Block, BlockId, ChunkId, ChunkReader, Location, PAGE_SIZE, Page, PageSource, SourceError,
};

/// Longer than anything here takes: a test that waits so long has failed.
const FOREVER: Duration = Duration::from_secs(60);

const WORDS: usize = PAGE_SIZE / 8;

fn page(block: u16, number: u64) -> Page {
    Page { block: BlockId(block), number }
}

/// What a guest writes to a page: nothing that a pattern holds.
fn written(page: Page) -> u64 {
    0xaaaa_0000_0000_0000 | u64::from(page.block.0) << 32 | page.number << 1
}

/// A guest's thread: touches every page in an order of its own. Some pages are its own to
/// write to, in the first word; whatever else it sees must be the pattern, or what the
/// page's owner has written.
fn run_guest(ram: &Ram, pattern: &Pattern, thread: u64, threads: u64, seed: u64) {
    let pages = ram.pages();
    let owns = |at: u64| at.is_multiple_of(4) && at / 4 % threads == thread;
    for at in Random::new(seed ^ thread << 32).order(pages.len() as u64) {
        let page = pages[at as usize];
        if owns(at) {
            ram.word(page, 0).store(written(page), Ordering::Relaxed);
        }
        let first = ram.word(page, 0).load(Ordering::Relaxed);
        let fits = match owns(at) {
            true => first == written(page),
            false => first == pattern.word(page, 0) || first == written(page),
        };
        assert!(fits, "{page:?} begins with {first:#x}");
        for index in [1, WORDS / 2, WORDS - 1] {
            let word = ram.word(page, index).load(Ordering::Relaxed);
            assert_eq!(word, pattern.word(page, index), "{page:?} word {index}");
        }
    }
}

/// Every page is what it should be after some guests' threads have run.
fn check_all(ram: &Ram, pattern: &Pattern, written_to: bool) {
    for (at, page) in ram.pages().into_iter().enumerate() {
        let mut expected = pattern.page(page);
        if written_to && at.is_multiple_of(4) {
            expected[..8].copy_from_slice(&written(page).to_le_bytes());
        }
        assert!(ram.read(page) == expected, "{page:?} is wrong");
    }
}

/// Guests, prefetch and handlers all at once, until all memory is there.
fn bring_back(
    ram: &Arc<Ram>,
    pattern: &Pattern,
    source: Arc<dyn PageSource>,
    guests: u64,
    fillers: usize,
    handlers: usize,
    seed: u64,
) {
    thread::scope(|scope| {
        // Dropped before the scope ends, whatever happens: that frees who waits.
        let mut engine = Engine::new(ram, source);
        (0..handlers).for_each(|_| engine.start_fault_handler());
        let guests: Vec<_> = (0..guests)
            .map(|n| scope.spawn(move || run_guest(ram, pattern, n, guests, seed)))
            .collect();
        if fillers > 0 {
            engine.fill(fillers, &Pace::new(None)).unwrap();
        }
        for guest in guests {
            guest.join().unwrap();
        }
        assert!(engine.memory.wait_complete(FOREVER), "{:?}", engine.memory.counts());
        assert_eq!(engine.memory.counts().present, engine.memory.counts().total);
        for report in engine.stop_fault_handlers() {
            report.unwrap();
        }
        check_all(ram, pattern, !guests_are_none(seed));
    });
}

/// Seed 0 is for runs without guests.
fn guests_are_none(seed: u64) -> bool {
    seed == 0
}

/// Blocks of both usual kinds, two of them alike, one shorter than a chunk.
const BLOCKS: [(Backing, u64); 5] = [
    (Backing::Anonymous, 700),
    (Backing::Memfd, 512),
    (Backing::Anonymous, 3),
    (Backing::Anonymous, 700),
    (Backing::Memfd, 130),
];

#[test]
fn every_page_is_right_whoever_brings_it() {
    for seed in 1..=12 {
        let ram = Arc::new(Ram::new(&BLOCKS).unwrap());
        let pattern = Pattern::new(ram.blocks(), 1 << (seed % 7));
        let (guests, fillers, handlers) = (1 + seed % 4, 1 + seed as usize / 2 % 4, 1 + seed % 2);
        let source = Arc::new(pattern.clone());
        bring_back(&ram, &pattern, source, guests, fillers, handlers as usize, seed);
    }
}

#[test]
fn every_page_is_right_from_an_image() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, compression) in [(1, Compression::None), (2, Compression::Zstd(1))] {
        for chunk_pages in [1, 16, 64] {
            let ram = Arc::new(Ram::new(&BLOCKS).unwrap());
            let pattern = Pattern::new(ram.blocks(), chunk_pages);
            let path = folder.path().join(format!("{seed}-{chunk_pages}.snap"));
            let image = write_image(&pattern, &path, compression);
            bring_back(&ram, &pattern, Arc::new(image), 3, 2, 2, seed);
        }
    }
}

/// The chunks of a block's first pages, each with its length in bytes.
fn first_chunks(source: &dyn PageSource, pages: u64) -> Vec<(ChunkId, usize)> {
    let mut chunks: Vec<(ChunkId, usize)> = Vec::new();
    for number in 0..pages {
        let Ok(Location::Stored { chunk, .. }) = source.locate(page(0, number)) else { continue };
        match chunks.last_mut() {
            Some((last, len)) if *last == chunk => *len += PAGE_SIZE,
            _ => chunks.push((chunk, PAGE_SIZE)),
        }
    }
    chunks
}

#[test]
fn chunks_side_by_side_are_read_in_one_go_up_to_the_one_that_is_broken() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plain.snap");
    let ram = Ram::new(&[(Backing::Anonymous, 256)]).unwrap();
    let pattern = Pattern::new(ram.blocks(), 4).dense();
    let image = write_image(&pattern, &path, Compression::None);
    let chunks = first_chunks(&image, 256);
    let mut bytes = vec![0; 256 * PAGE_SIZE];

    let read = image.reader().unwrap().read_run(&chunks, &mut bytes).unwrap();
    assert_eq!(read, 16, "256 KiB of 1 MiB");
    for (number, found) in bytes.chunks_exact(PAGE_SIZE).take(read * 4).enumerate() {
        assert!(found == pattern.page(page(0, number as u64)), "page {number} is wrong");
    }
    // One that is shorter than it should be ends the run, or is none.
    let mut other = chunks.clone();
    other[5].1 = PAGE_SIZE;
    assert_eq!(image.reader().unwrap().read_run(&other, &mut bytes).unwrap(), 5);
    assert_eq!(image.reader().unwrap().read_run(&other[5..], &mut bytes).unwrap(), 0);

    // Damage ends it too, and is told of when its turn comes.
    let mut file = std::fs::read(&path).unwrap();
    let third = pattern.page(page(0, 2 * 4));
    let at = file.windows(PAGE_SIZE).position(|window| window == third).unwrap();
    file[at + 7] ^= 1;
    let damaged = folder.path().join("damaged.snap");
    std::fs::write(&damaged, file).unwrap();
    let image = Image::open(&damaged).unwrap();
    let mut reader = image.reader().unwrap();
    assert_eq!(reader.read_run(&chunks, &mut bytes).unwrap(), 2);
    let error = reader.read_run(&chunks[2..], &mut bytes).unwrap_err().to_string();
    assert!(error.contains("chunk 2") && error.contains("checksum"), "{error}");
    assert_eq!(reader.read_run(&chunks[3..], &mut bytes).unwrap(), 16);
}

#[test]
fn a_page_is_known_to_be_zero_without_being_located() {
    let folder = tempfile::tempdir().unwrap();
    let ram = Ram::new(&BLOCKS).unwrap();
    let pattern = Pattern::new(ram.blocks(), 4);
    let image = write_image(&pattern, &folder.path().join("vm.snap"), Compression::None);
    for page in ram.pages() {
        assert_eq!(image.is_zero(page), pattern.is_zero(page), "{page:?}");
    }
    assert!(!image.is_zero(page(9, 0)));
}

#[test]
fn prefetch_alone_brings_everything_and_so_do_faults_alone() {
    let ram = Arc::new(Ram::new(&BLOCKS).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16);
    bring_back(&ram, &pattern, Arc::new(pattern.clone()), 0, 3, 1, 0);
    // Guests touch every page, so that nothing is left to bring.
    let ram = Arc::new(Ram::new(&BLOCKS).unwrap());
    bring_back(&ram, &pattern, Arc::new(pattern.clone()), 4, 0, 2, 5);
}

#[test]
fn huge_pages_are_whole_beside_small_ones() {
    let _huge = HugePages::new(6).expect("root, and room for 6 huge pages");
    let blocks = [
        (Backing::Huge, 1024),
        (Backing::Anonymous, 300),
        (Backing::Huge, 1024),
        (Backing::Memfd, 1024),
    ];
    for seed in 1..=6 {
        let ram = Arc::new(Ram::new(&blocks).unwrap());
        let pattern = Pattern::new(ram.blocks(), 16);
        bring_back(&ram, &pattern, Arc::new(pattern.clone()), 3, seed as usize % 3, 2, seed);
    }
}

#[test]
fn a_teardown_at_any_point_frees_everybody_and_leaves_no_wrong_page() {
    for seed in 1..=12 {
        let ram = Arc::new(Ram::new(&BLOCKS).unwrap());
        let pattern = Pattern::new(ram.blocks(), 16);
        let total = ram.pages().len() as u64;
        let stop_at = Random::new(seed).below(total);
        let torn_down = AtomicBool::new(false);
        thread::scope(|scope| {
            let mut engine = Engine::new(&ram, Arc::new(pattern.clone()));
            engine.start_fault_handler();
            engine.start_fault_handler();
            let pace = Pace::new(None);
            for guest in 0..3 {
                let (ram, pattern, torn_down) = (&ram, &pattern, &torn_down);
                scope.spawn(move || {
                    let pages = ram.pages();
                    for at in Random::new(seed << 8 | guest).order(total) {
                        let page = pages[at as usize];
                        let word = ram.word(page, 0).load(Ordering::Acquire);
                        // What was missing when the userfaultfd was closed is zeros.
                        let freed = word == 0 && torn_down.load(Ordering::Acquire);
                        assert!(freed || word == pattern.word(page, 0), "{page:?}: {word:#x}");
                    }
                });
            }
            thread::scope(|fillers| {
                let filler = fillers.spawn(|| engine.fill(2, &pace));
                while engine.memory.counts().present < stop_at {
                    thread::yield_now();
                }
                pace.stop();
                filler.join().unwrap().unwrap();
            });
            for report in engine.stop_fault_handlers() {
                report.unwrap();
            }
            torn_down.store(true, Ordering::Release);
        });
    }
}

#[test]
fn a_fault_handler_hears_that_it_shall_stop_while_faults_keep_coming() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 64)]).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16).dense();
    let mut engine = Engine::new(&ram, Arc::new(pattern.clone()));
    engine.fill(1, &Pace::new(None)).unwrap();
    // Nobody told the engine: it wakes whoever asks for this page, who asks again.
    ram.give_back(page(0, 7), 1);
    engine.start_fault_handler();
    let guest = thread::spawn({
        let ram = Arc::clone(&ram);
        move || ram.word(page(0, 7), 0).load(Ordering::Relaxed)
    });
    while engine.memory.counts().requests < 1000 {
        thread::yield_now();
    }
    for report in engine.stop_fault_handlers() {
        report.unwrap();
    }
    drop(engine);
    assert_eq!(guest.join().unwrap(), 0);
}

#[test]
fn a_chunk_that_is_broken_is_a_loud_failure_of_whoever_needs_it() {
    let broken = page(0, 700);
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 2048), (Backing::Memfd, 512)]).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16).dense();
    let source = Arc::new(pattern.clone().broken_at(broken));
    let mut engine = Engine::new(&ram, source);

    // Prefetch brings the windows of 2 MiB in which nothing is broken, and fails then.
    let error = engine.fill(2, &Pace::new(None)).unwrap_err();
    let offset = 700 / 16 * 16 * PAGE_SIZE;
    let expected = format!(
        "the memory at offset {offset:#x} of block `Anonymous 0` can't be had: this chunk is broken"
    );
    assert_eq!(error.to_string(), expected);
    assert!(engine.memory.counts().present >= 2048);
    assert!(!engine.memory.wait_complete(Duration::ZERO));

    // A fault on it ends the fault handler, and the page stays missing rather than wrong.
    for _ in 0..2 {
        engine.start_fault_handler();
        let guest = thread::spawn({
            let ram = Arc::clone(&ram);
            move || ram.word(broken, 0).load(Ordering::Relaxed)
        });
        let reports = engine.join_fault_handlers();
        let error = reports.into_iter().next().unwrap().unwrap_err();
        assert!(matches!(&error, MemoryError::Source { block, .. } if block == "Anonymous 0"));
        assert!(!guest.is_finished());
        // Who asked is not forgotten because somebody has failed: it's loud every time.
        assert_eq!(engine.fill(2, &Pace::new(None)).unwrap_err().to_string(), expected);
        // The guest's event is gone with the handler that took it; the next one gets its own.
        engine.uffd.wake(ram.address(broken.block) + broken.offset(), PAGE_SIZE as u64).unwrap();
        drop(guest);
    }
    for page in ram.pages().into_iter().filter(|p| p.block.0 == 1 || p.number < 512) {
        assert!(ram.read(page) == pattern.page(page), "{page:?} is wrong");
    }
    // Dropping the engine frees the guests.
}

/// A source whose first read of one chunk takes until it is let go, as if from a slow disk.
struct Slow {
    pattern: Pattern,
    chunk: ChunkId,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    reached: AtomicBool,
    open: AtomicBool,
}

struct SlowReader {
    reader: Box<dyn ChunkReader>,
    chunk: ChunkId,
    gate: Arc<Gate>,
}

impl PageSource for Slow {
    fn blocks(&self) -> &[Block] {
        self.pattern.blocks()
    }

    fn chunk_pages(&self) -> usize {
        self.pattern.chunk_pages()
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        self.pattern.locate(page)
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        let (reader, gate) = (self.pattern.reader()?, Arc::clone(&self.gate));
        Ok(Box::new(SlowReader { reader, chunk: self.chunk, gate }))
    }
}

impl ChunkReader for SlowReader {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        if chunk == self.chunk && !self.gate.reached.swap(true, Ordering::AcqRel) {
            while !self.gate.open.load(Ordering::Acquire) {
                thread::yield_now();
            }
        }
        self.reader.read(chunk)
    }
}

#[test]
fn memory_is_filled_while_a_fault_waits_for_a_slow_disk() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 1024)]).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16).dense();
    let slow = page(0, 100);
    let Ok(Location::Stored { chunk, .. }) = pattern.locate(slow) else { panic!("not stored") };
    let gate = Arc::new(Gate::default());
    let source = Slow { pattern: pattern.clone(), chunk, gate: Arc::clone(&gate) };
    let mut engine = Engine::new(&ram, Arc::new(source));
    engine.start_fault_handler();
    thread::scope(|scope| {
        let guest = scope.spawn(|| ram.word(slow, 0).load(Ordering::Relaxed));
        while !gate.reached.load(Ordering::Acquire) {
            thread::yield_now();
        }
        let filler = scope.spawn(|| engine.fill(2, &Pace::new(None)));
        while engine.memory.counts().present < 1023 {
            thread::yield_now();
        }
        gate.open.store(true, Ordering::Release);
        filler.join().unwrap().unwrap();
        assert_eq!(guest.join().unwrap(), pattern.word(slow, 0));
    });
    assert!(engine.memory.wait_complete(FOREVER));
    check_all(&ram, &pattern, false);
}

/// A byte a second: who is held back by that waits for longer than any test.
const HARDLY: Option<u64> = Some(1);

/// Pages of the largest piece that is read and installed at once.
const PIECE: u64 = 64;

#[test]
fn a_rate_holds_back_what_nobody_waits_for() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 8192)]).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16);
    let (zeros, data): (Vec<Page>, Vec<Page>) =
        ram.pages().into_iter().partition(|page| pattern.is_zero(*page));
    let pace = Pace::new(HARDLY);
    let mut engine = Engine::new(&ram, Arc::new(pattern.clone()));
    engine.start_fault_handler();
    thread::scope(|scope| {
        let filler = scope.spawn(|| engine.fill(2, &pace));
        // Zeros are read from nowhere: all of them come.
        while engine.memory.counts().present < zeros.len() as u64 {
            thread::yield_now();
        }
        for page in &zeros {
            assert_eq!(ram.word(*page, 0).load(Ordering::Relaxed), 0);
        }
        // Faults are answered, and a set that the guest waits for comes as a whole.
        for page in data.iter().step_by(200) {
            assert_eq!(ram.word(*page, 0).load(Ordering::Relaxed), pattern.word(*page, 0));
        }
        preload(&engine.memory, &data[..1000], &pace).unwrap();
        let counts = engine.memory.counts();
        let waited_for = counts.demanded + 1000 + 16;
        let most = zeros.len() as u64 + waited_for + 2 * PIECE;
        assert!(counts.present <= most, "{counts:?}, {most} at most");
        pace.hurry();
        filler.join().unwrap().unwrap();
    });
    assert!(engine.memory.wait_complete(FOREVER));
    check_all(&ram, &pattern, false);
}

/// A huge page's worth of zeros takes no page, and is zeros to whoever touches it, before and
/// after memory is let go. What is written there stays.
#[test]
fn long_zeros_are_left_to_the_kernel() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 2048), (Backing::Memfd, 2048)]).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16);
    let mut engine = Engine::new(&ram, Arc::new(pattern.clone()));
    engine.start_fault_handler();
    engine.fill(1, &Pace::new(None)).unwrap();
    assert!(engine.memory.wait_complete(FOREVER));
    let pagemap = Pagemap::open(std::process::id() as i32).unwrap();
    let is_present = |page: Page| pagemap.is_present(ram.address(page.block) + page.offset());
    let is_long = |page: &Page| (512..1024).contains(&page.number);
    for page in ram.pages() {
        assert_eq!(is_present(page), !is_long(&page), "{page:?}");
    }
    for page in ram.pages().into_iter().filter(is_long).step_by(100) {
        assert_eq!(ram.word(page, 0).load(Ordering::Relaxed), 0);
        ram.word(page, 0).store(written(page), Ordering::Relaxed);
    }
    drop(engine);
    for (at, page) in ram.pages().into_iter().filter(is_long).enumerate() {
        let expected = if at.is_multiple_of(100) { written(page) } else { 0 };
        assert_eq!(ram.word(page, 0).load(Ordering::Relaxed), expected, "{page:?}");
    }
}

/// Threads that read memory at their leisure see no page change, whoever else asks for it.
#[test]
fn pages_never_change_once_they_are_there() {
    let ram = Arc::new(Ram::new(&[(Backing::Anonymous, 2048)]).unwrap());
    let pattern = Pattern::new(ram.blocks(), 16);
    let reads = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut engine = Engine::new(&ram, Arc::new(pattern.clone()));
        engine.start_fault_handler();
        engine.start_fault_handler();
        for guest in 0..2 {
            let (ram, pattern, reads, done) = (&ram, &pattern, &reads, &done);
            scope.spawn(move || {
                let mut random = Random::new(guest);
                while !done.load(Ordering::Relaxed) {
                    // Few pages, so that both ask for the same ones at once.
                    let page = page(0, random.below(64) * 32);
                    let word = ram.word(page, WORDS - 1).load(Ordering::Relaxed);
                    if word != pattern.word(page, WORDS - 1) {
                        done.store(true, Ordering::Relaxed);
                        panic!("{page:?} ends with {word:#x}");
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        engine.fill(2, &Pace::new(None)).unwrap();
        let enough = reads.load(Ordering::Relaxed) + 10_000;
        while reads.load(Ordering::Relaxed) < enough && !done.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
}
