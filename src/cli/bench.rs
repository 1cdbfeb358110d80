//! `bench`: its arguments, and its result as tables.

use std::path::{Path, PathBuf};

use clap::{Args, builder::RangedU64ValueParser};
use regex::bytes::{Regex, RegexBuilder};

use super::events::CommandEvent;
use super::failure::Failure;
use super::host::parse_port_pair;
use super::output::{Output, print_line, size};
use super::{cancellation, comparison, parse_path_pair, pin};
use crate::bench::tables::{self, Table};
use crate::bench::{
    BenchEvent, BenchOptions, Cache, Measured, Record, Sample, Sign, Summary, csv, report,
};
use crate::guest::NewPort;
use crate::kind::ErrorKind;
use crate::libvirt::DomainAddress;

/// The most memory that a pattern may take, in bytes.
const MAX_PATTERN: usize = 1 << 20;

#[derive(Args)]
pub(super) struct BenchArgs {
    /// The image
    #[arg(required_unless_present = "compare")]
    image: Option<PathBuf>,
    /// Runs of each way
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = RangedU64ValueParser::<u32>::new().range(1..=100_000))]
    runs: u32,
    /// Rounds ahead of the runs that don't count
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = RangedU64ValueParser::<u32>::new().range(0..=1000))]
    warm_up: u32,
    /// Keep this program and all QEMUs to these processors of this host, such as 2-5,8
    #[arg(long, value_name = "CPUS", value_parser = pin::parse_cpus)]
    pin: Option<pin::Cpus>,
    /// Write all runs and the machine's state to this file, for --compare
    #[arg(long, value_name = "FILE.json")]
    save: Option<PathBuf>,
    /// Write each run as a line of this file, with commas
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
    /// Compare two files of --save, and measure nothing: how much each quantity has changed, and
    /// whether that is more than chance
    #[arg(long, num_args = 2, value_names = ["BASE", "NEW"],
          conflicts_with_all = ["image", "save", "csv", "report", "peers", "cold", "extra"])]
    compare: Option<Vec<PathBuf>>,
    /// Measure QEMU's own ways too, from files made of the same guest: a stream, mapped-ram,
    /// loadvm
    #[arg(long)]
    peers: bool,
    /// Measure each way with a cold page cache too
    #[arg(long)]
    cold: bool,
    /// Write a report to this file, as an HTML page
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// The QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    /// Use the path NEW wherever the recorded command line names OLD or a path below it; in
    /// NEW, {run} stands for a private directory of each run
    #[arg(long = "path", value_name = "OLD=NEW", value_parser = parse_path_pair)]
    paths: Vec<(String, String)>,
    /// Bind the port NEW of this host (auto: a free one) wherever the recorded command line binds
    /// OLD
    #[arg(long = "port", value_name = "OLD=NEW", value_parser = parse_port_pair)]
    ports: Vec<(u16, NewPort)>,
    /// A line that matches this regular expression is a sign of life of the guest
    #[arg(long, value_name = "PATTERN", value_parser = parse_pattern, requires = "sign_in")]
    sign: Option<Regex>,
    /// Where signs of life appear: the file or Unix socket of a serial port, as recorded or
    /// below {run}
    #[arg(long, value_name = "PATH", requires = "sign")]
    sign_in: Option<String>,
    /// Wait for so many signs of life
    #[arg(long, value_name = "N", default_value_t = 20, requires = "sign",
          value_parser = RangedU64ValueParser::<u32>::new().range(1..))]
    nth: u32,
    /// Revert the image as siblings of the domain of this name or UUID with which it was saved,
    /// started by libvirt; with --peers beside libvirt's own ways: start, restore, snapshot-revert
    #[arg(long, value_name = "NAME", conflicts_with_all = ["qemu", "ports", "sign", "extra"])]
    domain: Option<String>,
    /// The libvirt to connect to, such as qemu:///system [default: as virsh]
    #[arg(long, value_name = "URI", requires = "domain")]
    connect: Option<String>,
    /// More arguments for QEMU
    #[arg(last = true, value_name = "QEMU ARGS")]
    extra: Vec<String>,
}

fn parse_pattern(text: &str) -> Result<Regex, String> {
    let pattern =
        RegexBuilder::new(text).size_limit(MAX_PATTERN).dfa_size_limit(MAX_PATTERN).build();
    pattern.map_err(|error| error.to_string())
}

pub(super) async fn bench(args: BenchArgs) -> Result<(), Failure> {
    let output = Output::new(args.json);
    if let Some([base, new]) = args.compare.as_deref() {
        return comparison::run(base, new, &output);
    }
    let files = [&args.report, &args.save, &args.csv];
    files.into_iter().flatten().try_for_each(|file| check_writable(file))?;
    if let Some(cpus) = &args.pin {
        cpus.pin().map_err(|e| Failure::io("keeping to the processors of --pin failed", &e))?;
    }
    let sign = args.sign.zip(args.sign_in);
    let domain =
        args.domain.map(|domain| DomainAddress { uri: args.connect, ..DomainAddress::new(domain) });
    let options = BenchOptions {
        runs: args.runs,
        warm_up: args.warm_up,
        pinned: args.pin.map(|cpus| cpus.to_string()),
        peers: args.peers,
        cold: args.cold,
        qemu: args.qemu,
        paths: args.paths,
        ports: args.ports,
        sign: sign.map(|(pattern, path)| Sign { pattern, path, nth: args.nth as usize }),
        extra: args.extra,
        domain,
        // Required, but for a comparison.
        ..BenchOptions::new(args.image.unwrap_or_default())
    };
    let tell = |event: BenchEvent| match args.json {
        true => output.print_json(&event),
        false => say(&output, &event, options.runs),
    };
    let measured = crate::bench::bench(&options, cancellation()?, tell).await?;
    let Measured { summary, runs } = &measured;
    match args.json {
        true => output.print_json(&CommandEvent::Summary(Box::new(summary.clone()))),
        false => print_summary(summary),
    }
    if let Some(path) = &args.save {
        write(path, &format!("{:#}\n", serde_json::to_value(Record::new(summary, runs))?))?;
    }
    if let Some(path) = &args.csv {
        write(path, &csv(runs))?;
    }
    match &args.report {
        Some(path) => write(path, &report::html(summary)),
        None => Ok(()),
    }
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |e| Failure::io(&format!("`{}` can't be written", path.display()), &e);
    std::fs::write(path, text).map_err(failed)
}

/// A file that can't be written is refused before the runs, not after them.
fn check_writable(path: &Path) -> Result<(), Failure> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let has_parent = parent.is_none_or(|parent| parent.is_dir());
    match has_parent && !path.is_dir() {
        true => Ok(()),
        false => {
            let message = format!("`{}` can't be written there", path.display());
            Err(Failure::said(ErrorKind::OptionsInvalid, message))
        }
    }
}

fn say(output: &Output, event: &BenchEvent, runs: u32) {
    match event {
        BenchEvent::Preparing { what } => output.say("preparing", what),
        BenchEvent::Warning { says } => output.say("WARNING", says),
        BenchEvent::Skipped(skipped) => {
            output.say("skipped", &format!("{}: {}", skipped.way.name(), skipped.reason));
        }
        BenchEvent::Run(sample) => {
            let Sample { way, cache, round, start_ms, running_ms, complete_ms, .. } = **sample;
            // When libvirt's own ways have QEMU ready is not seen.
            let (before, from) = match way.is_domains() {
                true => (start_ms, "the start"),
                false => (0.0, "QEMU was ready"),
            };
            let (running, complete) = (before + running_ms, before + running_ms + complete_ms);
            let (way, cache) = (way.name(), cache.name());
            output.say(
                "run",
                &format!(
                    "{round}/{runs} {way}, {cache}: runs {running:.1} ms after {from}, complete \
                     after {complete:.0} ms"
                ),
            );
        }
    }
}

fn print_summary(summary: &Summary) {
    let (subject, host) = (&summary.subject, &summary.host);
    let (memory, data) = (size(subject.memory_bytes), size(subject.data_bytes));
    print_line("");
    print_line(&format!(
        "{}: {memory} of memory, {data} of it data, {} on disk",
        subject.image,
        size(subject.image_bytes)
    ));
    print_line(&format!("QEMU {}, {}", subject.qemu, subject.machine_type));
    print_line(&format!(
        "{}, {} CPUs, {} of RAM, {}, snapback {}",
        host.cpu,
        host.cpus,
        size(host.ram_bytes),
        host.kernel,
        host.snapback
    ));
    print_line(&format!(
        "{} runs of each way: the median, and below it the smallest, the quartiles, the largest",
        subject.runs
    ));
    tables::quantities(summary).iter().for_each(|table| print_table(table, &table.title));
    for table in tables::ratios(summary) {
        print_table(&table, &format!("times as long, {}", table.title));
    }
    for skipped in &summary.skipped {
        print_line(&format!("\nnot measured: {}: {}", skipped.way.name(), skipped.reason));
    }
}

/// Two lines a row, so that the columns are narrow.
fn print_table(table: &Table, title: &str) {
    let first = |titles: &[(String, Cache)], column: usize| match column.checked_sub(1) {
        // A title that goes on for the other state of the page cache is not repeated.
        Some(before) if titles[before].0 == titles[column].0 => String::new(),
        _ => titles[column].0.clone(),
    };
    let titles = (0..table.columns.len()).map(|column| first(&table.columns, column));
    let caches = table.columns.iter().map(|(_, cache)| cache.name().to_owned());
    let mut lines: Vec<Vec<String>> = vec![
        std::iter::once(title.to_owned()).chain(titles).collect(),
        std::iter::once(String::new()).chain(caches).collect(),
    ];
    for (way, cells) in &table.rows {
        let (mut medians, mut spreads) = (vec![way.name().to_owned()], vec![String::new()]);
        for cell in cells {
            let Some(cell) = cell else {
                medians.push("–".into());
                spreads.push(String::new());
                continue;
            };
            let [min, q1, median, q3, max] = cell.show();
            medians.push(median);
            spreads.push(format!("{min} [{q1} {q3}] {max}"));
        }
        lines.extend([medians, spreads]);
    }
    let width = |text: &String| text.chars().count();
    let widths: Vec<usize> = (0..=table.columns.len())
        .map(|column| lines.iter().map(|line| width(&line[column])).max().unwrap_or(0))
        .collect();
    print_line("");
    for line in lines {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            text.push_str(&format!("{cell:<width$}  "));
        }
        print_line(text.trim_end());
    }
}
