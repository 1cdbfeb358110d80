//! Checksums and fingerprints, one thread, memory that is not in the processor's cache.

use std::hint::black_box;
use std::time::Instant;

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

const BYTES: usize = 256 << 20;

pub fn measure() {
    let mut memory = vec![0; BYTES];
    super::random(&mut memory);
    let key = [7; 32];
    let blake3 = |bytes: &[u8]| _ = black_box(blake3::keyed_hash(&key, bytes));
    let short = |bytes: &[u8]| _ = black_box(xxh3_64(bytes));
    let long = |bytes: &[u8]| _ = black_box(xxh3_128(bytes));
    println!("| chunk | xxh3-64 MB/s | xxh3-128 MB/s | BLAKE3 keyed MB/s |");
    println!("|---|---|---|---|");
    for kib in [4, 16, 64, 256] {
        let rate = |hash: &dyn Fn(&[u8])| {
            let once = |_| {
                let start = Instant::now();
                memory.chunks_exact(kib << 10).for_each(hash);
                BYTES as f64 / 1e6 / start.elapsed().as_secs_f64()
            };
            (0..3).map(once).fold(0.0, f64::max)
        };
        let (short, long, blake3) = (rate(&short), rate(&long), rate(&blake3));
        println!("| {kib} KiB | {short:.0} | {long:.0} | {blake3:.0} |");
    }
    println!();
}
