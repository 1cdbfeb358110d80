//! Forks of a running guest, and saves of it beside QEMU's own:
//!
//!     cargo bench --features internals --bench fork
//!
//! For each size three equal guests are booted that are nearly at rest. In turn one is saved by
//! `snapback save`, one by the same with `--read stream`, and one by QEMU alone, as a background snapshot
//! into a file of the same file system: each has a guest of its own, since what a way does to the guest's
//! memory (a snapshot splits its huge pages) is what its next save meets. The first is then forked by the
//! program `snapback fork` again and again, each clone ended once it has all its memory. At last all three
//! rewrite memory as fast as they can, and are saved in the same ways: how much they rewrite meanwhile. Prints
//! tables for docs/performance.md.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::{Value, json};
use support::{Attached, Fill, Guest, GuestOptions, Qemu, Result, SerialLog, qmp, wait_for};

/// Pages that a guest at work rewrites again and again: 128 MiB.
const HOT_PAGES: u64 = 32 << 10;

/// How long a guest at work is watched: no save takes as long.
const WINDOW: Duration = Duration::from_secs(8);

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
        at_work(&mut guests, folder.path(), options.runs)?;
    }
    Ok(())
}

/// Equal guests, one for each way of saving.
struct Guests {
    ours: Guest,
    stream: Guest,
    peer: Guest,
}

/// A quantity as it was measured.
#[derive(Default)]
struct Times(Vec<f64>);

impl Times {
    fn sort(&mut self) {
        self.0.sort_by(f64::total_cmp);
    }

    fn median(&mut self) -> f64 {
        self.sort();
        self.0.get(self.0.len() / 2).copied().unwrap_or_default()
    }

    /// The least and the most.
    fn ends(&mut self) -> [f64; 2] {
        self.sort();
        [self.0.first(), self.0.last()].map(|end| end.copied().unwrap_or_default())
    }

    fn line(&mut self, name: &str) {
        if self.0.is_empty() {
            return;
        }
        let (median, [least, most]) = (self.median(), self.ends());
        println!("| {name} | {median:.1} [{least:.1}..{most:.1}] |");
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The events that the program prints.
fn snapback(words: &[&str]) -> Result<Vec<Value>> {
    let program = env!("CARGO_BIN_EXE_snapback");
    let ended = Command::new(program).args(words).stderr(Stdio::null()).output()?;
    if !ended.status.success() {
        return Err(format!("`snapback {}` failed", words.join(" ")).into());
    }
    let lines = ended.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    Ok(lines.map(serde_json::from_slice).collect::<std::result::Result<_, _>>()?)
}

fn event<'a>(events: &'a [Value], name: &str) -> Result<&'a Value> {
    let found = events.iter().find(|event| event["event"] == name);
    found.ok_or_else(|| format!("no event `{name}`").into())
}

/// Saves in turn by each way; what is saved is as much each time, to a few pages.
fn saves(guests: &Guests, folder: &Path, runs: usize) -> Result<()> {
    let (mut ours, mut stream, mut peer) = (Times::default(), Times::default(), Times::default());
    let (mut pause, mut stream_pause) = (Times::default(), Times::default());
    let mut protected = [Times::default(), Times::default()];
    let image = folder.join("vm.snap");
    for _ in 0..runs {
        let reads = [
            ("auto", &guests.ours, &mut ours, &mut pause),
            ("stream", &guests.stream, &mut stream, &mut stream_pause),
        ];
        for ((read, guest, times, pauses), protected) in reads.into_iter().zip(&mut protected) {
            let begun = Instant::now();
            let events = saved(guest, read, &image)?;
            times.0.push(ms(begun.elapsed()));
            let moment = event(&events, "moment")?;
            pauses.0.push(moment["pause_ms"].as_f64().unwrap_or_default());
            let at = |event: &Value| event["ms"].as_f64().unwrap_or_default();
            protected.0.push(at(event(&events, "saved")?) - at(moment));
            fs::remove_file(&image)?;
        }
        peer.0.push(ms(saved_by_qemu(&guests.peer, &folder.join("stream"))?));
    }
    println!("| saves | ms |\n|---|---|");
    ours.line("command to whole image");
    stream.line("the same, `--read stream`");
    peer.line("QEMU's own");
    let ratio = ours.median() / peer.median();
    println!("| - ratio of the medians to QEMU's own | {ratio:.3} |");
    pause.line("pause");
    stream_pause.line("pause, `--read stream`");
    let [mut direct, mut stream] = protected;
    direct.line("moment to whole image");
    stream.line("the same, `--read stream`");
    println!();
    Ok(())
}

/// Saves a guest by the program. Returns its events.
fn saved(guest: &Guest, read: &str, image: &Path) -> Result<Vec<Value>> {
    let (qmp, image) = (guest.qmp_path.display().to_string(), image.display().to_string());
    snapback(&["save", "--json", "--compress", "none", "--read", read, "--qmp", &qmp, &image])
}

/// How much memory guests rewrite in the same time, most of which QEMU's own save takes, while they are saved,
/// each by its way, and how much alone.
fn at_work(guests: &mut Guests, folder: &Path, runs: usize) -> Result<()> {
    let image = folder.join("vm.snap");
    let by_us = |read: &'static str| {
        let image = image.clone();
        move |guest: &Guest| {
            saved(guest, read, &image)?;
            Ok(fs::remove_file(&image)?)
        }
    };
    let by_qemu = |guest: &Guest| saved_by_qemu(guest, &folder.join("stream")).map(drop);
    type Way<'a> = Box<dyn Fn(&Guest) -> Result<()> + 'a>;
    let mut ways: [(&str, &mut Guest, Way<'_>, Times, Times); 3] = [
        (
            "`snapback save`",
            &mut guests.ours,
            Box::new(by_us("auto")),
            Times::default(),
            Times::default(),
        ),
        (
            "`--read stream`",
            &mut guests.stream,
            Box::new(by_us("stream")),
            Times::default(),
            Times::default(),
        ),
        ("QEMU's own", &mut guests.peer, Box::new(by_qemu), Times::default(), Times::default()),
    ];
    for (_, guest, way, alone, meanwhile) in &mut ways {
        guest.oracle.ask(&format!("writers 1 0 {HOT_PAGES}"))?;
        for _ in 0..runs {
            alone.0.push(rewritten(guest, |_| Ok(()))?);
            meanwhile.0.push(rewritten(guest, &**way)?);
        }
        guest.oracle.set_writers(0, 0)?;
    }
    println!(
        "\n| pages a second that a guest at work rewrites in {} s | with a save | of what it does alone |\n|---|---|---|",
        WINDOW.as_secs(),
    );
    for (name, _, _, alone, meanwhile) in &mut ways {
        let share = meanwhile.median() / alone.median();
        let (median, [least, most]) = (meanwhile.median(), meanwhile.ends());
        println!("| {name} | {median:.0} [{least:.0}..{most:.0}] | {share:.2} |");
    }
    Ok(())
}

/// How many pages a second a guest rewrites from when something is begun, for as long as is measured.
fn rewritten(guest: &mut Guest, done: impl Fn(&Guest) -> Result<()>) -> Result<f64> {
    let (before, begun) = (guest.oracle.stat("rewritten")?, Instant::now());
    done(guest)?;
    std::thread::sleep(WINDOW.saturating_sub(begun.elapsed()));
    let written = guest.oracle.stat("rewritten")? - before;
    Ok(written as f64 / begun.elapsed().as_secs_f64())
}

/// A background snapshot by QEMU into a file, until it is whole and synced.
fn saved_by_qemu(guest: &Guest, file: &Path) -> Result<Duration> {
    let background = |state: bool| json!({ "capabilities": [{ "capability": "background-snapshot", "state": state }] });
    qmp(&guest.qmp_path, "migrate-set-capabilities", background(true))?;
    let begun = Instant::now();
    let uri = format!("exec:cat > {}", file.display());
    qmp(&guest.qmp_path, "migrate", json!({ "uri": uri }))?;
    wait_for(Duration::from_secs(120), "QEMU's snapshot", || {
        let status = qmp(&guest.qmp_path, "query-migrate", json!({}))?["status"].clone();
        Ok((status == "completed").then_some(()))
    })?;
    fs::File::open(file)?.sync_all()?;
    let took = begun.elapsed();
    qmp(&guest.qmp_path, "migrate-set-capabilities", background(false))?;
    fs::remove_file(file)?;
    Ok(took)
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
            let events = snapback(&words);
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
            times.0.extend(value);
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
