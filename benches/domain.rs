//! A domain of libvirt's brought back, by snapback and by libvirt's own ways, in turns:
//!
//!     cargo bench --features internals,libvirt --bench domain
//!
//! Boots a domain of each size that has filled its memory, saves it in each way, and measures from
//! the start of the command to the guest running. Needs root, as the tests of libvirt. Prints a
//! table for docs/performance.md.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use clap::Parser;
use serde_json::Value;
use support::libvirt::{Libvirt, domain_options};
use support::{Fill, Qemu, Result};

/// The domain's name.
const NAME: &str = "measured";

#[derive(Parser)]
struct Options {
    /// RAM, in MiB
    #[arg(long, value_delimiter = ',', default_value = "512,4096")]
    sizes: Vec<u64>,
    /// Runs of each kind a size
    #[arg(long, default_value_t = 6)]
    runs: usize,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("domain", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    println!("| RAM | what | median, ms | min..max |\n|---|---|---|---|");
    for mib in &options.sizes {
        // One libvirt a size: its folder goes with all of its files.
        let libvirt = Libvirt::start()?;
        for (what, mut times) in measure(&libvirt, *mib, options.runs)? {
            times.sort_by(f64::total_cmp);
            let (first, last) = (times[0], times[times.len() - 1]);
            let median = times[times.len() / 2];
            println!("| {mib} MiB | {what} | {median:.0} | {first:.0}..{last:.0} |");
        }
    }
    Ok(())
}

/// The times of each way, in milliseconds.
fn measure(libvirt: &Libvirt, mib: u64, runs: usize) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let mut options = domain_options(NAME, Qemu::V7).with_two_disks();
    options.guest.mib = mib;
    options.guest.fill = Fill::Percent(88);
    (options.guest.random_percent, options.guest.zero_percent) = (99, 0);
    (options.guest.writers, options.guest.rate) = (1, 20);
    // libvirt's, and not ours to kill.
    std::mem::forget(libvirt.boot(&options)?);

    let file = |name: &str| libvirt.path(name).display().to_string();
    let (image, saved, xml) = (file("vm.snap"), file("vm.save"), file("live.xml"));
    let uri = libvirt.uri();
    snapback(&["save", &image, "--domain", NAME, "--connect", &uri, "--compress", "none"])?;
    libvirt.virsh(&["snapshot-create-as", NAME, "internal"])?;
    fs::write(Path::new(&xml), libvirt.virsh(&["dumpxml", NAME, "--migratable"])?)?;
    libvirt.virsh(&["save", NAME, &saved])?;

    let revert = ["revert", &image, "--domain", NAME, "--connect", &uri, "--no-working-set"];
    let by_virsh = |arguments: &[&str]| -> Result<f64> {
        let start = Instant::now();
        libvirt.virsh(arguments)?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        libvirt.virsh(&["destroy", NAME])?;
        Ok(took)
    };
    let mut times = [
        ("libvirt's own start alone (`virsh create --paused`)", Vec::new()),
        ("`snapback revert --domain`", Vec::new()),
        ("`virsh restore` of a file in the page cache", Vec::new()),
        ("`virsh snapshot-revert` of an internal snapshot", Vec::new()),
    ];
    for _ in 0..runs {
        times[0].1.push(by_virsh(&["create", &xml, "--paused"])?);
        times[1].1.push(snapback(&revert)?);
        libvirt.virsh(&["destroy", NAME])?;
        times[2].1.push(by_virsh(&["restore", &saved])?);
        times[3].1.push(by_virsh(&["snapshot-revert", NAME, "internal"])?);
    }
    Ok(times.into())
}

/// Runs the program to its end. Returns the time until it told that a guest runs, or ended, in
/// milliseconds.
fn snapback(arguments: &[&str]) -> Result<f64> {
    let start = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_snapback"));
    let mut child = command.args(arguments).arg("--json").stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let mut running = None;
    for line in lines.map_while(std::io::Result::ok) {
        let event: Value = serde_json::from_str(&line)?;
        if event["event"] == "running" {
            running = Some(start.elapsed());
        }
    }
    let took = running.unwrap_or_else(|| start.elapsed());
    match child.wait()?.success() {
        true => Ok(took.as_secs_f64() * 1e3),
        false => Err(format!("snapback {} failed", arguments.join(" ")).into()),
    }
}
