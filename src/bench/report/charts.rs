//! The report's charts, as SVG whose colours are the page's.

use std::fmt::Write;

use hdrhistogram::Histogram;

use crate::bench::{Summary, WaySummary};

/// Width of a chart, in its own units.
const WIDTH: f64 = 1000.0;
/// Where the plot begins and ends; names stand left of it, numbers right.
const LEFT: f64 = 190.0;
const RIGHT: f64 = 790.0;

/// The median run of each way, from the start until complete or the last sign.
pub(super) fn timeline(summary: &Summary) -> String {
    const ROW: f64 = 34.0;
    const TOP: f64 = 44.0;
    let median = |way: &WaySummary, key| way.metrics.get(key).map(|spread| spread.median);
    let phases = |way: &WaySummary| {
        let [start, load, follow] =
            ["start_ms", "running_ms", "complete_ms"].map(|key| median(way, key).unwrap_or(0.0));
        (start, start + load, start + load + follow)
    };
    let sign = |way: &WaySummary, key| Some(phases(way).1 + median(way, key)?);
    let end = |way: &WaySummary| phases(way).2.max(sign(way, "nth_sign_ms").unwrap_or(0.0));
    let longest = summary.ways.iter().map(end).fold(1.0, f64::max);
    let (step, count) = steps(longest);
    let x = |ms: f64| LEFT + (RIGHT - LEFT) * ms / (step * count as f64);

    let height = TOP + ROW * summary.ways.len() as f64 + 26.0;
    let mut svg = begin(height, "Median times of each way, in milliseconds");
    legend(&mut svg, summary.subject.nth);
    for tick in 0..=count {
        let ms = step * tick as f64;
        let _ = write!(
            svg,
            "<line x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{TOP}\" y2=\"{1:.1}\"/>\
             <text class=\"faint middle\" x=\"{0:.1}\" y=\"{2:.1}\">{3} ms</text>",
            x(ms),
            height - 22.0,
            height - 6.0,
            plain(ms)
        );
    }
    for (number, way) in summary.ways.iter().enumerate() {
        let y = TOP + ROW * number as f64;
        let (ready, running, complete) = phases(way);
        name(&mut svg, summary, way, y + 21.0);
        for (class, from, to) in
            [("start", 0.0, ready), ("load", ready, running), ("follow", running, complete)]
        {
            if to > from {
                let _ = write!(
                    svg,
                    "<rect class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"18\"/>",
                    x(from),
                    y + 8.0,
                    (x(to) - x(from)).max(1.0)
                );
            }
        }
        for (class, key) in [("first", "first_sign_ms"), ("nth", "nth_sign_ms")] {
            if let Some(ms) = sign(way, key) {
                let _ = write!(
                    svg,
                    "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"5\"/>",
                    x(ms),
                    y + 17.0
                );
            }
        }
        let says = match complete > running {
            true => format!("runs at {} ms, all at {}", plain(running), plain(complete)),
            false => format!("runs at {} ms", plain(running)),
        };
        let _ = write!(
            svg,
            "<text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\">{says}</text>",
            RIGHT + 14.0,
            y + 21.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, nth: Option<usize>) {
    // About the width of a letter; the text is not measured.
    const LETTER: f64 = 5.7;
    let mut x = 4.0;
    for (class, text) in [
        ("start", "QEMU starts"),
        ("load", "device state, or all memory, is loaded"),
        ("follow", "the guest runs, memory follows"),
    ] {
        let _ = write!(
            svg,
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"8\" width=\"12\" height=\"12\"/>\
             <text class=\"faint\" x=\"{:.1}\" y=\"18\">{text}</text>",
            x + 18.0
        );
        x += 44.0 + LETTER * text.len() as f64;
    }
    let Some(nth) = nth else { return };
    for (class, text) in
        [("first", "first sign of life".to_owned()), ("nth", format!("sign {nth}"))]
    {
        let _ = write!(
            svg,
            "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"14\" r=\"5\"/>\
             <text class=\"faint\" x=\"{:.1}\" y=\"18\">{text}</text>",
            x + 6.0,
            x + 18.0
        );
        x += 44.0 + LETTER * text.len() as f64;
    }
}

/// How the times of answers to faults are distributed, each way by itself, over a
/// logarithmic axis. Empty where there were no faults.
pub(super) fn fault_times(summary: &Summary) -> String {
    const ROW: f64 = 76.0;
    const TOP: f64 = 6.0;
    const BARS_PER_DECADE: i32 = 10;
    let some = |way: &&WaySummary| way.fault_times.as_ref().is_some_and(|times| !times.is_empty());
    let ways: Vec<&WaySummary> = summary.ways.iter().filter(some).collect();
    let all = || ways.iter().filter_map(|way| way.fault_times.as_ref());
    let Some(shortest) = all().map(Histogram::min).min() else { return String::new() };
    let longest = all().map(Histogram::max).max().unwrap_or(shortest);
    let decade = |ns: u64| (ns.max(1) as f64).log10();
    let (first, last) = (decade(shortest).floor() as i32, decade(longest).floor() as i32 + 1);
    let x = |decades: f64| {
        LEFT + (RIGHT - LEFT) * (decades - f64::from(first)) / f64::from(last - first)
    };

    let height = TOP + ROW * ways.len() as f64 + 24.0;
    let mut svg = begin(height, "Distribution of the times of answers to faults");
    for power in first..=last {
        let at = x(f64::from(power));
        let _ = write!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/>\
             <text class=\"faint middle\" x=\"{at:.1}\" y=\"{:.1}\">{}</text>",
            height - 20.0,
            height - 4.0,
            duration(10f64.powi(power))
        );
    }
    for (number, way) in ways.iter().enumerate() {
        let Some(times) = &way.fault_times else { continue };
        let base = TOP + ROW * (number + 1) as f64 - 6.0;
        name(&mut svg, summary, way, base - 22.0);
        let bars = ((last - first) * BARS_PER_DECADE) as usize;
        let mut counts = vec![0u64; bars];
        for value in times.iter_recorded() {
            let place =
                (decade(value.value_iterated_to()) - f64::from(first)) * f64::from(BARS_PER_DECADE);
            counts[(place.max(0.0) as usize).min(bars - 1)] += value.count_since_last_iteration();
        }
        let highest = counts.iter().copied().max().unwrap_or(1).max(1) as f64;
        let width = (RIGHT - LEFT) / bars as f64;
        for (bar, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            // A single one stays visible.
            let tall = ((ROW - 20.0) * *count as f64 / highest).max(1.0);
            let _ = write!(
                svg,
                "<rect class=\"follow\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"/>",
                LEFT + width * bar as f64 + 0.5,
                base - tall,
                width - 1.0
            );
        }
        let _ =
            write!(svg, "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{base:.1}\" y2=\"{base:.1}\"/>");
        let [p50, p99] = [0.5, 0.99].map(|quantile| times.value_at_quantile(quantile));
        for value in [p50, p99] {
            let at = x(decade(value));
            let _ = write!(
                svg,
                "<line class=\"tick\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
                base - 5.0,
                base + 4.0
            );
        }
        let lines = [
            format!("{} faults", times.len()),
            format!("p50 {}, p99 {}", duration(p50 as f64), duration(p99 as f64)),
            format!("longest {}", duration(times.max() as f64)),
        ];
        for (line, text) in lines.iter().enumerate() {
            let _ = write!(
                svg,
                "<text class=\"faint\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>",
                RIGHT + 14.0,
                base - 38.0 + 16.0 * line as f64
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn begin(height: f64, title: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\"><title>{title}</title>")
}

/// The row's name; which state the page cache was in only where there are two.
fn name(svg: &mut String, summary: &Summary, way: &WaySummary, y: f64) {
    let cache = match summary.caches().len() {
        1 => String::new(),
        _ => format!(", {}", way.cache.name()),
    };
    let _ = write!(
        svg,
        "<text class=\"end\" x=\"{:.1}\" y=\"{y:.1}\">{}{cache}</text>",
        LEFT - 12.0,
        way.way.name()
    );
}

/// A round step and the number of steps, at most ten, that reach `end`.
fn steps(end: f64) -> (f64, u32) {
    let power = 10f64.powf((end / 10.0).log10().floor());
    let round = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = round.into_iter().find(|step| end / step <= 10.0).unwrap_or(end);
    (step, (end / step).ceil() as u32)
}

/// Milliseconds with as many digits as are worth reading.
fn plain(ms: f64) -> String {
    match ms < 10.0 && ms.fract() != 0.0 {
        true => format!("{ms:.1}"),
        false => format!("{ms:.0}"),
    }
}

/// A time given in nanoseconds.
fn duration(ns: f64) -> String {
    match ns {
        ns if ns < 999.5 => format!("{ns:.0} ns"),
        ns if ns < 999.5e3 => format!("{} µs", plain(ns / 1e3)),
        ns if ns < 999.5e6 => format!("{} ms", plain(ns / 1e6)),
        ns => format!("{} s", plain(ns / 1e9)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_steps() {
        assert_eq!(steps(100.0), (10.0, 10));
        assert_eq!(steps(101.0), (20.0, 6));
        assert_eq!(steps(47.0), (5.0, 10));
        assert_eq!(steps(1.0), (0.1, 10));
    }

    #[test]
    fn times_are_written_in_their_own_unit() {
        let written = [512.0, 1_500.0, 63_000.0, 2_000_000.0, 1.2e9].map(duration);
        assert_eq!(written, ["512 ns", "1.5 µs", "63 µs", "2 ms", "1.2 s"]);
    }
}
