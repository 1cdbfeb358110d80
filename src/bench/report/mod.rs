//! The result as one page for a browser: self-contained, light or dark as its reader
//! prefers, printable.

mod charts;

use std::fmt::Write;

use super::tables::{self, Table};
use super::{Summary, Unit};

const STYLE: &str = include_str!("style.css");

/// The conditions of the measurement.
const HOW: &str = "Each run starts a QEMU of its own from the recorded command line, beside \
nothing else that this program started, and ends it. The ways take turns, run by run, so that \
drift of the machine hits all alike. <em>Ready</em> is when QEMU answers on its control socket; \
<em>running</em> is QEMU's event RESUME; <em>complete</em> is when no memory is missing any more \
(for QEMU's own ways that is before the guest runs). A sign of life is a line that the guest \
writes to its serial port. The working set is the one that two reverts before the first run have \
recorded; every run begins with the same. Just before a run, memory of \
the guest’s size is taken and given back, so that no run waits for a hypervisor below to find \
some. Warm: the files were read through just before. Cold: \
their pages were dropped from the page cache just before. CPU time counts all threads of this \
program, and of QEMU with the guest's own work, from the start until complete; a way that takes \
longer to complete contains more of the guest's work. Resident memory is QEMU's, without \
hugetlbfs. The answer to a fault is timed from the request being heard to the page being on its \
way; the kernel's and QEMU's shares before that are not in it.";

/// The page.
pub fn html(summary: &Summary) -> String {
    let mut page = String::new();
    let title = format!("Reverting {}", escape(file_name(&summary.subject.image)));
    // Writing to a String can't fail.
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>{title}</title><style>{STYLE}</style></head><body><main>\n<h1>{title}</h1>\n"
    );
    page.push_str(&facts(summary));
    section(&mut page, "From start to complete", &charts::timeline(summary));
    let faults = charts::fault_times(summary);
    if !faults.is_empty() {
        section(&mut page, "How long answers to faults took", &faults);
    }
    section(&mut page, "Numbers", &numbers(summary));
    if !summary.ratios.is_empty() {
        section(&mut page, "Beside QEMU’s own ways", &ratios(summary));
    }
    section(&mut page, "How it was measured", &format!("<p>{HOW}</p>{}", ways(summary)));
    page.push_str("</main></body></html>\n");
    page
}

fn section(page: &mut String, title: &str, content: &str) {
    let _ = write!(page, "<section><h2>{title}</h2>\n{content}</section>\n");
}

/// What was measured, and where.
fn facts(summary: &Summary) -> String {
    let (subject, host) = (&summary.subject, &summary.host);
    let mib = |bytes: u64| format!("{} MiB", Unit::Bytes.show(bytes as f64));
    let facts = [
        (
            "Guest memory",
            format!("{}, {} of it not zeros", mib(subject.memory_bytes), mib(subject.data_bytes)),
        ),
        ("Image", format!("{} on disk", mib(subject.image_bytes))),
        ("Machine type", subject.machine_type.clone()),
        ("QEMU", subject.qemu.clone()),
        ("Host", format!("{}, {} CPUs, {} of RAM", host.cpu, host.cpus, mib(host.ram_bytes))),
        ("Kernel", host.kernel.clone()),
        ("snapback", host.snapback.clone()),
        ("Runs", format!("{} of each way", subject.runs)),
        (
            "Sign of life",
            match (&subject.sign, subject.nth) {
                (Some(sign), Some(nth)) => format!("lines that match “{sign}”, {nth} of them"),
                _ => "not watched for".into(),
            },
        ),
        (
            "Working set",
            match subject.working_set_pages {
                Some(pages) => format!("{pages} pages"),
                None => "none: the guest asked for no page".into(),
            },
        ),
    ];
    let row = |(name, value): &(&str, String)| {
        format!("<div><dt>{name}</dt><dd>{}</dd></div>", escape(value))
    };
    format!("<dl>{}</dl>\n", facts.iter().map(row).collect::<String>())
}

/// All tables of quantities.
fn numbers(summary: &Summary) -> String {
    const LEGEND: &str =
        "<p>Medians; below them the quartiles, and in brackets the smallest and the largest.</p>";
    let all = tables::quantities(summary);
    all.iter().fold(LEGEND.to_owned(), |out, table| out + &html_table(table, ""))
}

fn ratios(summary: &Summary) -> String {
    const LEGEND: &str = "<p>How many times as long QEMU’s or libvirt’s own way takes, round by \
                          round: more than 1 means that snapback is faster.</p>";
    let all = tables::ratios(summary);
    all.iter().fold(LEGEND.to_owned(), |out, table| out + &html_table(table, "×"))
}

/// A table as HTML, with a sign behind each median.
fn html_table(table: &Table, sign: &str) -> String {
    let mut out = format!(
        "<div class=\"scroll\"><table><caption>{}</caption><thead><tr><th></th>",
        escape(&table.title)
    );
    // One title over both states of the page cache.
    for same in table.columns.chunk_by(|a, b| a.0 == b.0 && a.1 != b.1) {
        let _ = write!(out, "<th colspan=\"{}\">{}</th>", same.len(), escape(&same[0].0));
    }
    out.push_str("</tr><tr><th></th>");
    for (_, cache) in &table.columns {
        let _ = write!(out, "<th>{}</th>", cache.name());
    }
    out.push_str("</tr></thead><tbody>");
    for (way, cells) in &table.rows {
        let class = if way.is_peer() { " class=\"peer\"" } else { "" };
        let _ = write!(out, "<tr{class}><th>{}</th>", way.name());
        for cell in cells {
            let Some(cell) = cell else {
                out.push_str("<td>–</td>");
                continue;
            };
            let [min, q1, median, q3, max] = cell.show();
            let _ = write!(
                out,
                "<td>{median}{sign}<small>{q1} – {q3}</small><small>[{min} – {max}]</small></td>"
            );
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

/// What each way is, and which were left out.
fn ways(summary: &Summary) -> String {
    let mut out = String::from("<dl>");
    for way in summary.methods() {
        let _ = write!(out, "<div><dt>{}</dt><dd>{}</dd></div>", way.name(), way.explanation());
    }
    for skipped in &summary.skipped {
        let (way, reason) = (skipped.way.name(), escape(&skipped.reason));
        let _ = write!(out, "<div><dt>{way}</dt><dd>not measured: {reason}</dd></div>");
    }
    out.push_str("</dl>");
    out
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Text as it stands in HTML, attributes included.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_elsewhere_is_no_markup() {
        assert_eq!(escape("<b a=\"&\">"), "&lt;b a=&quot;&amp;&quot;&gt;");
        assert_eq!(file_name("/a/vm.snap"), "vm.snap");
    }
}
