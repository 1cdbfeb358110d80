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
    let mut rest = &changes[..];
    while let Some(first) = rest.first() {
        let same = |change: &&Change| (&change.way, &change.cache) == (&first.way, &first.cache);
        let (of_way, others) = rest.split_at(rest.iter().take_while(same).count());
        let (base_runs, new_runs) = (first.base_runs, first.new_runs);
        print_line(&format!("{}, {}: {base_runs} and {new_runs} runs", first.way, first.cache));
        let head = ["QUANTITY", "BASE", "NEW", "CHANGE (95 %)", "VERDICT"];
        print_table(head, &of_way.iter().map(row).collect::<Vec<_>>());
        print_line("");
        rest = others;
    }
    if changes.iter().any(|change| change.base_runs.min(change.new_runs) < 10) {
        print_line("With fewer than 10 runs on a side nothing is judged.");
    }
    Ok(())
}

/// Quantities by the names that they have in the files.
fn row(change: &Change) -> [String; 5] {
    let Change { quantity, base, new, change, low, high, verdict, .. } = change;
    let unit = METRICS.iter().find(|metric| metric.key == *quantity).map(|metric| metric.unit);
    let show = |value: f64| match unit {
        Some(unit) => format!("{} {}", unit.show(value), unit.sign()).trim_end().to_owned(),
        None => value.to_string(),
    };
    let percent = |share: &f64| format!("{:+.1}", share * 100.0);
    let verdict = match verdict {
        Verdict::Less => "less",
        Verdict::More => "more",
        _ => "",
    };
    [
        (*quantity).to_owned(),
        show(*base),
        show(*new),
        format!("{} % [{}, {}]", percent(change), percent(low), percent(high)),
        verdict.to_owned(),
    ]
}
