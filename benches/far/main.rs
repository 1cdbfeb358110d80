//! Reverts of a snapshot that is still in an object store, behind a network of this much latency and
//! bandwidth; beside them, in turn, what downloading it first takes, and what QEMU's own file takes
//! (mapped-ram):
//!
//!     cargo bench --features internals --bench far
//!
//! A guest is booted, saved, its working set harvested, and pushed to a real server of S3 on the
//! loopback. Then, again and again with an empty cache: it is reverted from there; it is pulled whole
//! and reverted from the file; QEMU's file is downloaded by a like network, and loaded by QEMU. Prints
//! tables for docs/performance.md.

mod mapped_ram;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use mapped_ram::MappedRam;
use serde_json::Value;
use support::proxy::Proxy;
use support::s3::{BUCKET, S3Server, environment};
use support::{Attached, Fill, Guest, GuestOptions, Qemu, Result, SOON, SerialLog};

#[derive(Parser)]
struct Options {
    /// RAM in MiB
    #[arg(long, default_value_t = 2048)]
    mib: u64,
    /// What the guest fills with what does not compress, in MiB
    #[arg(long, default_value_t = 1024)]
    fill: u64,
    /// Round trip, in milliseconds
    #[arg(long, default_value_t = 20)]
    latency: u64,
    /// Bandwidth, in MB/s
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// Reverts of each kind
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Where images, store and caches lie
    #[arg(long, default_value = "/dev/shm")]
    folder: std::path::PathBuf,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// Heartbeats that are waited for.
const BEATS: u64 = 20;

fn main() -> ExitCode {
    support::exit_code("far", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::Builder::new().prefix("snapback-far-").tempdir_in(&options.folder)?;
    let folder = folder.path();
    let server = S3Server::start(&folder.join("store"))?;
    let proxy = Proxy::start(server.address())?;
    let image = folder.join("vm.snap");
    let guest_options = GuestOptions {
        qemu: Qemu::V10,
        mib: options.mib,
        fill: Fill::Mib(options.fill),
        hot_pages: 1000,
        rate: 20,
        random_percent: 95,
        zero_percent: 1,
        beat_ms: 50,
        ..GuestOptions::default()
    };
    let guest = Guest::boot(&guest_options)?;
    let bench = Bench { folder, proxy: &proxy, from: guest.dir.clone() };
    bench.said(&["save", "--qmp", text(&guest.qmp_path)?, text(&image)?])?;
    let peer = MappedRam::save(&guest, &guest_options, folder)?;
    // Its folder stays: QEMU is started in it again.
    let _folder = guest.kill();
    bench.said(&["working-set", "--harvest", text(&image)?])?;
    bench.said(&["init"])?;
    let began = Instant::now();
    bench.said(&["push", "--name", "web1", text(&image)?])?;
    let pushed = began.elapsed().as_secs_f64();
    let bytes = fs::metadata(&image)?.len();
    println!("push: {:.0} MB/s of {} MiB", bytes as f64 / 1e6 / pushed, bytes >> 20);

    for network in [&proxy, peer.proxy()] {
        network.set_latency(Duration::from_millis(options.latency));
        network.set_rate(Some(options.rate * 1_000_000));
    }
    let mut columns: [Vec<f64>; 11] = Default::default();
    for run in 0..options.runs {
        eprintln!("run {run}");
        let cache = folder.join("cache");
        let _ = fs::remove_dir_all(&cache);
        let name = format!("s3://{BUCKET}/bench/web1@latest");
        let far = bench.revert(&name, &["--cache", text(&cache)?])?;
        let again = bench.revert(&name, &["--cache", text(&cache)?])?;
        let pulled = folder.join("pulled.snap");
        let began = Instant::now();
        bench.said(&["pull", "--force", "web1@latest", text(&pulled)?])?;
        let download = began.elapsed().as_secs_f64() * 1e3;
        let local = bench.revert(text(&pulled)?, &[])?;
        fs::remove_file(&pulled)?;
        let peer_download = peer.download(folder)?;
        let peer_load = peer.load(folder)?;
        let figures = [
            far.running - far.ready,
            local.running - local.ready,
            far.beats - far.running,
            far.fetched_at_beats as f64 / (1 << 20) as f64,
            far.resident - far.ready,
            download,
            local.resident - local.ready,
            again.resident - again.ready,
            again.fetched as f64 / 1024.0,
            peer_download,
            peer_load,
        ];
        columns.iter_mut().zip(figures).for_each(|(column, figure)| column.push(figure));
    }
    println!(
        "\n{} MiB, {} MiB in the image, {} in mapped-ram, {} ms, {} MB/s. Median [least..most] of {}.\n",
        options.mib,
        bytes >> 20,
        peer.bytes()? >> 20,
        options.latency,
        options.rate,
        options.runs
    );
    let names = [
        "from afar: QEMU ready to running, ms",
        "the same from a file, ms",
        "running to 20 heartbeats (50 ms each), ms",
        "fetched until then, MiB",
        "QEMU ready to resident, ms",
        "beside it: download, ms",
        "... and revert of the file to resident, ms",
        "a second revert to resident, ms",
        "fetched by it, KiB",
        "QEMU's mapped-ram: download, ms",
        "... and QEMU ready to running, ms",
    ];
    println!("| quantity | |\n|---|---|");
    for (name, column) in names.iter().zip(&mut columns) {
        column.sort_by(f64::total_cmp);
        let (least, median, most) = (column[0], column[column.len() / 2], column[column.len() - 1]);
        println!("| {name} | {median:.1} [{least:.1}..{most:.1}] |");
    }
    Ok(())
}

struct Bench<'a> {
    folder: &'a Path,
    proxy: &'a Proxy,
    from: std::path::PathBuf,
}

/// What a revert took, in milliseconds since it was started.
#[derive(Default)]
struct Times {
    ready: f64,
    running: f64,
    beats: f64,
    fetched_at_beats: u64,
    resident: f64,
    fetched: u64,
}

impl Bench<'_> {
    fn path(&self, to: &str) -> Result<String> {
        let to = self.folder.join(to);
        fs::create_dir_all(&to)?;
        Ok(format!("{}={}", text(&self.from)?, text(&to)?))
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
        command.args(words).arg("--json").stdin(Stdio::null());
        command.env("SNAPBACK_REPOSITORY", format!("s3://{BUCKET}/bench"));
        command.envs(environment(self.proxy.address()));
        command
    }

    fn said(&self, words: &[&str]) -> Result<()> {
        let ended = self.command(words).output()?;
        match ended.status.success() {
            true => Ok(()),
            false => Err(format!("{words:?}: {}", String::from_utf8_lossy(&ended.stdout)).into()),
        }
    }

    fn revert(&self, image: &str, more: &[&str]) -> Result<Times> {
        let to = self.folder.join("reverted");
        let _ = fs::remove_dir_all(&to);
        let path = self.path("reverted")?;
        let words =
            [&["revert", image, "--path", &path, "--overlay-dir", text(&to)?], more].concat();
        let before = self.proxy.bytes().0;
        let began = Instant::now();
        let now = || began.elapsed().as_secs_f64() * 1e3;
        let mut child =
            self.command(&words).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let said = child.stdout.take().ok_or("no output")?;
        let mut times = Times::default();
        let mut guest = None;
        std::thread::scope(|scope| -> Result<()> {
            let mut beats = None;
            for line in BufReader::new(said).lines() {
                let event: Value = serde_json::from_str(&line?)?;
                match event["event"].as_str().unwrap_or_default() {
                    "qemu_ready" => times.ready = now(),
                    "running" => {
                        times.running = now();
                        let pid = event["pid"].as_u64().ok_or("no process")? as u32;
                        guest = Some(Attached::to(pid, &to)?);
                        let log = to.join("serial0.log");
                        beats = Some(scope.spawn(move || {
                            let log = SerialLog::whole(&log);
                            let first = log.wait_beat(0, SOON).map(|beat| beat.number);
                            let last =
                                first.and_then(|first| log.wait_beat(first + BEATS - 2, SOON));
                            last.map(|_| (now(), self.proxy.bytes().0)).map_err(|e| e.to_string())
                        }));
                    }
                    "resident" => times.resident = now(),
                    "error" => return Err(event.to_string().into()),
                    _ => {}
                }
            }
            let beats = beats.ok_or("it did not run")?.join().map_err(|_| "a panic")?;
            let (at, bytes) = beats?;
            (times.beats, times.fetched_at_beats) = (at, bytes - before);
            Ok(())
        })?;
        child.wait()?;
        times.fetched = self.proxy.bytes().0 - before;
        drop(guest);
        Ok(times)
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| "a path that is not UTF-8".into())
}
