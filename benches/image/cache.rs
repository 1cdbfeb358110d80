//! What writing an image does to the page cache, and what that costs.
//!
//! A file of somebody else's lies in the page cache; then an image is written, and how
//! much of both is there afterwards is looked up. With images larger than the memory that
//! is free, the first line shows what is to be avoided. O_DIRECT is measured by itself,
//! with all its bytes in place and aligned: an image would have to be copied for that.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use memmap2::{Mmap, MmapMut};
use snapback::image::{
    CacheUse, Compression, Details, ImageWriter, Sections, WriterOptions, WriterStats,
};
use snapback::page::{BlockId, PAGE_SIZE, Page};

use crate::{Options, Result, blocks, random};

/// Bytes that one direct write carries.
const DIRECT_BYTES: usize = 1 << 20;

/// How one file was written.
struct Written {
    took: Duration,
    stalled: Option<Duration>,
}

pub fn measure(options: &Options, folder: &Path) -> Result<()> {
    let mut source = vec![0; 64 << 20];
    random(&mut source);
    let bystander = folder.join("bystander");
    let mut file = File::create(&bystander)?;
    for _ in 0..options.bystander_mib.div_ceil(64) {
        file.write_all(&source)?;
    }
    file.sync_all()?;
    println!("{} MiB that do not compress, MemFree {} MiB before:\n", options.mib, free_mib()?);
    println!("| way | MB/s until durable | guest waited ms | image in cache | others in cache |");
    println!("|---|---|---|---|---|");
    let path = folder.join("written");
    let ways: [(&str, Option<CacheUse>); 4] = [
        ("page cache", Some(CacheUse::Keep)),
        ("page cache, while memory is free", Some(CacheUse::WhatIsFree)),
        ("page cache, dropped behind", Some(CacheUse::Drop)),
        ("O_DIRECT, plain file", None),
    ];
    for (name, way) in ways {
        read_through(&bystander)?;
        let written = match way {
            Some(cache) => write_image(&path, options.mib, cache, &mut source)?,
            None => write_direct(&path, options.mib, &mut source)?,
        };
        let rate = (options.mib << 20) as f64 / 1e6 / written.took.as_secs_f64();
        let waited =
            written.stalled.map_or("-".into(), |s| format!("{:.0}", s.as_secs_f64() * 1e3));
        let (image, others) = (cached_percent(&path)?, cached_percent(&bystander)?);
        println!("| {name} | {rate:.0} | {waited} | {image} % | {others} % |");
        std::fs::remove_file(&path)?;
    }
    println!();
    Ok(())
}

/// Makes each page of the source another one than the last time.
fn stamp(page: &mut [u8], number: u64) {
    page[..8].copy_from_slice(&number.to_le_bytes());
}

fn write_image(path: &Path, mib: u64, cache: CacheUse, source: &mut [u8]) -> Result<Written> {
    let mut options = WriterOptions::default();
    (options.compression, options.cache) = (Compression::None, cache);
    let start = Instant::now();
    let mut writer = ImageWriter::create(path, options, blocks(mib))?;
    let pages = source.len() / PAGE_SIZE;
    for number in 0..mib << 8 {
        let at = number as usize % pages * PAGE_SIZE;
        let bytes = &mut source[at..at + PAGE_SIZE];
        stamp(bytes, number);
        let page = Page { block: BlockId(0), number };
        writer.page(page, bytes.first_chunk().ok_or("a page is shorter")?)?;
    }
    let WriterStats { stalled, .. } = writer.stats();
    writer.finish(Details::default(), Sections::default())?;
    Ok(Written { took: start.elapsed(), stalled: Some(stalled) })
}

fn write_direct(path: &Path, mib: u64, source: &mut [u8]) -> Result<Written> {
    let start = Instant::now();
    let mut direct = OpenOptions::new();
    direct.write(true).create(true).truncate(true).custom_flags(libc::O_DIRECT);
    let file = direct.open(path)?;
    // A mapping begins at a page, as O_DIRECT wants it (open(2)).
    let mut buffer = MmapMut::map_anon(DIRECT_BYTES)?;
    for number in 0..mib {
        let at = number as usize * DIRECT_BYTES % source.len();
        buffer.copy_from_slice(&source[at..at + DIRECT_BYTES]);
        stamp(&mut buffer, number);
        file.write_all_at(&buffer, number * DIRECT_BYTES as u64)?;
    }
    file.sync_all()?;
    Ok(Written { took: start.elapsed(), stalled: None })
}

fn read_through(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// The share of a file's pages that are in the page cache, in percent.
fn cached_percent(path: &Path) -> Result<usize> {
    let file = File::open(path)?;
    // SAFETY: the mapping is never read; only its address is used, to ask about it.
    let map = unsafe { Mmap::map(&file)? };
    let mut states = vec![0u8; map.len().div_ceil(PAGE_SIZE)];
    // SAFETY: the range is that of a mapping which lives, at a page's start; the vector
    // has a byte for each page of 4096 bytes (mincore(2)), and no kernel has smaller ones.
    let done = unsafe { libc::mincore(map.as_ptr() as *mut _, map.len(), states.as_mut_ptr()) };
    if done != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    let cached = states.iter().filter(|state| *state & 1 != 0).count();
    Ok(cached * 100 / states.len().max(1))
}

fn free_mib() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let kib: u64 = line.and_then(|l| l.trim().strip_suffix(" kB")).ok_or("no MemFree")?.parse()?;
    Ok(kib >> 10)
}
