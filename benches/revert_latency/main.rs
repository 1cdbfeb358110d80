//! How instant a revert is, and what a save costs, beside QEMU's own ways:
//!
//!     cargo bench --features internals --bench revert_latency -- [--sizes MIB,MIB…] [--runs N] [--pairs N]
//!         [--idle SECONDS] [--qemu 7|10] [--place auto|uffd|socket]
//!
//! For each size of guest: boots one, most of whose memory is random and at rest,
//! saves it alternately by snapback and by QEMU's background snapshot into a file,
//! and brings it back alternately by snapback and by QEMU's `migrate-incoming` of
//! that file, which is in the page cache. Prints tables for docs/performance.md.

mod huge_pages;
mod idle;
mod reverts;
mod samples;
mod saves;
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use snapback::image::Image;
use snapback::page::PAGE_SIZE;
use snapback::revert::Placement;
use support::{Fill, Guest, GuestOptions, Qemu, Result};
use table::{Figures, HugePages, Reverts, Saves};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;

/// A file system in memory, which shows what a save costs without a disk.
const TMPFS: &str = "/dev/shm";

const USAGE: &str = "options: --sizes MIB,MIB…  --runs N  --pairs N  --idle SECONDS  --qemu 7|10  \
     --place auto|uffd|socket  --compress none|zstd[:LEVEL]";

struct Options {
    /// Sizes of guests, in MiB of RAM.
    sizes: Vec<u64>,
    /// Reverts of each kind.
    runs: usize,
    /// Saves of each kind, to each place.
    pairs: usize,
    /// For how long a server is watched whose guest is at rest; 0 for not at all.
    idle: Duration,
    qemu: Qemu,
    /// By which transport memory goes in our reverts.
    placement: Placement,
    /// How our images are compressed.
    compress: String,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options {
            sizes: vec![512, 2048, 4096],
            runs: 10,
            pairs: 5,
            idle: Duration::from_secs(10),
            qemu: Qemu::V7,
            placement: Placement::Auto,
            compress: "none".into(),
        };
        while let Some(name) = args.next() {
            // Cargo adds it.
            if name == "--bench" {
                continue;
            }
            let value = args.next().ok_or(USAGE)?;
            match (name.as_str(), value.as_str()) {
                ("--sizes", list) => {
                    options.sizes =
                        list.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?;
                }
                ("--runs", count) => options.runs = count.parse()?,
                ("--pairs", count) => options.pairs = count.parse()?,
                ("--idle", seconds) => options.idle = Duration::from_secs(seconds.parse()?),
                ("--qemu", "7") => options.qemu = Qemu::V7,
                ("--qemu", "10") => options.qemu = Qemu::V10,
                ("--place", "auto") => options.placement = Placement::Auto,
                ("--place", "uffd") => options.placement = Placement::Uffd,
                ("--place", "socket") => options.placement = Placement::Socket,
                ("--compress", how) => options.compress = how.into(),
                _ => return Err(USAGE.into()),
            }
        }
        Ok(options)
    }
}

fn main() -> ExitCode {
    support::exit_code("revert_latency", run())
}

fn run() -> Result<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    // Everything goes into folders that are removed at the end.
    let disk = tempfile::Builder::new().prefix("snapback-bench-").tempdir()?;
    let memory = tempfile::Builder::new().prefix("snapback-bench-").tempdir_in(TMPFS)?;
    tempfile::env::override_temp_dir(disk.path()).map_err(|other| {
        format!("the folder for temporary files is {} already", other.display())
    })?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        // Dropping the measuring ends what it started.
        tokio::select! {
            measured = measure_all(&options, disk.path(), memory.path()) => measured,
            _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
            _ = terminate.recv() => Err("ended".into()),
        }
    });
    runtime.shutdown_background();
    memory.close()?;
    disk.close()?;
    outcome
}

async fn measure_all(options: &Options, disk: &Path, memory: &Path) -> Result<()> {
    let (start, load) = (Instant::now(), load());
    let mut all = Vec::new();
    let mut version = String::new();
    for (number, &mib) in options.sizes.iter().enumerate() {
        // What a save costs without a disk is the same a page at every size.
        let memory = (number == 0).then_some(memory);
        let figures;
        (figures, version) = measure(mib, options, disk, memory).await?;
        all.push(figures);
    }
    println!("{}", setting(&version));
    println!(
        "{} reverts of each kind a size, {} pairs of saves. Load average {load} at the start, {} at \
         the end, {:.0} s later. Each cell: median [quartiles] min..max.\n",
        options.runs,
        options.pairs,
        self::load(),
        start.elapsed().as_secs_f64(),
    );
    table::print(&all, options.compress != "none");
    Ok(())
}

/// Measures at one size; gives the figures and QEMU's version.
async fn measure(
    mib: u64,
    options: &Options,
    disk: &Path,
    memory: Option<&Path>,
) -> Result<(Figures, String)> {
    let start = Instant::now();
    let tell = |stage| eprintln!("{mib} MiB: {stage} ({:.0} s)", start.elapsed().as_secs_f64());
    tell("booting");
    let guest_options = GuestOptions {
        qemu: options.qemu,
        mib,
        fill: Fill::Percent(88),
        random_percent: 95,
        zero_percent: 1,
        // At rest, but not dead.
        writers: 1,
        rate: 20,
        beat_ms: 10,
        ..GuestOptions::default()
    };
    let guest = spawn_blocking(move || Guest::boot(&guest_options)).await??;
    let mut figures = Figures { mib, ..Figures::default() };
    // The first save will split them.
    figures.huge.before_save.push(support::huge_bytes(guest.pid, mib)? as f64 / MIB);

    if let Some(memory) = memory {
        tell("saving to memory");
        save_pairs(&guest, memory, options, &mut figures, |all| &mut all.memory).await?;
        for name in ["vm.snap", "stream"] {
            remove(&memory.join(name))?;
        }
    }
    tell("saving to disk");
    save_pairs(&guest, disk, options, &mut figures, |figures| &mut figures.disk).await?;
    let recorded = guest.dir.clone();
    // Its memory is wanted for the page cache. Its folder is not wanted any more.
    drop(guest);

    tell("reverting");
    let (image, stream) = (disk.join("vm.snap"), disk.join("stream"));
    reverts::warm(&stream)?;
    reverts::warm(&image)?;
    let data_mib = data_mib(&image)?;
    for _ in 0..options.runs {
        let ours = reverts::ours(&image, &recorded, options.placement).await?;
        note_revert(&mut figures.ours, &ours);
        figures.beside_data.push(ours.rss_complete as f64 / 1024.0 - data_mib);
        *figures.ways.entry(format!("{:?}", ours.placement)).or_default() += 1;
        figures.qemu_start.push(millis(ours.ready));
        figures.requests.push(ours.requests as f64);
        let peer = reverts::peer(&image, &stream, &recorded).await?;
        note_revert(&mut figures.peer, &peer);
    }
    tell("reverting, with huge pages and without");
    let before = figures.huge.before_save.median().unwrap_or_default();
    for _ in 0..options.pairs {
        for collapse in [true, false] {
            let measured =
                huge_pages::revert_and_save(&image, &recorded, mib, options.placement, collapse)
                    .await?;
            note_huge_pages(&mut figures.huge, &measured, before);
        }
    }
    if !options.idle.is_zero() {
        tell("watching a server whose guest is at rest");
        let (image, placement, idle) = (image.clone(), options.placement, options.idle);
        let cpu =
            spawn_blocking(move || idle::server_cpu(&image, &recorded, placement, idle)).await??;
        figures.idle_cpu.push(cpu);
    }
    let version = Image::open(&image)?.manifest().machine.qemu.to_string();
    remove(&image)?;
    remove(&stream)?;
    Ok((figures, version))
}

/// Saves alternately by us and by the peer, into the same folder.
async fn save_pairs(
    guest: &Guest,
    folder: &Path,
    options: &Options,
    figures: &mut Figures,
    place: impl Fn(&mut Figures) -> &mut Saves,
) -> Result<()> {
    let (image, stream) = (folder.join("vm.snap"), folder.join("stream"));
    for _ in 0..options.pairs {
        remove(&image)?;
        settle().await?;
        let (qmp, target) = (guest.qmp_path.clone(), image.clone());
        let how = options.compress.clone();
        let ours = spawn_blocking(move || saves::ours(&qmp, &target, &how)).await??;
        wait_over(guest).await?;
        remove(&stream)?;
        settle().await?;
        let peer = saves::peer(&guest.qmp_path, &stream).await?;

        let rate = |took: Duration| ours.data_bytes as f64 / took.as_secs_f64() / MIB;
        let (our_rate, peer_rate) = (rate(ours.saved.took), rate(peer.took));
        let saves = place(figures);
        saves.ours.push(our_rate);
        saves.peer.push(peer_rate);
        saves.ratio.push(our_rate / peer_rate);
        if figures.huge.first_save.pause.median().is_none() {
            figures.huge.first_save.pause.push(ours.saved.pause_ms);
            figures.huge.first_save.moment.push(ours.moment_ms);
        }
        figures.pause.push(ours.saved.pause_ms);
        figures.peer_pause.push(peer.pause_ms);
        let peak = ours.peak_kib as f64 / 1024.0;
        figures.save_peak.push(peak);
        figures.save_beside_index.push(peak - index_mib(&image)?);
    }
    Ok(())
}

/// What the image's index takes in memory while it is written: 8 bytes a page and
/// 24 a chunk.
fn index_mib(image: &Path) -> Result<f64> {
    let image = Image::open(image)?;
    let pages: u64 = image.manifest().blocks.iter().map(|block| block.len / PAGE_SIZE as u64).sum();
    Ok((8 * pages + 24 * image.chunk_count()) as f64 / MIB)
}

/// Memory that is not zero.
fn data_mib(image: &Path) -> Result<f64> {
    let pages = Image::open(image)?.manifest().data_pages;
    Ok((pages * PAGE_SIZE as u64) as f64 / MIB)
}

const MIB: f64 = (1 << 20) as f64;

fn note_revert(to: &mut Reverts, reverted: &reverts::Reverted) {
    let since_ready = |at: Duration| millis(at.saturating_sub(reverted.ready));
    to.running.push(since_ready(reverted.running));
    to.beat.push(since_ready(reverted.beat));
    to.complete.push(since_ready(reverted.complete));
    to.rss_running.push(reverted.rss_running as f64 / 1024.0);
    to.rss_complete.push(reverted.rss_complete as f64 / 1024.0);
}

/// Notes what became of huge pages, of which there were so many MiB before the save.
fn note_huge_pages(to: &mut HugePages, measured: &huge_pages::Measured, before: f64) {
    let huge = measured.huge as f64 / MIB;
    let saves = match measured.collapsed {
        Some(collapsed) => {
            to.after_revert.push(collapsed.before as f64 / MIB);
            to.collapsed.push(huge);
            to.share.push(huge / before * 100.0);
            to.took.push(collapsed.took_ms);
            to.gap.push(collapsed.gap_ms as f64);
            to.gap_after.push(measured.gap_after_ms as f64);
            &mut to.save
        }
        None => &mut to.save_without,
    };
    saves.pause.push(measured.pause_ms);
    saves.moment.push(measured.moment_ms);
}

async fn wait_over(guest: &Guest) -> Result<()> {
    let qmp = snapback::qmp::Qmp::connect(&guest.qmp_path, support::SOON).await?;
    saves::wait_over(&qmp).await
}

/// What others have left to write must not count.
async fn settle() -> Result<()> {
    Ok(spawn_blocking(nix::unistd::sync).await?)
}

fn remove(path: &PathBuf) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Where this was measured.
fn setting(qemu: &str) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    let memory = read("/proc/meminfo");
    let total =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let gib = total.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) >> 20;
    format!(
        "QEMU {qemu} (TCG) on Linux {}, {processors} processors ({}), {gib} GiB.",
        read("/proc/sys/kernel/osrelease").trim(),
        model.map_or("unknown", |(_, name)| name),
    )
}

/// The load average over the last minute (proc_loadavg(5)).
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
