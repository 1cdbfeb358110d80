//! Forks of a running guest, and saves of it beside QEMU's own:
//!
//!     cargo bench --features internals --bench fork
//!
//! For each size three equal guests are booted that are nearly at rest. In turn one is saved by
//! `snapback save`, one by the same with `--read stream`, and one by QEMU alone, as a background snapshot
//! into a file of the same file system: each has a guest of its own, since what a way does to the guest's
//! memory (a snapshot splits its huge pages) is what its next save meets. The first is then forked by the
//! program `snapback fork` again and again, each clone ended once it has all its memory; and QEMU's snapshot is
//! loaded by QEMU itself, to see what a first heartbeat costs where all memory is there. At last all three
//! rewrite memory as fast as they can, and are saved in the same ways: how much they rewrite meanwhile. The same
//! is asked of guests with PostgreSQL: how many transactions they commit. Prints tables for
//! docs/performance.md.

mod at_work;
#[path = "../image_sweep/guests.rs"]
mod guests;
#[path = "../../tests/support/mod.rs"]
mod support;
mod ways;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use guests::event;
use serde_json::{Value, json};
use support::{
    Attached, Fill, Guest, GuestOptions, Qemu, Result, SerialLog, cont, qmp, spawn_bound, wait_for,
};
use ways::{Times, Way, ms};

/// Allowed for a QEMU to load a guest.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Parser)]
struct Options {
    /// Sizes of RAM in MiB
    #[arg(long, value_delimiter = ',', default_value = "512,4096")]
    sizes: Vec<u64>,
    /// What the guest fills, in MiB; the rest of its memory is never used
    #[arg(long, default_value_t = 200)]
    fill: u64,
    /// Forks and saves of each kind
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// The QEMU, by its number
    #[arg(long, default_value = "10", value_parser = Qemu::parse)]
    qemu: Qemu,
    /// Saves of each kind of guests at work, which rewrite memory or have a database; 0 leaves them out
    #[arg(long, default_value_t = 5)]
    work: usize,
    /// Where images are written
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("fork", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    for mib in &options.sizes {
        let folder =
            tempfile::Builder::new().prefix("snapback-fork-").tempdir_in(&options.folder)?;
        eprintln!("booting {mib} MiB");
        let equal = GuestOptions {
            qemu: options.qemu,
            mib: *mib,
            fill: Fill::Mib(options.fill),
            hot_pages: 1000,
            rate: 20,
            random_percent: 95,
            zero_percent: 1,
            beat_ms: 10,
            ..GuestOptions::default()
        };
        let boot = || Guest::boot(&equal);
        let mut guests = Guests { ours: boot()?, stream: boot()?, peer: boot()? };
        println!(
            "\n{mib} MiB, of it {} filled. Median [least..most] of {}.\n",
            options.fill, options.runs
        );
        saves(&guests, folder.path(), options.runs)?;
        forks(&guests.ours, folder.path(), options.runs)?;
        loads(&equal, &guests.peer, folder.path(), options.runs)?;
        if options.work > 0 {
            let Guests { ours, stream, peer } = &mut guests;
            at_work::rewriting([ours, stream, peer], folder.path(), options.work)?;
        }
    }
    if options.work > 0 {
        let folder =
            tempfile::Builder::new().prefix("snapback-fork-").tempdir_in(&options.folder)?;
        eprintln!("booting Debian");
        at_work::transacting(options.qemu, folder.path(), options.work)?;
    }
    Ok(())
}

/// Equal guests, one for each way of saving.
struct Guests {
    ours: Guest,
    stream: Guest,
    peer: Guest,
}

/// Saves in turn by each way; what is saved is as much each time, to a few pages.
fn saves(guests: &Guests, folder: &Path, runs: usize) -> Result<()> {
    let [ours, stream, peer] = Way::all(folder, "none");
    let times = || [(); 3].map(|()| Times::default());
    let mut by_program = [(ours, &guests.ours, times()), (stream, &guests.stream, times())];
    let mut by_qemu = Times::default();
    for _ in 0..runs {
        for (way, guest, [times, pauses, protected]) in &mut by_program {
            let (took, events) = way.save(guest)?;
            times.push(ms(took));
            let moment = event(&events, "moment")?;
            pauses.push(moment["pause_ms"].as_f64().unwrap_or_default());
            let at = |event: &Value| event["ms"].as_f64().unwrap_or_default();
            protected.push(at(event(&events, "saved")?) - at(moment));
        }
        by_qemu.push(ms(peer.save(&guests.peer)?.0));
    }
    let [(.., ours), (.., stream)] = &mut by_program;
    println!("| saves | ms |\n|---|---|");
    ours[0].line("command to whole image");
    stream[0].line("the same, `--read stream`");
    by_qemu.line(peer.name);
    let ratio = ours[0].median() / by_qemu.median();
    println!("| - ratio of the medians to QEMU's own | {ratio:.3} |");
    ours[1].line("pause");
    stream[1].line("pause, `--read stream`");
    ours[2].line("moment to whole image");
    stream[2].line("the same, `--read stream`");
    println!();
    Ok(())
}

/// How long guests that QEMU itself has loaded take to their first heartbeat.
fn loads(equal: &GuestOptions, guest: &Guest, folder: &Path, runs: usize) -> Result<()> {
    let mut times = Times::default();
    let stream = folder.join("vm.stream");
    ways::snapshot(guest, &stream)?;
    for run in 0..runs {
        let own = folder.join(format!("load{run}"));
        fs::create_dir(&own)?;
        let log = SerialLog::whole(&own.join("serial0.log"));
        let mut command = equal.qemu.command_for(equal.arch)?;
        command.args(equal.qemu_args(&own)?).arg("-S");
        command.arg("-incoming").arg(format!("exec:cat {}", stream.display()));
        let qemu = spawn_bound(command)?;
        let socket = own.join("qmp.sock");
        wait_for(PATIENCE, "QEMU to listen", || Ok(socket.exists().then_some(())))?;
        let loaded = Attached::to(qemu.id(), &own)?;
        wait_for(PATIENCE, "QEMU to load", || {
            let state = qmp(&socket, "query-status", json!({}))?["status"].clone();
            Ok((state != "inmigrate").then_some(()))
        })?;
        let done = AtomicBool::new(false);
        let first = std::thread::scope(|scope| -> Result<_> {
            let watcher = scope.spawn(|| first_written(&log, &done));
            let begun = Instant::now();
            cont(&socket)?;
            let _ = wait_for(PATIENCE, "a heartbeat", || Ok(log.last_beat()));
            done.store(true, Ordering::Relaxed);
            Ok(watcher.join().ok().flatten().map(|at| ms(at.duration_since(begun))))
        })?;
        first.into_iter().for_each(|first| times.push(first));
        drop(loaded);
        fs::remove_dir_all(&own)?;
    }
    fs::remove_file(&stream)?;
    times.line("loaded by QEMU: told to run to its first heartbeat");
    Ok(())
}

/// When the log had its first heartbeat; nothing if it has none by the time that it is `done`.
fn first_written(log: &SerialLog, done: &AtomicBool) -> Option<Instant> {
    while !done.load(Ordering::Relaxed) {
        if log.last_beat().is_some() {
            return Some(Instant::now());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    None
}

fn forks(guest: &Guest, folder: &Path, runs: usize) -> Result<()> {
    let mut quantities: [(&str, Times); 5] = [
        ("pause", Times::default()),
        ("moment to the clone running", Times::default()),
        ("command to the clone running", Times::default()),
        ("the clone running to its first heartbeat", Times::default()),
        ("moment to all of its memory in place", Times::default()),
    ];
    for run in 0..runs {
        let own = folder.join(format!("clone{run}"));
        let log = SerialLog::whole(&own.join("serial0.log"));
        let (qmp, dir) = (guest.qmp_path.display().to_string(), own.display().to_string());
        let begun = Instant::now();
        let words = ["fork", "--json", "--qmp", &qmp, "--name", "clone", "--dir", &dir];
        let done = AtomicBool::new(false);
        let (events, first) = std::thread::scope(|scope| {
            let watcher = scope.spawn(|| first_written(&log, &done));
            let events = guests::events(&words.map(OsStr::new));
            done.store(true, Ordering::Relaxed);
            (events, watcher.join().ok().flatten())
        });
        let events = events?;
        let (moment, running) = (event(&events, "moment")?, event(&events, "running")?);
        let at = |event: &Value| event["ms"].as_f64().unwrap_or_default();
        let pid = running["qemu_pid"].as_u64().ok_or("no process")? as u32;
        let clone = Attached::to(pid, &own)?;
        let first = first.map(|at| ms(at.duration_since(begun)));
        let measured = [
            moment["pause_ms"].as_f64(),
            running["since_moment_ms"].as_f64(),
            Some(at(running)),
            first.map(|first| first - at(running)),
            Some(at(event(&events, "resident")?) - at(moment)),
        ];
        for ((_, times), value) in quantities.iter_mut().zip(measured) {
            value.into_iter().for_each(|value| times.push(value));
        }
        drop(clone);
        fs::remove_dir_all(&own)?;
    }
    println!("| forks | ms |\n|---|---|");
    for (name, times) in &mut quantities {
        times.line(name);
    }
    Ok(())
}
