//! What userfaultfd allows at best on this host, and how near the engine comes to it.
//!
//! Everything is measured in one process, in turns, several times over: absolute times
//! are this host's, only ratios carry over. Faults are timed by the thread that waits
//! for them. The data is this program itself, over and over: code, text and tables, as a
//! guest's memory holds them. `cargo bench --bench fault_floor -- --help` names the options.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use harness::{Backing, Engine, Ram, Random};
use hdrhistogram::Histogram;
use snapback::host::uffd::{FaultBuffer, Uffd};
use snapback::image::{Compression, Details, Image, ImageWriter, Sections, WriterOptions};
use snapback::memory::Pace;
use snapback::page::{Block, BlockId, Location, PAGE_SIZE, Page, PageSource};

/// A touch that takes less has met no fault: the kernel alone needs longer.
const NO_FAULT: Duration = Duration::from_nanos(1500);

const GIB: f64 = (1u64 << 30) as f64;

#[derive(Parser)]
struct Options {
    /// Memory that holds data, in MiB
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Memory that is all zeros, in MiB
    #[arg(long, default_value_t = 4096)]
    zero_mib: u64,
    /// Pages in a chunk of the images; `save` makes chunks of 4
    #[arg(long, default_value_t = 4)]
    chunk_pages: usize,
    /// Faults in a measurement, at most one a chunk
    #[arg(long, default_value_t = 4000)]
    faults: u64,
    /// Added to the nice value of threads that fill while others wait for faults
    #[arg(long, default_value_t = 0)]
    fill_nice: i32,
    /// How often everything is measured
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// A folder for the images
    #[arg(long)]
    folder: Option<PathBuf>,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    let folder = tempfile::tempdir_in(options.folder.clone().unwrap_or(std::env::temp_dir()));
    let folder = folder.expect("a folder for the images can be made");
    let cores = thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{} MiB of data in chunks of {} KiB, {} MiB of zeros, {} runs, {cores} processors",
        options.mib,
        options.chunk_pages * PAGE_SIZE / 1024,
        options.zero_mib,
        options.runs,
    );
    let data = Data::new(&options, folder.path());
    let mut results = Results::default();
    for _ in 0..options.runs {
        measure(&options, &data, cores, &mut results);
    }
    results.print(cores);
}

/// The images to bring memory back from, in the page cache.
struct Data {
    pages: u64,
    chunk_pages: usize,
    zero_pages: u64,
    plain: Arc<Image>,
    zstd: Arc<Image>,
    zeros: Arc<Image>,
    /// Chunks as the compressed image has them.
    compressed: Vec<Vec<u8>>,
}

impl Data {
    fn new(options: &Options, folder: &Path) -> Data {
        let pages = options.mib << 8;
        let zero_pages = options.zero_mib << 8;
        let chunk_pages = options.chunk_pages;
        let program = std::fs::read("/proc/self/exe").expect("this program can be read");
        let chunks = program.chunks_exact(chunk_pages * PAGE_SIZE);
        let compress = |chunk| zstd::bulk::compress(chunk, 1).expect("a chunk compresses");
        let write = |name: &str, compression, pages, content: &[u8]| {
            let mut options = WriterOptions::default();
            (options.compression, options.chunk_pages) = (compression, chunk_pages);
            write_image(&folder.join(name), options, pages, content)
        };
        Data {
            pages,
            chunk_pages,
            zero_pages,
            plain: write("plain.snap", Compression::None, pages, &program),
            zstd: write("zstd.snap", Compression::Zstd(1), pages, &program),
            zeros: write("zeros.snap", Compression::None, zero_pages, &[0; PAGE_SIZE]),
            compressed: chunks.map(compress).collect(),
        }
    }
}

/// An image of so many pages of this content, over and over.
fn write_image(path: &Path, options: WriterOptions, pages: u64, content: &[u8]) -> Arc<Image> {
    let len = pages * PAGE_SIZE as u64;
    let block = Block { name: "pc.ram".into(), len, page_size: PAGE_SIZE as u64 };
    let mut writer = ImageWriter::create(path, options, vec![block]).expect("an image");
    let (contents, _) = content.as_chunks::<PAGE_SIZE>();
    for (number, content) in (0..pages).zip(contents.iter().cycle()) {
        writer.page(Page { block: BlockId(0), number }, content).expect("a page");
    }
    writer.finish(Details::default(), Sections::default()).expect("an image");
    Image::open(path).expect("an image")
}

fn measure(options: &Options, data: &Data, cores: usize, results: &mut Results) {
    let some = |pause| Touches { faults: options.faults, chunk_pages: options.chunk_pages, pause };
    let faults = some(Duration::ZERO);
    let mut waits = |what, histogram: Histogram<u64>| results.waits(what, &histogram);
    waits("bare loop", bare_faults(data.pages, faults).0);
    waits("plain image", engine_faults(&data.plain, faults).0);
    waits("zstd image", engine_faults(&data.zstd, faults).0);
    let faults = some(Duration::from_micros(50));
    let (waited, answered) = bare_faults(data.pages, faults);
    waits("bare loop, with pauses", waited);
    waits("  from event to page in place, bare", answered);
    for (image, what, answer, read) in [
        (
            &data.plain,
            "plain image, with pauses",
            "  from event to page in place",
            "  reading the chunk alone",
        ),
        (
            &data.zstd,
            "zstd image, with pauses",
            "  from event to page in place, zstd",
            "  reading the chunk alone, zstd",
        ),
    ] {
        let (waited, answered) = engine_faults(image, faults);
        waits(what, waited);
        waits(answer, answered);
        waits(read, read_chunks(image, faults));
    }
    let faults = some(Duration::ZERO);
    let fill_nice = options.fill_nice;
    waits("plain image, filling", faults_while_filling(&data.plain, faults, cores, fill_nice));
    waits("zstd image, filling", faults_while_filling(&data.zstd, faults, cores, fill_nice));

    for threads in [1, cores] {
        results.rate("UFFDIO_COPY", threads, bare_copy(data.pages, threads));
        results.rate("fill, plain", threads, fill(&data.plain, threads));
        results.rate("zstd alone", threads, decompress(data, threads));
        results.rate("fill, zstd", threads, fill(&data.zstd, threads));
    }
    for threads in [1, cores] {
        results.rate("UFFDIO_ZEROPAGE", threads, bare_zero(data.zero_pages, threads));
        let before = resident();
        let ram = ram(data.zero_pages);
        results.rate("fill, zeros", threads, fill_into(&ram, &data.zeros, threads));
        results.zero_resident = resident().saturating_sub(before).max(results.zero_resident);
    }
}

fn ram(pages: u64) -> Arc<Ram> {
    Arc::new(Ram::new(&[(Backing::Anonymous, pages)]).expect("memory"))
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are in order")
}

/// Which memory is touched, and how fast.
#[derive(Clone, Copy)]
struct Touches {
    faults: u64,
    chunk_pages: usize,
    /// From one to the next.
    pause: Duration,
}

impl Touches {
    /// One page each of some chunks, in a random order.
    fn pages(self, pages: u64, count: u64) -> impl Iterator<Item = Page> {
        let size = self.chunk_pages as u64;
        let chunks = Random::new(1).order(pages / size).into_iter().take(count as usize);
        chunks.map(move |chunk| Page { block: BlockId(0), number: chunk * size + chunk % size })
    }
}

/// Touches pages and times how long that takes where it takes a fault.
fn touch(ram: &Ram, pages: impl Iterator<Item = Page>, pause: Duration) -> Histogram<u64> {
    let mut waits = histogram();
    for page in pages {
        let start = Instant::now();
        ram.word(page, 0).load(Ordering::Acquire);
        let waited = start.elapsed();
        if waited >= NO_FAULT {
            waits.saturating_record(waited.as_nanos() as u64);
        }
        let end = Instant::now() + pause;
        while Instant::now() < end {
            std::hint::spin_loop();
        }
    }
    waits
}

/// The least there can be: a loop that spins on the userfaultfd and installs one page.
fn bare_faults(pages: u64, touches: Touches) -> (Histogram<u64>, Histogram<u64>) {
    let ram = ram(pages);
    let uffd = Uffd::create().expect("a userfaultfd");
    ram.register(&uffd);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let handler = scope.spawn(|| {
            let page = [7; PAGE_SIZE];
            let mut answers = histogram();
            let mut buffer = FaultBuffer::default();
            while !done.load(Ordering::Relaxed) {
                let mut faults = uffd.read_faults(&mut buffer).expect("faults").peekable();
                if faults.peek().is_none() {
                    std::hint::spin_loop();
                }
                let heard = Instant::now();
                for fault in faults {
                    let at = fault.address & !(PAGE_SIZE as u64 - 1);
                    // SAFETY: memory of ours, registered, that holds nothing yet.
                    unsafe { uffd.copy(at, &page, PAGE_SIZE as u64) }.expect("a page");
                    answers.saturating_record(heard.elapsed().as_nanos() as u64);
                }
            }
            answers
        });
        let waits = touch(&ram, touches.pages(pages, touches.faults), touches.pause);
        done.store(true, Ordering::Relaxed);
        (waits, handler.join().expect("the handler ends well"))
    })
}

/// As who waits sees it, and as who answers does.
fn engine_faults(image: &Arc<Image>, touches: Touches) -> (Histogram<u64>, Histogram<u64>) {
    let pages = image.manifest().blocks[0].pages();
    let ram = ram(pages);
    let mut engine = Engine::new(&ram, Arc::new(Arc::clone(image)));
    engine.start_fault_handler();
    let waits = touch(&ram, touches.pages(pages, touches.faults), touches.pause);
    let report = engine
        .stop_fault_handlers()
        .pop()
        .expect("one fault handler")
        .expect("all faults answered");
    (waits, report.timings)
}

/// How long it takes to find a page and to read its chunk.
fn read_chunks(image: &Arc<Image>, touches: Touches) -> Histogram<u64> {
    let mut times = histogram();
    let mut reader = image.reader().expect("a reader");
    let pages = image.manifest().blocks[0].pages();
    for page in touches.pages(pages, touches.faults) {
        let start = Instant::now();
        let found = image.locate(page).expect("a page");
        let Location::Stored { chunk, .. } = found else { continue };
        std::hint::black_box(reader.read(chunk).expect("a chunk"));
        times.saturating_record(start.elapsed().as_nanos() as u64);
    }
    times
}

fn faults_while_filling(
    image: &Arc<Image>,
    touches: Touches,
    threads: usize,
    nice: i32,
) -> Histogram<u64> {
    let pages = image.manifest().blocks[0].pages();
    let ram = ram(pages);
    let mut engine = Engine::new(&ram, Arc::new(Arc::clone(image)));
    engine.start_fault_handler();
    let filled = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: it takes numbers only. On Linux it is the calling thread's value, which
            // the threads that it starts inherit (nice(2)).
            unsafe { libc::nice(nice) };
            engine.fill(threads, &Pace::new(None)).expect("memory is filled");
            filled.store(true, Ordering::Relaxed);
        });
        let pages = touches.pages(pages, pages).take_while(|_| !filled.load(Ordering::Relaxed));
        touch(&ram, pages, touches.pause)
    })
}

fn per_second(pages: u64, start: Instant) -> f64 {
    (pages * PAGE_SIZE as u64) as f64 / GIB / start.elapsed().as_secs_f64()
}

fn fill(image: &Arc<Image>, threads: usize) -> f64 {
    fill_into(&ram(image.manifest().blocks[0].pages()), image, threads)
}

/// GiB that the engine fills in a second with nobody waiting.
fn fill_into(ram: &Arc<Ram>, image: &Arc<Image>, threads: usize) -> f64 {
    let engine = Engine::new(ram, Arc::new(Arc::clone(image)));
    let start = Instant::now();
    engine.fill(threads, &Pace::new(None)).expect("memory is filled");
    per_second(engine.memory.counts().total, start)
}

/// Does `work` for each of `count` pieces, on some threads.
fn on_threads(threads: usize, count: usize, work: impl Fn(&mut dyn Iterator<Item = usize>) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|n| *n < count);
                work(&mut std::iter::from_fn(take));
            });
        }
    });
}

/// GiB that UFFDIO_COPY installs in a second, 2 MiB a call, from a buffer in the cache.
fn bare_copy(pages: u64, threads: usize) -> f64 {
    const STEP: usize = 2 << 20;
    let ram = ram(pages);
    let uffd = Uffd::create().expect("a userfaultfd");
    ram.register(&uffd);
    let start = Instant::now();
    on_threads(threads, (pages as usize * PAGE_SIZE) / STEP, |steps| {
        let bytes = vec![7; STEP];
        for step in steps {
            let at = ram.address(BlockId(0)) + (step * STEP) as u64;
            // SAFETY: memory of ours, registered, that holds nothing yet.
            unsafe { uffd.copy(at, &bytes, PAGE_SIZE as u64) }.expect("pages");
        }
    });
    per_second(pages, start)
}

/// GiB that UFFDIO_ZEROPAGE makes in a second, 2 MiB a call.
fn bare_zero(pages: u64, threads: usize) -> f64 {
    let ram = ram(pages);
    let uffd = Uffd::create().expect("a userfaultfd");
    ram.register(&uffd);
    let start = Instant::now();
    on_threads(threads, pages as usize / 512, |steps| {
        for step in steps {
            let at = ram.address(BlockId(0)) + ((step as u64) << 21);
            // SAFETY: memory of ours, registered, that holds nothing yet.
            unsafe { uffd.zero(at, 2 << 20, PAGE_SIZE as u64) }.expect("zeros");
        }
    });
    per_second(pages, start)
}

/// GiB that zstd makes in a second out of chunks in memory.
fn decompress(data: &Data, threads: usize) -> f64 {
    let chunks = &data.compressed;
    let start = Instant::now();
    on_threads(threads, data.pages as usize / data.chunk_pages, |pieces| {
        let mut zstd = zstd::bulk::Decompressor::new().expect("a decompressor");
        let mut plain = vec![0; data.chunk_pages * PAGE_SIZE];
        for piece in pieces {
            let chunk = &chunks[piece % chunks.len()];
            zstd.decompress_to_buffer(chunk, &mut plain).expect("a chunk");
        }
    });
    per_second(data.pages, start)
}

/// Bytes of memory that this process has (proc_pid_statm(5)).
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Option<u64> = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0) * PAGE_SIZE as u64
}

/// What was measured, each run's value.
#[derive(Default)]
struct Results {
    waits: Vec<(&'static str, [Vec<f64>; 3], u64)>,
    rates: Vec<(&'static str, usize, Vec<f64>)>,
    zero_resident: u64,
}

impl Results {
    /// Adds one run's waits; in microseconds: half, 99 in 100, all were shorter.
    fn waits(&mut self, what: &'static str, histogram: &Histogram<u64>) {
        let values = [
            histogram.value_at_quantile(0.5) as f64 / 1e3,
            histogram.value_at_quantile(0.99) as f64 / 1e3,
            histogram.max() as f64 / 1e3,
        ];
        if !self.waits.iter().any(|(name, ..)| *name == what) {
            self.waits.push((what, Default::default(), 0));
        }
        for (name, runs, count) in &mut self.waits {
            if *name == what {
                runs.iter_mut().zip(values).for_each(|(runs, value)| runs.push(value));
                *count += histogram.len();
            }
        }
    }

    fn rate(&mut self, what: &'static str, threads: usize, value: f64) {
        match self.rates.iter_mut().find(|(name, n, _)| (*name, *n) == (what, threads)) {
            Some((.., runs)) => runs.push(value),
            None => self.rates.push((what, threads, vec![value])),
        }
    }

    fn wait(&self, what: &str, at: usize) -> f64 {
        let found = self.waits.iter().find(|(name, ..)| *name == what);
        found.map_or(f64::NAN, |(_, runs, _)| median(&runs[at]))
    }

    fn gib(&self, what: &str, threads: usize) -> f64 {
        let found = self.rates.iter().find(|(name, n, _)| *name == what && *n == threads);
        found.map_or(f64::NAN, |(.., runs)| median(runs))
    }

    fn print(&self, cores: usize) {
        println!(
            "\na fault, as who waits sees it (µs)  p50              p99              max   faults"
        );
        for (what, [p50, p99, max], count) in &self.waits {
            let [p50, p99] = [p50, p99].map(|runs| spread(runs));
            println!("{what:<34} {p50:<16} {p99:<16} {:>6.0} {count:>6}", median(max));
        }
        println!("\nrates (GiB/s)      threads");
        for (what, threads, runs) in &self.rates {
            println!("{what:<20} {threads:>5}  {}", spread(runs));
        }
        println!("memory that zeros took: {:.1} MiB", self.zero_resident as f64 / (1 << 20) as f64);

        println!("\nratio                                          found  target");
        let at_most = |what: String, found: f64, target: f64| {
            println!("{what:<46} {found:>5.2}  ≤ {target} {}", verdict(found <= target));
        };
        let at_least = |what: String, found: f64, target: f64| {
            println!("{what:<46} {found:>5.2}  ≥ {target} {}", verdict(found >= target));
        };
        // What is asked of faults is asked of the plain image; the other shows what
        // decompressing costs.
        let of_faults = |image: &str, what: String, found: f64, target: f64| match image {
            "plain image" => at_most(what, found, target),
            _ => println!("{what:<46} {found:>5.2}"),
        };
        for pauses in ["", ", with pauses"] {
            for image in ["plain image", "zstd image"] {
                for (at, name, target) in [(0, "p50", 1.5), (1, "p99", 3.0)] {
                    let (ours, bare) = (format!("{image}{pauses}"), format!("bare loop{pauses}"));
                    let ratio = self.wait(&ours, at) / self.wait(&bare, at);
                    of_faults(image, format!("{name}, {ours} / bare"), ratio, target);
                }
            }
        }
        for image in ["plain image", "zstd image"] {
            let ratio = self.wait(&format!("{image}, filling"), 1) / self.wait(image, 1);
            of_faults(image, format!("p99, {image}, filling / not"), ratio, 2.0);
        }
        for threads in [1, cores] {
            let ratio = self.gib("fill, plain", threads) / self.gib("UFFDIO_COPY", threads);
            at_least(format!("fill, plain / UFFDIO_COPY, {threads} threads"), ratio, 0.7);
            let ratio = self.gib("fill, zstd", threads) / self.gib("zstd alone", threads);
            at_least(format!("fill, zstd / zstd alone, {threads} threads"), ratio, 0.6);
        }
        at_least("zeros, GiB/s".into(), self.gib("fill, zeros", cores), 50.0);
    }
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The median, and the least and the most.
fn spread(runs: &[f64]) -> String {
    let least = runs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = runs.iter().copied().fold(0.0, f64::max);
    format!("{:.1} ({least:.1}–{most:.1})", median(runs))
}
