//! What chunk size, zstd level and checksum cost and give, on real memory:
//!
//!     cargo bench --bench image_sweep -- [--guests oracle,debian] [--mib N]
//!         [--chunks 4,16,64,256] [--levels none,-5,-1,1,3,9] [--runs N] [--qemu 7|10]
//!         [--image FILE]
//!
//! Boots the guests, saves each while it works, and has the library store that memory
//! in every way, in a file system in memory. With --image, the memory of that image is
//! taken instead. Prints tables for docs/format.md.

mod guests;
mod measure;
mod memory;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use guests::Kind;
use measure::{checksum_rate, one_way};
use memory::Memory;
use snapback::image::Compression;
use snapback::page::PAGE_SIZE;
use support::{Qemu, Result};
use xxhash_rust::xxh3::xxh3_64;

/// A file system in memory: no disk is measured.
const TMPFS: &str = "/dev/shm";

const USAGE: &str = "options: --guests oracle,debian  --mib N  --chunks KIB,…  --levels none|N,…  \
                     --runs N  --qemu 7|10  --image FILE";

const MB: f64 = 1e6;

struct Options {
    guests: Vec<Kind>,
    /// RAM of the guests.
    mib: u64,
    /// Sizes of chunks, in pages.
    chunks: Vec<usize>,
    levels: Vec<Compression>,
    /// How often each figure is taken; the best counts.
    runs: usize,
    qemu: Qemu,
    image: Option<PathBuf>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options {
            guests: vec![Kind::Oracle, Kind::Debian],
            mib: 512,
            chunks: vec![1, 4, 16, 64],
            levels: [None, Some(-5), Some(-1), Some(1), Some(3), Some(9)].map(level).into(),
            runs: 2,
            qemu: Qemu::V7,
            image: None,
        };
        while let Some(name) = args.next() {
            // Cargo adds it.
            if name == "--bench" {
                continue;
            }
            let value = args.next().ok_or(USAGE)?;
            let list = value.split(',');
            match (name.as_str(), value.as_str()) {
                ("--guests", _) => options.guests = list.map(guest).collect::<Result<_>>()?,
                ("--mib", number) => options.mib = number.parse()?,
                ("--chunks", _) => options.chunks = list.map(chunk).collect::<Result<_>>()?,
                ("--levels", _) => {
                    let one = |name| match name {
                        "none" => Ok(level(None)),
                        number => Ok(level(Some(number.parse()?))),
                    };
                    options.levels = list.map(one).collect::<Result<_>>()?;
                }
                ("--runs", number) => options.runs = number.parse()?,
                ("--qemu", "7") => options.qemu = Qemu::V7,
                ("--qemu", "10") => options.qemu = Qemu::V10,
                ("--image", path) => options.image = Some(path.into()),
                _ => return Err(USAGE.into()),
            }
        }
        Ok(options)
    }
}

fn level(level: Option<i32>) -> Compression {
    level.map_or(Compression::None, Compression::Zstd)
}

fn guest(name: &str) -> Result<Kind> {
    match name {
        "oracle" => Ok(Kind::Oracle),
        "debian" => Ok(Kind::Debian),
        _ => Err(USAGE.into()),
    }
}

fn chunk(kib: &str) -> Result<usize> {
    Ok(kib.parse::<usize>()? * 1024 / PAGE_SIZE)
}

fn main() -> ExitCode {
    support::exit_code("image_sweep", run())
}

fn run() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let folder = tempfile::Builder::new().prefix("snapback-sweep-").tempdir_in(TMPFS)?;
    if let Some(image) = &options.image {
        return sweep(&options, &image.display().to_string(), image, folder.path());
    }
    for &kind in &options.guests {
        let image = folder.path().join("guest.snap");
        eprintln!("{}: booting and working", kind.name());
        let guest = kind.at_work(options.qemu, options.mib, folder.path())?;
        guests::save(&guest, &image, &["--compress", "none"])?;
        drop(guest);
        sweep(&options, kind.name(), &image, folder.path())?;
        fs::remove_file(&image)?;
    }
    Ok(())
}

/// Prints the tables of one memory, that of `image`.
fn sweep(options: &Options, name: &str, image: &Path, folder: &Path) -> Result<()> {
    let memory = Memory::of(image)?;
    let stream = stream_bytes(image, &folder.join("stream"))?;
    println!(
        "### {name}\n\n{:.0} MB of memory, {:.0} MB of it not zero; {:.0} MB as a stream file, which \
         `zstd -1` makes {:.0} MB.\n",
        memory.all_bytes() as f64 / MB,
        memory.data_bytes() as f64 / MB,
        stream.plain as f64 / MB,
        stream.zstd as f64 / MB,
    );
    println!(
        "| chunk | codec | save, MB/s | image, MB | of the stream | of its `zstd -1` | one page, µs \
         (p99) | fill, MB/s | by two threads |\n|---|---|---|---|---|---|---|---|---|"
    );
    let path = folder.join("swept.snap");
    for &pages in &options.chunks {
        for &compression in &options.levels {
            let figures = one_way(&memory, &path, compression, pages, options.runs)?;
            let codec = match compression {
                Compression::Zstd(level) => format!("zstd:{level}"),
                _ => "none".into(),
            };
            println!(
                "| {} KiB | {codec} | {:.0} | {:.0} | {:.2} | {:.2} | {:.1} ({:.1}) | {:.0} | {:.0} |",
                pages * PAGE_SIZE / 1024,
                figures.save / MB,
                figures.image as f64 / MB,
                figures.image as f64 / stream.plain as f64,
                figures.image as f64 / stream.zstd as f64,
                figures.page.0.as_secs_f64() * 1e6,
                figures.page.1.as_secs_f64() * 1e6,
                figures.fill[0] / MB,
                figures.fill[1] / MB,
            );
        }
    }
    println!("\n| chunk | xxh3-64, GB/s | crc32c | blake3 |\n|---|---|---|---|");
    for &pages in &options.chunks {
        let chunks = memory.chunks(pages);
        let first = |bytes: &[u8]| {
            blake3::hash(bytes)
                .as_bytes()
                .first_chunk()
                .map_or(0, |first| u64::from_le_bytes(*first))
        };
        println!(
            "| {} KiB | {:.1} | {:.1} | {:.1} |",
            pages * PAGE_SIZE / 1024,
            checksum_rate(&chunks, xxh3_64) / 1e9,
            checksum_rate(&chunks, |bytes| crc32c::crc32c(bytes).into()) / 1e9,
            checksum_rate(&chunks, first) / 1e9,
        );
    }
    println!();
    Ok(())
}

/// Sizes of a stream file.
struct Stream {
    plain: u64,
    /// What `zstd -1` makes of it.
    zstd: u64,
}

/// Exports an image as the stream file that QEMU would have written, and measures it.
fn stream_bytes(image: &Path, stream: &Path) -> Result<Stream> {
    let mut words = ["export", "--to", "stream"].map(OsStr::new).to_vec();
    words.extend([image.as_os_str(), stream.as_os_str()]);
    guests::snapback(&words)?;
    let mut counted = Counted(0);
    zstd::stream::copy_encode(File::open(stream)?, &mut counted, 1)?;
    let plain = fs::metadata(stream)?.len();
    fs::remove_file(stream)?;
    Ok(Stream { plain, zstd: counted.0 })
}

/// Counts what is written to it.
struct Counted(u64);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
