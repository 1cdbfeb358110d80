//! What is measured of one way to store a memory.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use snapback::image::{Compression, Details, Image, ImageWriter, Sections, WriterOptions};
use snapback::page::{ChunkId, Location, PAGE_SIZE, Page, PageSource};

use crate::memory::{Memory, is_zero};
use crate::support::Result;

/// Random pages that are read.
const SAMPLES: usize = 4000;

/// The figures of one way.
pub struct Figures {
    /// From the first page until the image is whole, the best run: bytes of pages that
    /// are not all zeros, a second.
    pub save: f64,
    /// Bytes of the image.
    pub image: u64,
    /// One page at random: looked up, read, decompressed and verified. Median and the
    /// 99th percentile.
    pub page: (Duration, Duration),
    /// All chunks in order, by one thread and by two, the best run: bytes of pages a
    /// second.
    pub fill: [f64; 2],
}

/// Stores the memory in `path` and reads it back.
///
/// # Errors
/// When it can't be written or read.
pub fn one_way(
    memory: &Memory,
    path: &Path,
    compression: Compression,
    chunk_pages: usize,
    runs: usize,
) -> Result<Figures> {
    let data = memory.data_bytes() as f64;
    let best = |times: Vec<Duration>| {
        data / times.into_iter().min().unwrap_or(Duration::MAX).as_secs_f64()
    };
    let mut times = Vec::new();
    for _ in 0..runs {
        times.push(write(memory, path, compression, chunk_pages)?);
    }
    let save = best(times);

    let image = Image::open(path)?;
    let page = random_pages(memory, &image)?;
    let mut fill = [0.0; 2];
    for (threads, fill) in (1..).zip(&mut fill) {
        let mut times = Vec::new();
        for _ in 0..runs {
            times.push(read_all(&image, threads)?);
        }
        *fill = best(times);
    }
    let figures = Figures { save, image: image.file_len(), page, fill };
    fs::remove_file(path)?;
    Ok(figures)
}

fn write(
    memory: &Memory,
    path: &Path,
    compression: Compression,
    chunk_pages: usize,
) -> Result<Duration> {
    let mut options = WriterOptions::default();
    (options.compression, options.chunk_pages) = (compression, chunk_pages);
    options.force = true;
    let start = Instant::now();
    let mut writer = ImageWriter::create(path, options, memory.blocks.clone())?;
    for (page, bytes) in memory.pages() {
        writer.page(page, bytes)?;
    }
    writer.finish(Details::default(), Sections::default())?;
    Ok(start.elapsed())
}

fn random_pages(memory: &Memory, image: &Arc<Image>) -> Result<(Duration, Duration)> {
    let stored: Vec<Page> =
        memory.pages().filter(|(_, bytes)| !is_zero(bytes)).map(|(page, _)| page).collect();
    let mut reader = image.reader()?;
    let mut times = Vec::with_capacity(SAMPLES);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..SAMPLES {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let page = stored[(state >> 33) as usize % stored.len()];
        let start = Instant::now();
        let Location::Stored { chunk, slot } = image.locate(page)? else {
            return Err(format!("page {page:?} was stored and is zero").into());
        };
        black_box(&reader.read(chunk)?[slot * PAGE_SIZE..][..PAGE_SIZE]);
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok((times[SAMPLES / 2], times[SAMPLES * 99 / 100]))
}

/// Reads every chunk, by so many threads that take the next one each.
fn read_all(image: &Arc<Image>, threads: usize) -> Result<Duration> {
    let next = AtomicU64::new(0);
    let work = || -> Result<()> {
        let mut reader = image.reader()?;
        loop {
            // A window's worth at a time, so that a thread reads on where it was.
            let first = next.fetch_add(64, Ordering::Relaxed);
            if first >= image.chunk_count() {
                return Ok(());
            }
            for chunk in first..image.chunk_count().min(first + 64) {
                black_box(reader.read(ChunkId(chunk))?);
            }
        }
    };
    let start = Instant::now();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a reader panicked")?)
    })?;
    Ok(start.elapsed())
}

/// Bytes a second, by one core, over the chunks of such an image.
pub fn checksum_rate(chunks: &[Vec<u8>], checksum: impl Fn(&[u8]) -> u64) -> f64 {
    let bytes: usize = chunks.iter().map(Vec::len).sum();
    let pass = || {
        let start = Instant::now();
        for chunk in chunks {
            black_box(checksum(chunk));
        }
        start.elapsed()
    };
    let best = (0..3).map(|_| pass()).min().unwrap_or(Duration::MAX);
    bytes as f64 / best.as_secs_f64()
}
