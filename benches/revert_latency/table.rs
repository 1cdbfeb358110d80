//! The figures and their targets, as a Markdown table that reads well as it is.

use std::collections::BTreeMap;

use crate::samples::Samples;

/// What was measured at one size of guest. Times in ms, memory in MiB, rates in
/// MiB of guest memory a second.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub mib: u64,
    pub qemu_start: Samples,
    pub ours: Reverts,
    pub peer: Reverts,
    pub requests: Samples,
    /// QEMU's resident memory when complete, less the memory that is not zero.
    pub beside_data: Samples,
    /// What a server takes whose guest is at rest and whose filling is delayed, in percent
    /// of a core.
    pub idle_cpu: Samples,
    /// How often memory went which way.
    pub ways: BTreeMap<String, usize>,
    /// Saves to the disk, and to a file system in memory.
    pub disk: Saves,
    pub memory: Saves,
    pub pause: Samples,
    pub peer_pause: Samples,
    pub save_peak: Samples,
    pub save_beside_index: Samples,
    pub huge: HugePages,
}

/// Guest memory in huge pages, in MiB, and what comes of it.
#[derive(Debug, Clone, Default)]
pub struct HugePages {
    pub before_save: Samples,
    pub after_revert: Samples,
    pub collapsed: Samples,
    /// What is in huge pages again of what was, in percent.
    pub share: Samples,
    pub took: Samples,
    /// The longest time between two heartbeats meanwhile.
    pub gap: Samples,
    /// The same in as long a time behind it.
    pub gap_after: Samples,
    /// The guest's first save; one behind a revert; one behind a revert without collapsing.
    pub first_save: Pause,
    pub save: Pause,
    pub save_without: Pause,
}

/// A save's pause, and the time from its order to its moment.
#[derive(Debug, Clone, Default)]
pub struct Pause {
    pub pause: Samples,
    pub moment: Samples,
}

/// Reverts of one kind.
#[derive(Debug, Clone, Default)]
pub struct Reverts {
    pub running: Samples,
    pub beat: Samples,
    pub complete: Samples,
    pub rss_running: Samples,
    pub rss_complete: Samples,
}

/// Pairs of saves, ours and the peer's, one after the other.
#[derive(Debug, Clone, Default)]
pub struct Saves {
    pub ours: Samples,
    pub peer: Samples,
    pub ratio: Samples,
}

/// What a figure should be. Judged by its median, or by its worst.
enum Target {
    None,
    MedianAtMost(f64),
    WorstAtMost(f64),
    MedianAtLeast(f64),
}

impl Target {
    fn missed(&self, samples: &Samples) -> bool {
        match self {
            Target::None => false,
            Target::MedianAtMost(limit) => samples.median().is_some_and(|value| value > *limit),
            Target::WorstAtMost(limit) => samples.max().is_some_and(|value| value > *limit),
            Target::MedianAtLeast(limit) => samples.median().is_some_and(|value| value < *limit),
        }
    }

    fn show(&self, decimals: usize) -> String {
        match self {
            Target::None => String::new(),
            Target::MedianAtMost(limit) => format!("<= {limit:.decimals$}"),
            Target::WorstAtMost(limit) => format!("max <= {limit:.decimals$}"),
            Target::MedianAtLeast(limit) => format!(">= {limit:.decimals$}"),
        }
    }
}

struct Row {
    what: &'static str,
    of: fn(&Figures) -> &Samples,
    decimals: usize,
    target: Target,
}

const fn row(what: &'static str, of: fn(&Figures) -> &Samples, decimals: usize) -> Row {
    Row { what, of, decimals, target: Target::None }
}

impl Row {
    const fn target(self, target: Target) -> Row {
        Row { target, ..self }
    }
}

const REVERT: &[Row] = &[
    row("QEMU's own start, ms", |f| &f.qemu_start, 1),
    row("ready to running, ms", |f| &f.ours.running, 1).target(Target::MedianAtMost(5.0)),
    row("- the peer", |f| &f.peer.running, 0),
    row("ready to first heartbeat, ms", |f| &f.ours.beat, 0),
    row("- the peer", |f| &f.peer.beat, 0),
    row("ready to all memory in place, ms", |f| &f.ours.complete, 0),
    row("- the peer", |f| &f.peer.complete, 0),
    row("requests by the guest", |f| &f.requests, 0),
    row("QEMU's RSS when running, MiB", |f| &f.ours.rss_running, 0)
        .target(Target::MedianAtMost(100.0)),
    row("- the peer", |f| &f.peer.rss_running, 0),
    row("QEMU's RSS when complete, MiB", |f| &f.ours.rss_complete, 0),
    row("- the peer", |f| &f.peer.rss_complete, 0),
    row("- beside the guest's data", |f| &f.beside_data, 0).target(Target::MedianAtMost(100.0)),
    row("server's CPU, guest at rest, filling delayed, %", |f| &f.idle_cpu, 2)
        .target(Target::MedianAtMost(2.0)),
];

const HUGE_PAGES: &[Row] = &[
    row("in huge pages before the save, MiB", |f| &f.huge.before_save, 0),
    row("- when resident", |f| &f.huge.after_revert, 0),
    row("- when collapsed", |f| &f.huge.collapsed, 0),
    row("- of what was before the save, %", |f| &f.huge.share, 1)
        .target(Target::MedianAtLeast(90.0)),
    row("resident to collapsed, ms", |f| &f.huge.took, 0).target(Target::MedianAtMost(2000.0)),
    row("longest time between two heartbeats meanwhile, ms", |f| &f.huge.gap, 0),
    row("- in as long a time behind it", |f| &f.huge.gap_after, 0),
    row("pause of the first save, ms", |f| &f.huge.first_save.pause, 1),
    row("- of the first behind a revert", |f| &f.huge.save.pause, 1),
    row("- of the same with --no-collapse", |f| &f.huge.save_without.pause, 1),
    row("order to moment of the first save, ms", |f| &f.huge.first_save.moment, 0),
    row("- of the first behind a revert", |f| &f.huge.save.moment, 0),
    row("- of the same with --no-collapse", |f| &f.huge.save_without.moment, 0),
];

/// Compressing takes processor time that QEMU needs as well: less of its rate is asked for.
fn save_rows(compressed: bool) -> [Row; 10] {
    let rate = || Target::MedianAtLeast(if compressed { 0.8 } else { 0.9 });
    [
        row("the guest's pause, ms", |f| &f.pause, 1).target(Target::MedianAtMost(10.0)),
        row("- the peer", |f| &f.peer_pause, 1),
        row("rate to disk, MiB/s", |f| &f.disk.ours, 0),
        row("- the peer", |f| &f.disk.peer, 0),
        row("- ratio", |f| &f.disk.ratio, 2).target(rate()),
        row("rate to tmpfs, MiB/s", |f| &f.memory.ours, 0),
        row("- the peer", |f| &f.memory.peer, 0),
        row("- ratio", |f| &f.memory.ratio, 2).target(rate()),
        row("peak memory of `snapback save`, MiB", |f| &f.save_peak, 0),
        row("- beside the index", |f| &f.save_beside_index, 0).target(Target::WorstAtMost(128.0)),
    ]
}

/// Prints everything: one table for reverts, one for saves.
pub fn print(figures: &[Figures], compressed: bool) {
    println!("### Revert\n");
    print_table(REVERT, figures);
    let medians = || figures.iter().filter_map(|f| f.ours.running.median());
    let (slowest, fastest) = (medians().fold(0.0, f64::max), medians().fold(f64::MAX, f64::min));
    if figures.len() > 1 && fastest > 0.0 {
        let factor = slowest / fastest;
        let verdict = if factor <= 1.5 { "met" } else { "MISSED" };
        println!(
            "\nReady to running at the slowest size takes {factor:.2} times what it takes at the \
             fastest (target: 1.50, {verdict})."
        );
    }
    for Figures { mib, ways, .. } in figures {
        let counts: Vec<_> = ways.iter().map(|(way, n)| format!("{way} {n}x")).collect();
        println!("\nMemory at {mib} MiB went by: {}.", counts.join(", "));
    }
    println!("\n### Huge pages after a revert\n");
    print_table(HUGE_PAGES, figures);
    println!("\n### Save\n");
    print_table(&save_rows(compressed), figures);
}

fn print_table(rows: &[Row], figures: &[Figures]) {
    let mut cells = vec![vec!["".to_owned()]];
    cells[0].extend(figures.iter().map(|f| format!("{} MiB", f.mib)));
    cells[0].push("target".into());
    for Row { what, of, decimals, target } in rows {
        let mut line = vec![what.to_string()];
        line.extend(figures.iter().map(|f| of(f).show(*decimals)));
        let missed = figures.iter().any(|f| target.missed(of(f)));
        let measured = figures.iter().any(|f| of(f).median().is_some());
        line.push(match (target, missed) {
            (Target::None, _) => String::new(),
            _ if !measured => target.show(*decimals),
            (_, true) => format!("{}, MISSED", target.show(*decimals)),
            (_, false) => format!("{}, met", target.show(*decimals)),
        });
        cells.push(line);
    }
    let columns = cells[0].len();
    let width = |column: usize| cells.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (number, line) in cells.iter().enumerate() {
        let padded = line.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} "));
        println!("|{}|", padded.collect::<Vec<_>>().join("|"));
        if number == 0 {
            let rule = widths.iter().map(|width| "-".repeat(width + 2));
            println!("|{}|", rule.collect::<Vec<_>>().join("|"));
        }
    }
}
