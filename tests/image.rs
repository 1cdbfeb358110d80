//! How fast an image is written, read and verified: numbers to look at, none to
//! pass. `cargo test --release --test image -- --ignored --nocapture`, with
//! `IMAGE_BENCH_DIR` naming a directory on the disk to be measured.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapback::image::{Compression, Details, Image, ImageWriter, Sections, WriterOptions, verify};
use snapback::page::{Block, BlockId, ChunkId, Location, PAGE_SIZE, Page, PageSource};

/// 1 GiB of pages, each different and none of them compressible.
const PAGES: usize = 1 << 18;

fn random(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// Text-like: half of each page random, half repeated.
fn half(bytes: &mut [u8]) {
    for page in bytes.chunks_exact_mut(PAGE_SIZE) {
        let (first, second) = page.split_at_mut(PAGE_SIZE / 2);
        second.fill(first[0]);
    }
}

fn rate(time: Duration) -> f64 {
    (PAGES * PAGE_SIZE) as f64 / 1e6 / time.as_secs_f64()
}

#[test]
#[ignore = "prints measurements"]
fn throughput() {
    let base = std::env::var_os("IMAGE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let directory = tempfile::tempdir_in(base).unwrap();
    let path = directory.path().join("vm.snap");
    let mut memory = vec![0u8; PAGES * PAGE_SIZE];
    random(&mut memory);
    println!(
        "MB/s (1 GiB)              page()  until durable  read chunks  verify   size  stalled"
    );
    for contents in ["random", "half"] {
        if contents == "half" {
            half(&mut memory);
        }
        for (name, compression) in [("plain", Compression::None), ("zstd:1", Compression::Zstd(1))]
        {
            for chunk_pages in [1, 4, 16, 64] {
                let mut options = WriterOptions::default();
                (options.compression, options.chunk_pages) = (compression, chunk_pages);
                options.force = true;
                let blocks = vec![Block {
                    name: "pc.ram".into(),
                    len: memory.len() as u64,
                    page_size: 4096,
                }];
                let mut writer = ImageWriter::create(&path, options, blocks).unwrap();
                let start = Instant::now();
                for (number, page) in memory.chunks_exact(PAGE_SIZE).enumerate() {
                    let at = Page { block: BlockId(0), number: number as u64 };
                    writer.page(at, page.try_into().unwrap()).unwrap();
                }
                let given = start.elapsed();
                let stats = writer.stats();
                writer.finish(Details::default(), Sections::default()).unwrap();
                let finished = start.elapsed();

                let start = Instant::now();
                let image: Arc<Image> = Image::open(&path).unwrap();
                let mut reader = image.reader().unwrap();
                for number in 0..image.chunk_count() {
                    reader.read(ChunkId(number)).unwrap();
                }
                let read = start.elapsed();
                let start = Instant::now();
                assert!(verify(&image, |_, _| {}).unwrap().is_whole());
                let verified = start.elapsed();
                println!(
                    "{contents:<6} {name:<6} {:>3} KiB  {:>9.0} {:>14.0} {:>12.0} {:>7.0} {:>5.0}M {:>8.2?}",
                    chunk_pages * 4,
                    rate(given),
                    rate(finished),
                    rate(read),
                    rate(verified),
                    image.file_len() as f64 / 1e6,
                    stats.stalled,
                );
            }
        }
    }

    let image = Image::open(&path).unwrap();
    let start = Instant::now();
    for number in 0..PAGES as u64 {
        let at = Page { block: BlockId(0), number };
        assert!(matches!(image.locate(at).unwrap(), Location::Stored { .. }));
    }
    let cold = start.elapsed();
    let start = Instant::now();
    for number in 0..PAGES as u64 {
        std::hint::black_box(image.locate(Page { block: BlockId(0), number }).unwrap());
    }
    let warm = start.elapsed();
    let each = |time: Duration| time.as_nanos() as f64 / PAGES as f64;
    println!("locate: {:.0} ns on average the first time, {:.0} ns after", each(cold), each(warm));
    let first = Page { block: BlockId(0), number: 0 };
    let start = Instant::now();
    let fresh = Image::open(&path).unwrap();
    let opened = start.elapsed();
    fresh.locate(first).unwrap();
    println!("open: {opened:.1?}, first locate: {:.1?}", start.elapsed() - opened);
}
