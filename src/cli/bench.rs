//! `bench`: its arguments, and its result as tables.

use std::path::PathBuf;

use clap::{Args, builder::RangedU64ValueParser};
use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;

use super::output::{Failure, Output, print_line, size};
use super::{interrupts, parse_path_pair};
use crate::bench::{BenchEvent, BenchOptions, Ratio, Sample, Sign, Spread, Summary, Unit, report};

/// The most memory that a pattern may take, in bytes.
const MAX_PATTERN: usize = 1 << 20;

#[derive(Args)]
pub(super) struct BenchArgs {
    /// The image
    image: PathBuf,
    /// Runs of each way
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = RangedU64ValueParser::<u32>::new().range(1..=100_000))]
    runs: u32,
    /// Measure QEMU's own ways too, from files made of the same guest: a stream, mapped-ram,
    /// loadvm
    #[arg(long)]
    peers: bool,
    /// Measure each way with a cold page cache too
    #[arg(long)]
    cold: bool,
    /// Write a report there, a page for a browser
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
    /// The QEMU binary to use instead of the recorded one
    #[arg(long, value_name = "BIN")]
    qemu: Option<PathBuf>,
    /// Use path NEW wherever the recorded command line names OLD, or something below it; in
    /// NEW, {run} stands for a folder that each run has for itself
    #[arg(long = "path", value_name = "OLD=NEW", value_parser = parse_path_pair)]
    paths: Vec<(String, String)>,
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
    if let Some(report) = &args.report {
        check_report(report)?;
    }
    let sign = args.sign.zip(args.sign_in);
    let options = BenchOptions {
        image: args.image,
        runs: args.runs,
        peers: args.peers,
        cold: args.cold,
        qemu: args.qemu,
        paths: args.paths,
        sign: sign.map(|(pattern, path)| Sign { pattern, path, nth: args.nth as usize }),
        extra: args.extra,
    };
    let tell = |event: BenchEvent| match args.json {
        true => output.print_json(&event),
        false => say(&output, &event, options.runs),
    };
    let summary = crate::bench::bench(&options, interrupts()?, tell).await?;
    match args.json {
        true => output.print_json(&with_name(&summary)),
        false => print_summary(&summary),
    }
    if let Some(path) = &args.report {
        std::fs::write(path, report::html(&summary)).map_err(|e| {
            Failure::new(&format!("the report `{}` can't be written", path.display()), &e)
        })?;
    }
    Ok(())
}

/// A report that can't be written is told before the runs, not after.
fn check_report(path: &std::path::Path) -> Result<(), Failure> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let is_folder = folder.is_none_or(|folder| folder.is_dir());
    match is_folder && !path.is_dir() {
        true => Ok(()),
        false => {
            Err(Failure::said(format!("the report `{}` can't be a file there", path.display())))
        }
    }
}

/// The summary as an event.
fn with_name(summary: &Summary) -> Value {
    let mut value = serde_json::to_value(summary).unwrap_or_default();
    value["event"] = "summary".into();
    value
}

fn say(output: &Output, event: &BenchEvent, runs: u32) {
    match event {
        BenchEvent::Preparing { what } => output.say("preparing", what),
        BenchEvent::Skipped(skipped) => {
            output.say("skipped", &format!("{}: {}", skipped.way.name(), skipped.reason));
        }
        BenchEvent::Run(sample) => {
            let Sample { way, cache, round, running_ms, complete_ms, .. } = **sample;
            let (way, cache) = (way.name(), cache.name());
            let complete = running_ms + complete_ms;
            output.say(
                "run",
                &format!(
                    "{round}/{runs} {way}, {cache}: runs {running_ms:.1} ms after QEMU was ready, \
                     complete after {complete:.0} ms"
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
    print_line(&format!("{} runs of each way; cells: median [min q1 · q3 max]", subject.runs));
    for table in summary.tables() {
        let mut rows = vec![vec![table.title.to_owned()], vec![String::new()]];
        for (metric, cache) in &table.columns {
            let title = summary.title(metric);
            let again = rows[0].contains(&title);
            rows[0].push(if again { String::new() } else { title });
            rows[1].push(cache.name().into());
        }
        for way in summary.methods() {
            let cell = |(metric, cache): &(&crate::bench::Metric, _)| {
                summary
                    .spread(way, *cache, metric.key)
                    .map_or("–".into(), |s| show(s, metric.unit))
            };
            let cells = table.columns.iter().map(cell);
            rows.push(std::iter::once(way.name().to_owned()).chain(cells).collect());
        }
        print_table(&rows);
    }
    for (to, title) in summary.compared() {
        print_ratios(summary, to, &title);
    }
    for skipped in &summary.skipped {
        print_line(&format!("\nnot measured: {}: {}", skipped.way.name(), skipped.reason));
    }
}

fn print_ratios(summary: &Summary, to: &str, title: &str) {
    let ratios: Vec<&Ratio> = summary.ratios.iter().filter(|ratio| ratio.to == to).collect();
    let mut columns: Vec<_> = Vec::new();
    for ratio in &ratios {
        if !columns.contains(&(ratio.peer, ratio.cache)) {
            columns.push((ratio.peer, ratio.cache));
        }
    }
    let mut rows = vec![vec![format!("How many times as long: {title}")], vec![String::new()]];
    for (peer, cache) in &columns {
        rows[0].push(peer.name().into());
        rows[1].push(cache.name().into());
    }
    for way in summary.methods().into_iter().filter(|way| !way.is_peer()) {
        let cell = |(peer, cache): &(_, _)| {
            let found =
                ratios.iter().find(|r| r.way == way && r.peer == *peer && r.cache == *cache);
            found.map_or("–".into(), |found| show(&found.ratio, Unit::Ms))
        };
        let cells = columns.iter().map(cell);
        rows.push(std::iter::once(way.name().to_owned()).chain(cells).collect());
    }
    print_table(&rows);
}

fn show(spread: &Spread, unit: Unit) -> String {
    let Spread { min, q1, median, q3, max, .. } = *spread;
    let [min, q1, median, q3, max] = [min, q1, median, q3, max].map(|value| unit.show(value));
    format!("{median} [{min} {q1} · {q3} {max}]")
}

fn print_table(rows: &[Vec<String>]) {
    let width = |text: &String| text.chars().count();
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(width).max().unwrap_or(0))
        .collect();
    print_line("");
    for row in rows {
        let mut line = String::new();
        for (text, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{text:<width$}  "));
        }
        print_line(line.trim_end());
    }
}
