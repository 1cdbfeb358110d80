//! `bench --compare`.

use std::path::Path;

use super::events::CommandEvent;
use super::failure::Failure;
use super::output::{Output, print_line, print_table};
use crate::bench::{Change, Comparison, METRICS, Verdict, compare};

/// Compares two files of `bench --save`.
pub(super) fn run(base: &Path, new: &Path, output: &Output) -> Result<(), Failure> {
    let Comparison { warnings, changes } = compare(base, new)?;
    warnings.into_iter().for_each(|says| output.warn(says));
    if output.is_json() {
        let events = changes.into_iter().map(|change| CommandEvent::Change(Box::new(change)));
        events.for_each(|event| output.print_json(&event));
        return Ok(());
    }
    let mut last = None;
    let mut rows = Vec::new();
    let kind = |change: &Change| (change.way.clone(), change.cache.clone());
    for change in &changes {
        if last.replace(kind(change)).is_none_or(|last| last != kind(change)) && !rows.is_empty() {
            rows.push([const { String::new() }; 7]);
        }
        rows.push(row(change));
    }
    let head = ["WAY", "QUANTITY", "RUNS", "BASE", "NEW", "CHANGE (95 %)", "VERDICT"];
    print_table(head, &rows);
    if changes.iter().any(|change| change.base_runs.min(change.new_runs) < 10) {
        print_line("\nFewer than 10 runs on a side: nothing is judged.");
    }
    Ok(())
}

fn row(change: &Change) -> [String; 7] {
    let Change { way, cache, quantity, base_runs, new_runs, base, new, change, low, high, verdict } =
        change;
    let metric = METRICS.iter().find(|metric| metric.key == *quantity);
    let show = |value: f64| metric.map_or(value.to_string(), |m| m.unit.show(value));
    let title = metric.map_or((*quantity).to_owned(), |m| match m.unit.sign() {
        "" => m.title.to_owned(),
        sign => format!("{}, {sign}", m.title),
    });
    let percent = |share: &f64| format!("{:+.1}", share * 100.0);
    let verdict = match verdict {
        Verdict::Less => "less",
        Verdict::More => "more",
        _ => "",
    };
    [
        format!("{way} {cache}"),
        title,
        format!("{base_runs}/{new_runs}"),
        show(*base),
        show(*new),
        format!("{} % [{}, {}]", percent(change), percent(low), percent(high)),
        verdict.to_owned(),
    ]
}
