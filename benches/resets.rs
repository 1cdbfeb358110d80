//! A guest reset inside its own QEMU, beside a plain revert and QEMU's own `snapshot-load` of the
//! same guest:
//!
//!     cargo bench --features internals --bench resets -- --mib 512 --resets 1000
//!
//! Boots a guest, saves it, and reverts it with `--resettable`. Each time it writes a working set
//! of so many MiB, and is reset by the program: from the program's start until QEMU has told that
//! the guest runs. Prints tables for docs/performance.md.

#[path = "image_sweep/guests.rs"]
mod guests;
#[path = "../tests/harness/mod.rs"]
mod harness;
#[path = "../tests/support/mod.rs"]
mod support;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use guests::{Reverted, load_times, snapback};
use harness::{Backing, Ram};
use serde_json::Value;
use snapback::host::uffd::{FaultBuffer, Uffd};
use snapback::page::{BlockId, PAGE_SIZE};
use support::{Disk, Fill, Guest, GuestOptions, Qemu, Result, percentile};

/// Pages of the guest's in a MiB.
const PAGES_A_MIB: u64 = 256;

/// Pages whose first write is timed: 32 MiB.
const FIRST_WRITES: u64 = 8192;

#[derive(Parser)]
struct Options {
    /// RAM of the guest, in MiB
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// What the guest writes ahead of each reset, in MiB
    #[arg(long, value_delimiter = ',', default_value = "1,16")]
    written: Vec<u64>,
    /// Resets for each of these
    #[arg(long, default_value_t = 100)]
    resets: usize,
    /// Plain reverts and `snapshot-load`s beside them
    #[arg(long, default_value_t = 5)]
    peers: usize,
    /// How long a guest is reset without a break, in seconds, while it reads 64 MiB and writes 4 MiB
    /// between any two resets
    #[arg(long, default_value_t = 0)]
    cycles: u64,
    /// The QEMU, by its number
    #[arg(long, default_value = "10", value_parser = Qemu::parse)]
    qemu: Qemu,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("resets", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::Builder::new().prefix("snapback-resets-").tempdir()?;
    let image = folder.path().join("vm.snap");
    let recorded = saved(&options, folder.path(), &image)?;
    println!("A guest of {} MiB, {:?}:\n", options.mib, options.qemu);
    println!(
        "| way | written, MiB | pages | p50, ms | p99 | most | first tenth, p50 | last | server, MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let (mut first, mut bare) = (Vec::new(), Vec::new());
    for number in 0..options.peers {
        let place = folder.path().join(format!("first-{number}"));
        let mut guest =
            Reverted::start(&image, &recorded, &place, &["--resettable"], "resettable")?;
        first.push(guest.first_writes()?);
        bare.push(bare_first_writes()?);
    }
    let place = folder.path().join("reset");
    let mut guest = Reverted::start(&image, &recorded, &place, &["--resettable"], "resettable")?;
    for written in options.written.iter().filter(|_| options.resets > 0) {
        guest.measure(*written, options.resets)?;
    }
    if options.cycles > 0 {
        guest.cycle(Duration::from_secs(options.cycles))?;
    }
    let place = folder.path().join("untracked");
    let mut untracked = Reverted::start(&image, &recorded, &place, &[], "resident")?;
    costs(&mut untracked, &mut guest, options.peers)?;
    if options.peers > 0 {
        row("a page's first write, one behind the other (µs)", &mut first);
        row("the same, with nothing but a thread that lets it be written (µs)", &mut bare);
    }
    drop((guest, untracked));
    for number in 0..options.peers.min(1) {
        let place = folder.path().join(format!("loadvm-{number}"));
        let guest = Reverted::start(&image, &recorded, &place, &[], "resident")?;
        row("QEMU's snapshot-load", &mut load_times(&guest.socket, options.peers)?);
    }
    let mut times = Vec::new();
    for number in 0..options.peers {
        let place = folder.path().join(format!("revert-{number}"));
        times.push(Reverted::start(&image, &recorded, &place, &[], "running")?.told);
    }
    if !times.is_empty() {
        row("a plain revert, to running", &mut times);
    }
    Ok(())
}

/// What tracking costs a guest whose working set has been written: its writes a second, untracked
/// and tracked by turns.
fn costs(untracked: &mut Reverted, tracked: &mut Reverted, turns: usize) -> Result<()> {
    let mut shares = Vec::new();
    for _ in 0..turns {
        let (without, with) = (untracked.writes_a_second()?, tracked.writes_a_second()?);
        shares.push(with / without);
    }
    let mut sweeps = Vec::new();
    for _ in 0..turns * 3 {
        sweeps.push(untracked.sweep()?.as_secs_f64() * 1e3);
    }
    if !shares.is_empty() {
        row("reading 64 MiB and writing 4 MiB, untracked", &mut sweeps);
        println!(
            "| writes a second, tracked / untracked | 8 | | {:.3} | | {:.3} | | | |",
            percentile(&mut shares, 50),
            percentile(&mut shares, 100),
        );
    }
    Ok(())
}

/// What a write-protected page's first write takes in memory of this process, in µs: a thread hears of
/// it, and lets it be written. The same pages as [`Reverted::first_writes`], in the same order.
fn bare_first_writes() -> Result<f64> {
    let ram = Ram::new(&[(Backing::Anonymous, FIRST_WRITES)])?;
    let (start, len) = (ram.address(BlockId(0)), FIRST_WRITES * PAGE_SIZE as u64);
    let write = || {
        let begun = Instant::now();
        for at in (start..start + len).step_by(PAGE_SIZE) {
            // SAFETY: a byte of a mapping that `ram` owns and to which it has given out no reference.
            unsafe { (at as *mut u8).write_volatile(1) };
        }
        begun.elapsed()
    };
    write();
    let uffd = Uffd::create()?;
    uffd.register_for_tracking(start, len)?;
    uffd.protect(start, len)?;
    let done = AtomicBool::new(false);
    let waited = thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let mut buffer = FaultBuffer::default();
            while !done.load(Ordering::Relaxed) {
                for fault in uffd.read_faults(&mut buffer).expect("faults") {
                    let page = fault.address & !(PAGE_SIZE as u64 - 1);
                    uffd.unprotect(page, PAGE_SIZE as u64).expect("a page that can be written");
                }
            }
        });
        let waited = write();
        done.store(true, Ordering::Relaxed);
        answers.join().expect("the thread ends well");
        waited
    });
    let again = write();
    Ok(waited.saturating_sub(again).as_secs_f64() * 1e6 / FIRST_WRITES as f64)
}

/// Boots a guest and saves it, idle. Returns where its files were.
fn saved(options: &Options, folder: &Path, image: &Path) -> Result<PathBuf> {
    let disk = Disk::new("d0", &folder.join("disk.qcow2"));
    disk.make(64)?;
    let mut guest = Guest::boot(&GuestOptions {
        qemu: options.qemu,
        mib: options.mib,
        fill: Fill::Mib((options.mib / 2).min(1024)),
        virtio_blk: true,
        disks: vec![disk],
        ..GuestOptions::default()
    })?;
    guest.oracle.ask("idle")?;
    let words = ["save".as_ref(), "--qmp".as_ref(), guest.qmp_path.as_os_str(), image.as_os_str()];
    snapback(&words)?;
    let recorded = guest.dir.clone();
    drop(guest.kill());
    Ok(recorded)
}

impl Reverted {
    /// What a page's first write takes it, in µs, beside what the same writes take once all are
    /// written. It must not have been reset: what was written ahead of a reset is set aside ahead of
    /// the writes behind it.
    fn first_writes(&mut self) -> Result<f64> {
        let mut write = |pages: u64| -> Result<Duration> {
            let start = Instant::now();
            self.guest.oracle.ask(&format!("sweep 0 {pages}"))?;
            Ok(start.elapsed())
        };
        // QEMU has translated what the guest does then.
        (0..10).try_for_each(|_| write(PAGES_A_MIB).map(drop))?;
        let (first, again) = (write(FIRST_WRITES)?, write(FIRST_WRITES)?);
        let pages = FIRST_WRITES - PAGES_A_MIB;
        Ok(first.saturating_sub(again).as_secs_f64() * 1e6 / pages as f64)
    }

    /// Resets it again and again, each time with so much written.
    fn measure(&mut self, written: u64, resets: usize) -> Result<()> {
        let pages_written = written * PAGES_A_MIB;
        let (mut times, mut pages) = (Vec::new(), Vec::new());
        for _ in 0..resets {
            self.guest.oracle.ask(&format!("sweep 0 {pages_written}"))?;
            let event = self.reset()?;
            times.push(event["ms"].as_f64().ok_or("no time")?);
            pages.push(event["pages"].as_u64().ok_or("no pages")?);
        }
        pages.sort_unstable();
        let tenth = (times.len() / 10).max(1);
        let p50 = |times: &[f64]| percentile(&mut times.to_vec(), 50);
        let (first, last) = (p50(&times[..tenth]), p50(&times[times.len() - tenth..]));
        let server = support::resident_kib(self.server.id())? / 1024;
        println!(
            "| reset | {written} | {} | {:.1} | {:.1} | {:.1} | {first:.1} | {last:.1} | {server} |",
            pages[pages.len() / 2],
            percentile(&mut times, 50),
            percentile(&mut times, 99),
            percentile(&mut times, 100),
        );
        Ok(())
    }

    /// Resets it without a break for so long.
    fn cycle(&mut self, time: Duration) -> Result<()> {
        let (start, mut resets, mut swept) = (Instant::now(), 0u32, Duration::ZERO);
        while start.elapsed() < time {
            swept += self.sweep()?;
            self.reset()?;
            resets += 1;
        }
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "| {:.1} resets a second for {seconds:.0} s; the guest worked for {:.1} ms between two | \
             4 | | | | | | | {} |",
            f64::from(resets) / seconds,
            swept.as_secs_f64() * 1e3 / f64::from(resets),
            support::resident_kib(self.server.id())? / 1024,
        );
        Ok(())
    }

    /// Has it read 64 MiB and write 4 MiB. Returns how long that takes it.
    fn sweep(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let (read, written) = (64 * PAGES_A_MIB, 4 * PAGES_A_MIB);
        self.guest.oracle.ask(&format!("sweep {read} {written}"))?;
        Ok(start.elapsed())
    }

    /// How many pages of 8 MiB it rewrites a second, once all have been rewritten.
    fn writes_a_second(&mut self) -> Result<f64> {
        const SECONDS: u64 = 2;
        let pages = 8 * PAGES_A_MIB;
        let oracle = &mut self.guest.oracle;
        oracle.ask(&format!("sweep 0 {pages}"))?;
        oracle.ask(&format!("writers 1 0 {pages}"))?;
        let (before, start) = (oracle.stat("rewritten")?, Instant::now());
        std::thread::sleep(Duration::from_secs(SECONDS));
        let written = oracle.stat("rewritten")? - before;
        let rate = written as f64 / start.elapsed().as_secs_f64();
        oracle.ask("idle")?;
        Ok(rate)
    }

    fn reset(&self) -> Result<Value> {
        let words = ["reset", "--json", "--in-place", "--qmp"].map(OsStr::new);
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        let ended = command.args(words).arg(&self.socket).output()?;
        let said = String::from_utf8_lossy(&ended.stdout).into_owned();
        match ended.status.success() {
            true => Ok(serde_json::from_str(said.lines().last().unwrap_or_default())?),
            false => Err(format!("a reset failed: {said}").into()),
        }
    }
}

fn row(way: &str, times: &mut [f64]) {
    println!(
        "| {way} | | | {:.1} | | {:.1} | | | |",
        percentile(times, 50),
        percentile(times, 100)
    );
}
