//! Many guests of one image at once, mapped from a flat image and served from a packed one:
//!
//!     cargo bench --features internals --bench clones
//!
//! Boots a guest, saves it, lays the image out flat, and brings it back N times side by
//! side by each way. How soon each runs, and what all of them take once every guest has
//! read all of its memory: a page that several processes share counts for each by its
//! part (Pss, proc_pid_smaps(5)). Then the same image is brought back many times at once by one
//! command. Prints tables for docs/performance.md.

#[path = "image_sweep/guests.rs"]
mod guests;
#[path = "../tests/support/mod.rs"]
mod support;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use guests::{Kind, save, snapback};
use serde_json::Value;
use snapback::cancel::Cancellation;
use snapback::image::Image;
use snapback::page::PAGE_SIZE;
use snapback::revert::{Placement, RevertEvent, RevertOptions, revert};
use support::{Attached, Pidfd, Qemu, Result, percentile};

const MIB: f64 = (1u64 << 20) as f64;

/// What a guest may take beside memory that is shared or its own (the target), in MiB.
const EACH_MIB: f64 = 60.0;

/// From QEMU ready to the guest running (the target), in milliseconds.
const RUNNING_MS: f64 = 5.0;

#[derive(Parser)]
struct Options {
    /// Guests at once
    #[arg(long, default_value_t = 8)]
    clones: usize,
    /// Guests that one command brings back at once
    #[arg(long, default_value_t = 16)]
    together: usize,
    /// How often it does
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// RAM of each, in MiB
    #[arg(long, default_value_t = 1024)]
    mib: u64,
    /// The QEMU, by its number
    #[arg(long, default_value = "10", value_parser = Qemu::parse)]
    qemu: Qemu,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("clones", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::Builder::new().prefix("snapback-clones-").tempdir()?;
    let (packed, flat) = (folder.path().join("vm.snap"), folder.path().join("flat.snap"));
    eprintln!("booting");
    let guest = Kind::Oracle.at_work(options.qemu, options.mib, folder.path())?;
    save(&guest, &packed, &[])?;
    let recorded = guest.dir.clone();
    let _kept = guest.kill();
    let words = ["flatten".as_ref(), packed.as_os_str(), flat.as_os_str()];
    snapback(&[&words[..], &["--layout", "flat"].map(OsStr::new)].concat())?;

    let shared = Image::open(&flat)?.manifest().data_pages as f64 * PAGE_SIZE as f64 / MIB;
    println!(
        "{} guests of {} MiB, {shared:.0} MiB of it data, each of which has read it all.\n",
        options.clones, options.mib
    );
    println!(
        "| way | ready to running, ms | Pss of all, MiB | of each | of it written, all | bound |\n\
         |---|---|---|---|---|---|"
    );
    let runtime = tokio::runtime::Runtime::new()?;
    let ways = [(&flat, Placement::Map, "map"), (&packed, Placement::Uffd, "uffd")];
    for (image, placement, name) in ways {
        let mut clones = Vec::new();
        for number in 0..options.clones {
            let place = folder.path().join(format!("{name}-{number}"));
            clones.push(runtime.block_on(Running::start(image, placement, &recorded, place))?);
        }
        for clone in &mut clones {
            let verdict = clone.guest.oracle.check()?;
            if !verdict.ok() {
                return Err(format!("the memory of a clone is bad: {verdict:?}").into());
            }
        }
        let sum = |field: &str| -> Result<f64> {
            clones.iter().map(|clone| smaps(clone.guest.pid, field)).sum()
        };
        let (pss, written) = (sum("Pss")?, sum("Private_Dirty")?);
        let bound = shared + written + options.clones as f64 * EACH_MIB;
        let mut times: Vec<f64> =
            clones.iter().map(|clone| clone.took.as_secs_f64() * 1e3).collect();
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let verdict = |met: bool| if met { "met" } else { "MISSED" };
        let (each, count) = (pss / options.clones as f64, times.len() - 1);
        println!(
            "| {name} | {median:.1} [{:.1}..{:.1}] (≤ {RUNNING_MS}: {}) | {pss:.0} | {each:.0} | \
             {written:.0} | {} |",
            times[0],
            times[count],
            verdict(median <= RUNNING_MS),
            match placement {
                Placement::Map => format!("≤ {bound:.0}: {}", verdict(pss <= bound)),
                _ => "-".into(),
            },
        );
    }
    println!(
        "\n| {} clones by one command, until the last runs | ms |\n|---|---|",
        options.together
    );
    for (image, _, name) in ways {
        let mut times = Vec::new();
        for run in 0..options.runs {
            let place = folder.path().join(format!("{name}-together-{run}"));
            times.push(together(image, &place, options.together)?);
        }
        let (least, most) = (percentile(&mut times, 0), percentile(&mut times, 100));
        println!("| {name} | {:.0} [{least:.0}..{most:.0}] |", percentile(&mut times, 50));
    }
    Ok(())
}

/// Has one command bring an image back so many times at once. Returns when the last guest ran, in
/// milliseconds from its start, and ends them all.
fn together(image: &Path, place: &Path, count: usize) -> Result<f64> {
    fs::create_dir(place)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    command.arg("revert").arg(image).args(["--json", "--count", &count.to_string()]);
    command.args(["--name", "w{n}", "--dir"]).arg(place.join("{name}"));
    let mut program = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let output = BufReader::new(program.stdout.take().ok_or("no output")?);
    let (mut guests, mut told) = (Vec::new(), 0.0);
    for line in output.lines() {
        let event: Value = serde_json::from_str(&line?)?;
        if event["event"] == "running" {
            guests.push(Pidfd::open(event["pid"].as_u64().ok_or("no process")? as u32)?);
            told = event["ms"].as_f64().ok_or("no time")?;
        }
        if guests.len() == count {
            break;
        }
    }
    program.kill()?;
    program.wait()?;
    guests.iter().try_for_each(Pidfd::kill)?;
    match guests.len() == count {
        true => Ok(told),
        false => Err(format!("{} of {count} guests ran", guests.len()).into()),
    }
}

/// A guest that was brought back. Dropping it ends it.
struct Running {
    guest: Attached,
    /// From QEMU's first word to the guest running.
    took: Duration,
}

impl Running {
    async fn start(
        image: &Path,
        placement: Placement,
        recorded: &Path,
        place: PathBuf,
    ) -> Result<Running> {
        fs::create_dir(&place)?;
        let text = |path: &Path| path.display().to_string();
        let paths = vec![(text(recorded), text(&place))];
        let mut options = RevertOptions::new(image);
        options.rewrite.paths = paths;
        options.delivery.placement = placement;
        let (mut ready, mut took) = (Instant::now(), Duration::ZERO);
        let reverted = revert(&options, Cancellation::new(), |event| match event {
            RevertEvent::QemuReady { .. } => ready = Instant::now(),
            RevertEvent::Running { .. } => took = ready.elapsed(),
            _ => {}
        })
        .await?;
        Ok(Running { guest: Attached::to(reverted.pid as u32, &place)?, took })
    }
}

/// A sum over a process's memory, in MiB.
fn smaps(pid: u32, field: &str) -> Result<f64> {
    let sums = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = sums.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: f64 =
        line.and_then(|l| l.trim().strip_suffix("kB")).ok_or("no sum")?.trim().parse()?;
    Ok(kib / 1024.0)
}
