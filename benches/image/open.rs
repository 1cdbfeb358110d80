//! Opening an image and finding one page: of a machine of 512 MiB, and of a large one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use snapback::image::{Compression, Details, Image, ImageWriter, Sections, WriterOptions};
use snapback::page::{BlockId, Location, PAGE_SIZE, Page, PageSource};

use crate::{Options, Result, blocks, quantile};

/// Of so many pages one holds data, so that each is in a chunk of its own.
const SPREAD: u64 = 16;

const SMALL_MIB: u64 = 512;

/// A synthetic image: its index and its chunk table are as large as real ones.
struct Synthetic {
    mib: u64,
    path: PathBuf,
    cold: Vec<f64>,
    warm: Vec<f64>,
}

impl Synthetic {
    fn write(folder: &Path, mib: u64) -> Result<Synthetic> {
        let path = folder.join(format!("{mib}.snap"));
        let mut options = WriterOptions::default();
        options.compression = Compression::Zstd(1);
        options.chunk_pages = SPREAD as usize;
        let mut writer = ImageWriter::create(&path, options, blocks(mib))?;
        let mut bytes = [0; PAGE_SIZE];
        for number in 0..mib << 8 {
            let page = Page { block: BlockId(0), number };
            match number % SPREAD {
                0 => {
                    bytes[..8].copy_from_slice(&(number + 1).to_le_bytes());
                    writer.page(page, &bytes)?;
                }
                _ => writer.zero(page)?,
            }
        }
        writer.finish(Details::default(), Sections::default())?;
        Ok(Synthetic { mib, path, cold: Vec::new(), warm: Vec::new() })
    }

    /// Opens it and reads one page, in microseconds.
    fn open_and_read(&self, page: Page) -> Result<f64> {
        let start = Instant::now();
        let image = Image::open(&self.path)?;
        let Location::Stored { chunk, slot } = image.find(page)? else {
            return Err("the page holds data".into());
        };
        let mut reader = image.reader()?;
        let bytes = reader.read(chunk)?;
        let took = start.elapsed().as_secs_f64() * 1e6;
        let found = bytes.get(slot * PAGE_SIZE..).and_then(|bytes| bytes.first_chunk());
        assert_eq!(found.map(|bytes| u64::from_le_bytes(*bytes)), Some(page.number + 1));
        Ok(took)
    }

    fn sample(&mut self, round: usize) -> Result<()> {
        let groups = (self.mib << 8) / SPREAD;
        // All over the image, no place twice.
        let number = (round as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % groups * SPREAD;
        let page = Page { block: BlockId(0), number };
        let file = File::open(&self.path)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        self.cold.push(self.open_and_read(page)?);
        self.warm.push(self.open_and_read(page)?);
        Ok(())
    }
}

pub fn measure(options: &Options, folder: &Path) -> Result<()> {
    let mut images =
        [Synthetic::write(folder, SMALL_MIB)?, Synthetic::write(folder, options.ram_gib << 10)?];
    for round in 0..options.runs {
        for image in &mut images {
            image.sample(round)?;
        }
    }
    println!("Opening an image and reading one page, µs, {} times each:\n", options.runs);
    println!("| RAM | file | cold p50 | cold p90 | warm p50 | warm p90 |");
    println!("|---|---|---|---|---|---|");
    let mut cold = Vec::new();
    for image in &mut images {
        let len = std::fs::metadata(&image.path)?.len() >> 20;
        cold.push(quantile(&mut image.cold, 0.5));
        let [p50, p90] = [0.5, 0.9].map(|share| quantile(&mut image.cold, share));
        let [warm50, warm90] = [0.5, 0.9].map(|share| quantile(&mut image.warm, share));
        println!(
            "| {} MiB | {len} MiB | {p50:.0} | {p90:.0} | {warm50:.0} | {warm90:.0} |",
            image.mib
        );
    }
    println!("\nlarge / small, cold, median: {:.2} (to be at most 1.20)\n", cold[1] / cold[0]);
    Ok(())
}
