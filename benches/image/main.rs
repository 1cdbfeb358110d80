//! What an image costs beside its pages: opening it, hashing its chunks, and the host's
//! page cache while it is written.
//!
//! `cargo bench --features internals --bench image -- open` (or `hash`, `cache`); without a name, all of them
//! at small sizes. `--help` names the options. Times are this host's, ratios carry over.

mod cache;
mod hash;
mod open;

use std::path::PathBuf;

use clap::Parser;
use snapback::page::{Block, PAGE_SIZE};

#[derive(Parser)]
struct Options {
    /// What to measure: open, hash, cache [default: all]
    what: Vec<String>,
    /// A folder for the images, on the disk to be measured
    #[arg(long)]
    folder: Option<PathBuf>,
    /// open: RAM of the larger image, in GiB
    #[arg(long, default_value_t = 64)]
    ram_gib: u64,
    /// open: how often each image is opened
    #[arg(long, default_value_t = 200)]
    runs: usize,
    /// cache: size of each image in MiB; more than the memory that is free shows most
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// cache: size in MiB of a file of somebody else's that lies in the page cache
    #[arg(long, default_value_t = 512)]
    bystander_mib: u64,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Result<()> {
    let options = Options::parse();
    let base = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = tempfile::Builder::new().prefix("snapback-bench-").tempdir_in(base)?;
    let wanted = |name: &str| options.what.is_empty() || options.what.iter().any(|w| w == name);
    if wanted("hash") {
        hash::measure();
    }
    if wanted("open") {
        open::measure(&options, folder.path())?;
    }
    if wanted("cache") {
        cache::measure(&options, folder.path())?;
    }
    Ok(())
}

/// The blocks of a machine of one.
fn blocks(mib: u64) -> Vec<Block> {
    vec![Block { name: "pc.ram".into(), len: mib << 20, page_size: PAGE_SIZE as u64 }]
}

/// The value below which this share of the samples lies.
fn quantile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[((samples.len() - 1) as f64 * share).round() as usize]
}

/// Fills memory with what does not compress.
fn random(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}
