//! What a delta of a busy database costs beside what truly changed:
//!
//!     cargo bench --features internals --bench delta
//!
//! Boots Debian with PostgreSQL at work, saves it, lets pgbench work on for a minute,
//! saves it on top of that image, and compares the two memories page by page. Prints a
//! table for docs/performance.md.
//!
//! With `--tracked 16,128`, another: what a delta costs of a guest whose writes were tracked since the parent.

#[path = "../image_sweep/guests.rs"]
mod guests;
#[path = "../image_sweep/memory.rs"]
mod memory;
#[path = "../../tests/support/mod.rs"]
mod support;
mod tracked;

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use guests::{Kind, save};
use memory::Memory;
use snapback::image::Image;
use snapback::page::{PAGE_SIZE, PageSource};
use support::{Qemu, Result, debian};

const MB: f64 = 1e6;

#[derive(Parser)]
struct Options {
    /// How long the database works between the two saves
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// RAM of the guest, in MiB
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// The QEMU, by its number
    #[arg(long, default_value = "7", value_parser = Qemu::parse)]
    qemu: Qemu,
    /// zstd's, of both images
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    level: i32,
    /// Don't compress them
    #[arg(long, conflicts_with = "level")]
    plain: bool,
    /// Save a guest whose writes were tracked since the parent, and one of which they were not, after
    /// so many MiB were rewritten
    #[arg(long, value_delimiter = ',')]
    tracked: Vec<u64>,
    /// With --tracked: saves of each kind
    #[arg(long, default_value_t = 5)]
    saves: usize,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("delta", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::Builder::new().prefix("snapback-delta-").tempdir()?;
    let (base, delta) = (folder.path().join("base.snap"), folder.path().join("delta.snap"));
    let level = (!options.plain).then_some(options.level);
    let how = level.map_or("none".into(), |level| format!("zstd:{level}"));
    if !options.tracked.is_empty() {
        let Options { qemu, mib, saves, tracked: written, .. } = options;
        let plan = tracked::Plan { qemu, mib, written, saves, compress: how };
        return tracked::run(&plan, folder.path());
    }
    let time = Duration::from_secs(options.seconds);
    eprintln!("booting and working");
    let mut guest = Kind::Debian.at_work(options.qemu, options.mib, folder.path())?;
    save(&guest, &base, &["--compress", &how])?;
    let before = debian::transactions(&mut guest.oracle)?;
    thread::sleep(time);
    let transactions = debian::transactions(&mut guest.oracle)? - before;
    let parent = base.to_str().ok_or("a folder for temporary files whose name is no text")?;
    save(&guest, &delta, &["--compress", &how, "--parent", parent])?;
    drop(guest);

    // Read through the chain, the delta gives all of the second memory.
    let changes = Changes::between(&base, &delta, level)?;
    let row = |what: &str, bytes: u64, of: u64| {
        println!("| {what} | {:.1} | {:.2} |", bytes as f64 / MB, bytes as f64 / of as f64);
    };
    let delta = fs::metadata(&delta)?.len();
    println!(
        "{} MiB of RAM, {transactions} transactions of pgbench in {time:?}, {how}, chunks of {} KiB; {} of \
         {} pages changed.\n\n| | MB | of the changed chunks |\n|---|---|---|",
        options.mib,
        changes.chunk_pages * PAGE_SIZE / 1024,
        changes.pages,
        changes.all_pages,
    );
    row("chunks that changed, as they are stored in a full image", changes.chunks, changes.chunks);
    row("only their pages that changed", changes.stored_pages, changes.chunks);
    row("the delta, the whole file", delta, changes.chunks);
    row("the full image below it", fs::metadata(&base)?.len(), changes.chunks);
    Ok(())
}

/// How two memories differ.
struct Changes {
    /// Pages of a chunk at most.
    chunk_pages: usize,
    all_pages: u64,
    /// Pages whose bytes differ, zeros among them.
    pages: u64,
    /// What the chunks of the second memory take that hold such pages.
    chunks: u64,
    /// The same, had they no other pages.
    stored_pages: u64,
}

impl Changes {
    fn between(first: &Path, second: &Path, level: Option<i32>) -> Result<Changes> {
        let chunk_pages = Image::open(second)?.chunk_pages();
        let (first, second) = (Memory::of(first)?, Memory::of(second)?);
        let mut changes =
            Changes { chunk_pages, all_pages: 0, pages: 0, chunks: 0, stored_pages: 0 };
        for (before, after) in first.groups(chunk_pages).zip(second.groups(chunk_pages)) {
            changes.all_pages += after.len() as u64;
            let differs: Vec<bool> = before.iter().zip(after).map(|(a, b)| a != b).collect();
            let count = differs.iter().filter(|differs| **differs).count() as u64;
            if count == 0 {
                continue;
            }
            changes.pages += count;
            let zipped = || after.iter().zip(&differs);
            let all: Vec<u8> = zipped().flat_map(|(page, _)| stored(page)).copied().collect();
            let changed = zipped().filter(|(_, differs)| **differs);
            let changed: Vec<u8> = changed.flat_map(|(page, _)| stored(page)).copied().collect();
            changes.chunks += packed(&all, level)?;
            changes.stored_pages += packed(&changed, level)?;
        }
        Ok(changes)
    }
}

/// A page's bytes as far as they are stored: zeros are not.
fn stored(page: &[u8; PAGE_SIZE]) -> &[u8] {
    if memory::is_zero(page) { &[] } else { page }
}

/// Bytes that a chunk takes.
fn packed(chunk: &[u8], level: Option<i32>) -> Result<u64> {
    let plain = chunk.len();
    Ok(match level {
        Some(level) => zstd::bulk::compress(chunk, level)?.len().min(plain),
        None => plain,
    } as u64)
}
