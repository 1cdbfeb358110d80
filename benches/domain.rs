//! A domain of libvirt's brought back, by snapback and by libvirt's own ways, in turns:
//!
//!     cargo bench --features internals,libvirt --bench domain
//!
//! Boots a domain of each size that has filled its memory, saves it, shuts it off, and has `snapback
//! bench --domain --peers` measure (docs/bench.md). Needs root, as the tests of libvirt.

#[path = "../tests/support/mod.rs"]
mod support;

use std::process::{Command, ExitCode};

use clap::Parser;
use support::libvirt::{Libvirt, domain_options};
use support::{Fill, Result};

/// The domain's name.
const NAME: &str = "measured";

#[derive(Parser)]
struct Options {
    /// RAM, in MiB
    #[arg(long, value_delimiter = ',', default_value = "512,4096")]
    sizes: Vec<u64>,
    /// Runs of each kind a size
    #[arg(long, default_value_t = 6)]
    runs: u32,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    support::exit_code("domain", run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    for mib in &options.sizes {
        println!("\n## {mib} MiB\n");
        // One libvirt a size: its folder goes with all of its files.
        measure(&Libvirt::start()?, *mib, options.runs)?;
    }
    Ok(())
}

fn measure(libvirt: &Libvirt, mib: u64, runs: u32) -> Result<()> {
    let mut options = domain_options(NAME).with_two_disks();
    options.guest.mib = mib;
    options.guest.fill = Fill::Percent(88);
    (options.guest.random_percent, options.guest.zero_percent) = (99, 0);
    (options.guest.writers, options.guest.rate) = (1, 20);
    // libvirt's, and not ours to kill.
    std::mem::forget(libvirt.boot(&options)?);
    let (image, uri) = (libvirt.path("vm.snap").display().to_string(), libvirt.uri());
    let domain = ["--domain", NAME, "--connect", &uri];
    snapback(&[&["save", &image, "--compress", "none"], &domain[..]].concat())?;
    libvirt.virsh(&["destroy", NAME])?;
    snapback(&[&["bench", &image, "--peers", "--runs", &runs.to_string()], &domain[..]].concat())
}

/// Runs the program to its end.
fn snapback(arguments: &[&str]) -> Result<()> {
    match Command::new(env!("CARGO_BIN_EXE_snapback")).args(arguments).status()?.success() {
        true => Ok(()),
        false => Err(format!("snapback {} failed", arguments.join(" ")).into()),
    }
}
