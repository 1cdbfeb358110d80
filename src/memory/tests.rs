//! The engine against a source and a transport that live in this process:
//! every page arrives once, whole and right, whoever brings it.

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::page::{ChunkId, ChunkReader, Location, PAGE_SIZE, Page};

/// Memory whose bytes follow from their place; every third group of pages is zero,
/// and chunks hold the pages of a group in reverse order.
struct Computed {
    blocks: Vec<Block>,
    chunk_pages: usize,
    /// A chunk that can't be read.
    broken: Option<ChunkId>,
    /// Whether it can be by now.
    repaired: Arc<AtomicBool>,
}

impl Computed {
    fn of(blocks: Vec<Block>, chunk_pages: usize) -> Computed {
        Computed { blocks, chunk_pages, broken: None, repaired: Arc::default() }
    }

    fn group(&self, page: Page) -> u64 {
        page.number / self.chunk_pages as u64
    }

    fn chunk(&self, page: Page) -> ChunkId {
        ChunkId((u64::from(page.block.0) << 32) | self.group(page))
    }

    fn expected(&self, page: Page) -> [u8; PAGE_SIZE] {
        match self.group(page) % 3 {
            2 => [0; PAGE_SIZE],
            _ => pattern(page),
        }
    }
}

fn pattern(page: Page) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let seed = (page.number << 20) ^ (u64::from(page.block.0) << 56) ^ i as u64 ^ 1 << 50;
        word.copy_from_slice(&seed.to_le_bytes());
    }
    bytes
}

impl PageSource for Computed {
    fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    fn chunk_pages(&self) -> usize {
        self.chunk_pages
    }

    fn locate(&self, page: Page) -> Result<Location, SourceError> {
        let in_group = (page.number % self.chunk_pages as u64) as usize;
        Ok(match self.group(page) % 3 {
            2 => Location::Zero,
            _ => {
                Location::Stored { chunk: self.chunk(page), slot: self.chunk_pages - 1 - in_group }
            }
        })
    }

    fn reader(&self) -> Result<Box<dyn ChunkReader>, SourceError> {
        let (pages, broken) = (self.chunk_pages as u64, self.broken);
        let repaired = Arc::clone(&self.repaired);
        Ok(Box::new(ComputedReader { pages, broken, repaired, bytes: Vec::new() }))
    }
}

struct ComputedReader {
    pages: u64,
    broken: Option<ChunkId>,
    repaired: Arc<AtomicBool>,
    bytes: Vec<u8>,
}

impl ChunkReader for ComputedReader {
    fn read(&mut self, chunk: ChunkId) -> Result<&[u8], SourceError> {
        if self.broken == Some(chunk) && !self.repaired.load(Ordering::Acquire) {
            return Err("this chunk is broken".into());
        }
        let block = BlockId((chunk.0 >> 32) as u16);
        let first = (chunk.0 & 0xffff_ffff) * self.pages;
        self.bytes.clear();
        for number in (first..first + self.pages).rev() {
            self.bytes.extend_from_slice(&pattern(Page { block, number }));
        }
        Ok(&self.bytes)
    }
}

/// Memory of this process, which refuses a page that it already has.
#[derive(Default)]
struct Shelf {
    pages: Mutex<std::collections::HashMap<(String, u64), Vec<u8>>>,
}

impl Transport for Arc<Shelf> {
    fn copy(&self, block: &Block, run: Run, bytes: &[u8]) -> Result<(), TransportError> {
        assert_eq!(run.first % block.pages_per_host_page(), 0, "a host page was cut");
        let mut pages = self.pages.lock().unwrap();
        for (page, bytes) in run.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
            let old = pages.insert((block.name.clone(), page.number), bytes.to_vec());
            assert!(old.is_none(), "{run} was installed twice");
        }
        Ok(())
    }

    fn zero(&self, block: &Block, run: Run) -> Result<(), TransportError> {
        self.copy(block, run, &vec![0; run.bytes() as usize])
    }

    fn step_pages(&self, _block: BlockId) -> u64 {
        16
    }
}

/// Memory of which zeros are left out, that notes who is woken and what is installed all the same.
#[derive(Default)]
struct Leaving {
    woken: Mutex<Vec<Run>>,
    zeroed: Mutex<Vec<Run>>,
    /// Whether zeros may be installed.
    installs: bool,
}

impl Transport for Arc<Leaving> {
    fn copy(&self, _: &Block, _: Run, _: &[u8]) -> Result<(), TransportError> {
        Ok(())
    }

    fn zero(&self, _: &Block, run: Run) -> Result<(), TransportError> {
        assert!(self.installs, "zeros were installed");
        self.zeroed.lock().unwrap().push(run);
        Ok(())
    }

    fn wake(&self, _: &Block, run: Run) -> Result<(), TransportError> {
        self.woken.lock().unwrap().push(run);
        Ok(())
    }

    fn step_pages(&self, _: BlockId) -> u64 {
        64
    }

    fn zero_step_pages(&self, _: BlockId) -> u64 {
        512
    }

    fn leaves_zeros(&self, _: BlockId) -> bool {
        true
    }
}

fn block(name: &str, pages: u64, page_size: u64) -> Block {
    Block { name: name.into(), len: pages * PAGE_SIZE as u64, page_size }
}

fn two_threads() -> FillOptions {
    FillOptions { threads: 2, ..FillOptions::default() }
}

/// Filling that waits for a fixed time does so, and then brings all.
#[test]
fn filling_waits_for_its_time_and_no_longer() {
    let shelf = Arc::new(Shelf::default());
    let source = Arc::new(Computed::of(vec![block("b", 700, 4096)], 4));
    let blocks: Arc<Computed> = Arc::clone(&source);
    let memory = Arc::new(Memory::new(blocks, Box::new(Arc::clone(&shelf))));
    let fixed = std::time::Duration::from_millis(20);
    let options = FillOptions { delay: Some(FillDelay::Fixed { fixed }), ..two_threads() };
    let began = std::time::Instant::now();
    prefetch(&memory, &options, &Pace::new(None)).unwrap();
    assert!(began.elapsed() >= fixed);
    check_all(&source, &shelf);
}

fn check_all(source: &Computed, shelf: &Shelf) {
    let pages = shelf.pages.lock().unwrap();
    for (index, block) in source.blocks.iter().enumerate() {
        for number in 0..block.pages() {
            let page = Page { block: BlockId(index as u16), number };
            let found = pages.get(&(block.name.clone(), number));
            assert_eq!(found.map(Vec::as_slice), Some(&source.expected(page)[..]), "{page:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Faults from two threads and prefetch from two more, all at once.
    #[test]
    fn every_page_arrives_once_and_right(
        sizes in prop::collection::vec((1u64..900, prop::sample::select(vec![4096u64, 65536, 2 << 20])), 1..4),
        chunk_shift in 0u32..6,
        asked in prop::collection::vec((any::<u16>(), any::<u64>()), 0..200),
    ) {
        let blocks: Vec<Block> = sizes
            .iter()
            .enumerate()
            .map(|(i, (pages, size))| block(&format!("b{i}"), *pages, *size))
            .collect();
        let computed = |blocks| Computed::of(blocks, 1 << chunk_shift);
        let shelf = Arc::new(Shelf::default());
        let transport = Box::new(Arc::clone(&shelf));
        let memory = Arc::new(Memory::new(Arc::new(computed(blocks.clone())), transport));
        std::thread::scope(|scope| {
            for half in asked.chunks(asked.len().div_ceil(2).max(1)) {
                let mut pager = Pager::new(Arc::clone(&memory)).unwrap();
                let blocks = &blocks;
                scope.spawn(move || for (b, n) in half {
                    let id = usize::from(*b) % blocks.len();
                    let unit = blocks[id].pages_per_host_page();
                    let offset = (n % blocks[id].pages()) / unit * blocks[id].page_size;
                    let len = blocks[id].page_size.min(blocks[id].len - offset);
                    pager.serve(BlockId(id as u16), offset, len, Instant::now()).unwrap();
                });
            }
            prefetch(&memory, &two_threads(), &Pace::new(None)).unwrap();
        });
        prop_assert!(memory.wait_complete(Duration::from_secs(60)));
        prop_assert_eq!(memory.counts().present, memory.counts().total);
        check_all(&computed(blocks), &shelf);
    }
}

#[test]
fn memory_that_can_never_be_whole_is_a_loud_failure_and_the_rest_arrives() {
    let whole = Computed::of(vec![block("pc.ram", 256, 4096)], 16);
    let source = Computed { broken: Some(ChunkId(7)), ..whole };
    let shelf = Arc::new(Shelf::default());
    let memory = Arc::new(Memory::new(Arc::new(source), Box::new(Arc::clone(&shelf))));
    let error = prefetch(&memory, &two_threads(), &Pace::new(None)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the memory at offset 0x70000 of block `pc.ram` can't be had: this chunk is broken"
    );
    assert!(!memory.wait_complete(Duration::ZERO));
}

#[test]
fn what_cant_be_read_is_told_once_and_brought_when_it_can_be() {
    let repaired = Arc::new(AtomicBool::new(false));
    let source = || Computed {
        broken: Some(ChunkId(7)),
        repaired: Arc::clone(&repaired),
        ..Computed::of(vec![block("pc.ram", 256, 4096)], 16)
    };
    let shelf = Arc::new(Shelf::default());
    let (tell, told) = std::sync::mpsc::channel();
    let tell = Mutex::new(tell);
    let memory = Memory::new(Arc::new(source()), Box::new(Arc::clone(&shelf)))
        .telling(move |what| tell.lock().unwrap().send(what).unwrap());
    let memory = Arc::new(memory);
    assert_eq!(prefetch(&memory, &two_threads(), &Pace::new(None)).unwrap(), 16);
    let passed_over = told.try_iter().collect::<Vec<_>>();
    assert!(matches!(passed_over[..], [Unreadable::PassedOver(_)]), "{passed_over:?}");
    assert_eq!(memory.counts().present, memory.counts().total - 16);

    let mut pager = Pager::new(Arc::clone(&memory)).unwrap();
    for _ in 0..2 {
        pager.serve(BlockId(0), 0x75000, 4096, Instant::now()).unwrap();
    }
    let awaited: Vec<_> = told.try_iter().collect();
    let [Unreadable::Awaited(MemoryError::Source { offset: 0x75000, .. })] = awaited[..] else {
        panic!("{awaited:?}");
    };
    assert_eq!(memory.awaited(), [Run { block: BlockId(0), first: 0x75, count: 1 }]);

    repaired.store(true, Ordering::Release);
    repair(&memory, &Pace::new(None)).unwrap();
    assert!(matches!(told.try_iter().collect::<Vec<_>>()[..], [Unreadable::Over]));
    assert!(memory.wait_complete(Duration::ZERO) && memory.awaited().is_empty());
    check_all(&source(), &shelf);
}

/// Whoever finds such a page claimed and not present yet waits to be woken.
#[test]
fn zeros_that_are_left_out_wake_who_waits_for_them() {
    let source = Computed::of(vec![block("pc.ram", 3 * 512, 4096)], 512);
    let leaving = Arc::new(Leaving::default());
    let memory = Arc::new(Memory::new(Arc::new(source), Box::new(Arc::clone(&leaving))));
    prefetch(&memory, &two_threads(), &Pace::new(None)).unwrap();
    assert!(memory.wait_complete(Duration::ZERO));
    let zeros = Run { block: BlockId(0), first: 2 * 512, count: 512 };
    assert_eq!(*leaving.woken.lock().unwrap(), [zeros]);
}

/// Zeros that were sent by the socket are on their way for a while. Only those that were left out
/// are ever missing.
#[test]
fn only_zeros_that_were_left_out_are_made_up_for() {
    let source = || Computed::of(vec![block("pc.ram", 3 * 512, 4096)], 512);
    let zeros = |count| Run { block: BlockId(0), first: 2 * 512, count };
    for left in [false, true] {
        let transport = Arc::new(Leaving { installs: true, ..Leaving::default() });
        let memory = Memory::new(Arc::new(source()), Box::new(Arc::clone(&transport)));
        match left {
            true => _ = memory.install(zeros(512), Content::Zero, || {}).unwrap(),
            false => memory.found(zeros(512)),
        }
        transport.woken.lock().unwrap().clear();
        let mut pager = Pager::new(Arc::new(memory)).unwrap();
        pager.serve(BlockId(0), zeros(1).offset(), 4096, Instant::now()).unwrap();
        let (woken, zeroed) = (transport.woken.lock().unwrap(), transport.zeroed.lock().unwrap());
        match left {
            true => assert_eq!((&woken[..], &zeroed[..]), (&[][..], &[zeros(16)][..])),
            false => assert_eq!((&woken[..], &zeroed[..]), (&[zeros(1)][..], &[][..])),
        }
    }
}

#[test]
fn a_request_outside_the_machine_is_refused() {
    let source = Computed::of(vec![block("pc.ram", 4, 4096)], 16);
    let shelf = Arc::new(Shelf::default());
    let memory = Arc::new(Memory::new(Arc::new(source), Box::new(shelf)));
    let mut pager = Pager::new(Arc::clone(&memory)).unwrap();
    for (offset, len) in [(4 * 4096, 4096), (0, 5 * 4096), (u64::MAX - 4095, 4096), (0, 0)] {
        let error = pager.serve(BlockId(0), offset, len, Instant::now()).unwrap_err();
        assert!(matches!(error, MemoryError::NoSuchMemory { .. }), "{error}");
    }
    assert_eq!(memory.counts().present, 0);
}

#[test]
fn an_answers_time_counts_from_the_event_and_not_from_its_turn() {
    let source = Computed::of(vec![block("pc.ram", 4, 4096)], 4);
    let memory = Memory::new(Arc::new(source), Box::new(Arc::new(Shelf::default())));
    let mut pager = Pager::new(Arc::new(memory)).unwrap();
    let waited = Duration::from_millis(500);
    let heard = Instant::now().checked_sub(waited).unwrap();
    pager.serve(BlockId(0), 0, 4096, heard).unwrap();
    let answers = pager.into_report().timings;
    assert!(answers.len() == 1 && answers.max() >= waited.as_nanos() as u64, "{answers:?}");
}

/// Words that two maps share, as those of two processes do.
#[derive(Clone)]
struct SharedWords(Arc<Vec<AtomicU64>>);

impl claim::Words for SharedWords {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

#[test]
fn a_successor_settles_what_was_claimed_and_not_finished() {
    let blocks = [
        Block { name: "pc.ram".into(), len: 200 << 12, page_size: 4096 },
        Block { name: "huge".into(), len: 1024 << 12, page_size: 2 << 20 },
    ];
    let words = (0..ClaimMap::words_for(&blocks)).map(|_| AtomicU64::new(0)).collect();
    let words = SharedWords(Arc::new(words));
    let map = || ClaimMap::over(&blocks, Box::new(words.clone()));
    let run = |block, first, count| Run { block: BlockId(block), first, count };
    let first = map();
    let claim = |run| first.claim(run, |_| Ok::<(), ()>(())).unwrap();
    claim(run(0, 60, 70));
    first.mark_present(run(0, 64, 10));
    claim(run(1, 512, 512));
    first.count_request();
    drop(first);

    let second = map();
    assert_eq!((second.present(), second.requests()), (10, 1));
    let mut unfinished = Vec::new();
    for block in 0..2 {
        second.unfinished(BlockId(block), |run| unfinished.push(run));
    }
    let expected = [run(0, 60, 4), run(0, 74, 54), run(0, 128, 2), run(1, 512, 512)];
    assert_eq!(unfinished, expected);
    second.release(run(0, 60, 4));
    assert!(!second.is_claimed(BlockId(0), 60) && second.is_claimed(BlockId(0), 64));
}
