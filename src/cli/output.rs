//! What the program prints: lines for people, or one JSON object a line.

use std::io::{IsTerminal, Write};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle, WeakProgressBar};
use serde::Serialize;
use serde_json::Value;

use super::events::{CommandEvent, VERSION};
use super::failure::Failure;
use super::flags::with_flags;
use super::hook::HookEvent;
use super::style::{Stream, Tone, columns, is_quiet, paint, wrap};
use crate::page::PAGE_SIZE;
use crate::revert::{Placement, Progress, ResetWay, RevertEvent};
use crate::save::{ChangedSince, PauseParts, Recovered, SaveEvent, SwitchedDisk};

/// When the program began, from which the times of events count.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds since the program began, to the microsecond.
fn ms() -> f64 {
    (START.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

/// Prints one line, with flags for the fields that it names. Nothing is done about a reader
/// that has gone away.
pub(super) fn print_line(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{}", with_flags(line)).and_then(|()| stdout.flush());
}

/// Prints what a text is about, in so many columns, and the text in the rest of the terminal's width.
pub(super) fn print_about(about: &str, width: usize, text: &str) {
    print_line(&format!("{about:<width$}{}", hanging(text, width, columns())));
}

/// Prints columns as wide as they have to be; the last in the rest of the terminal's width, if it is
/// one, and as it is elsewhere.
pub(super) fn print_table<const N: usize>(head: [&str; N], rows: &[[String; N]]) {
    for line in table_lines(head, rows, columns()) {
        print_line(&line);
    }
}

/// The lines of a table. Where the terminal has too little room beside the other columns, the last one
/// has lines of its own.
fn table_lines<const N: usize>(
    head: [&str; N],
    rows: &[[String; N]],
    columns: Option<usize>,
) -> Vec<String> {
    const INDENT: usize = 4;
    let head = head.map(str::to_owned);
    let all = || [&head].into_iter().chain(rows);
    let width = |column: usize| all().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N - 1).map(width).collect();
    let before: usize = widths.iter().map(|width| width + 2).sum();
    let room = columns.map(|columns| columns.saturating_sub(before));
    let fits = room.is_none_or(|room| room >= width(N - 1).min(LEAST_ROOM));
    // A heading that nothing stands under gets no line of its own.
    let is_empty = rows.iter().all(|row| row[N - 1].is_empty());
    let lines = all().map(|row| {
        let last = if is_empty && !fits { "" } else { row[N - 1].as_str() };
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let cells = cells.collect::<Vec<_>>().join("  ");
        let (apart, before) = match fits {
            true => ("  ".to_owned(), before),
            false if last.is_empty() => (String::new(), 0),
            false => (format!("\n{:INDENT$}", ""), INDENT),
        };
        let last = hanging(last, before, columns);
        let shown = match fits {
            true => format!("{cells}{apart}{last}"),
            false => format!("{}{apart}{last}", cells.trim_end()),
        };
        shown.trim_end().to_owned()
    });
    lines.collect()
}

/// Prints text as it is.
pub(super) fn print_raw(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Prints events as they happen.
pub(super) struct Output {
    json: bool,
    bar: ProgressBar,
    /// What is shown while something is waited for.
    spinner: Mutex<WeakProgressBar>,
    /// Whether events go to stderr too.
    log: bool,
    /// Whether the guest is a domain of libvirt's, which knows of the overlays.
    domain: bool,
    /// The name of the clone that everything is about.
    clone: Option<String>,
}

impl Output {
    pub fn new(json: bool) -> Output {
        let bar = match !json && !is_quiet() && std::io::stderr().is_terminal() {
            true => ProgressBar::new(0).with_style(bar_style()),
            false => ProgressBar::hidden(),
        };
        LazyLock::force(&START);
        let spinner = Mutex::default();
        Output { json, bar, spinner, log: false, domain: false, clone: None }
    }

    /// The same for a guest that may be a `domain` of libvirt's.
    pub fn of_domain(self, domain: bool) -> Output {
        Output { domain, ..self }
    }

    /// The output of a server in the background: JSON to the process that started it, for as
    /// long as that reads, and the same to the log.
    pub fn of_server() -> Output {
        LazyLock::force(&START);
        let (bar, spinner) = (ProgressBar::hidden(), Mutex::default());
        Output { json: true, bar, spinner, log: true, domain: false, clone: None }
    }

    /// The same for one of several clones, without a bar.
    pub fn of_clone(&self, name: &str) -> Output {
        let clone = Some(name.to_owned());
        Output {
            json: self.json,
            bar: ProgressBar::hidden(),
            spinner: Mutex::default(),
            log: self.log,
            domain: self.domain,
            clone,
        }
    }

    /// Prints a failure to stderr, and as an event too where events are printed.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            print_line(&self.json_line(&failure.event()));
        }
        let of = self.clone.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
        let name = paint("snapback:", Tone::Error, Stream::Error);
        let _ = writeln!(std::io::stderr(), "{name} {of}{}", failure.message());
    }

    /// An event as one JSON object, the version, its name and its time first.
    fn json_line(&self, event: &impl Serialize) -> String {
        let fields = match serde_json::to_value(event) {
            Ok(Value::Object(fields)) => fields,
            // Every event is a struct or a struct-like variant.
            _ => serde_json::Map::new(),
        };
        let name = fields.get("event").unwrap_or(&Value::Null);
        let mut line = format!("{{\"v\":{VERSION},\"event\":{name},\"ms\":{}", ms());
        if let Some(clone) = &self.clone {
            line.push_str(&format!(",\"clone\":{}", Value::String(clone.clone())));
        }
        for (key, value) in fields.iter().filter(|(key, _)| *key != "event") {
            line.push_str(&format!(",\"{key}\":{value}"));
        }
        line.push('}');
        line
    }

    /// Warns ahead of what a command prints: as an event, or on stderr.
    pub fn warn(&self, says: String) {
        match self.json {
            true => self.print_json(&SaveEvent::Warning { says }),
            false => {
                let warning = paint("warning:", Tone::Warning, Stream::Error);
                self.above(|| drop(writeln!(std::io::stderr(), "snapback: {warning} {says}")));
            }
        }
    }

    /// Prints an event as one JSON object.
    pub fn print_json(&self, event: &impl Serialize) {
        let line = self.json_line(event);
        print_line(&line);
        if self.log {
            let _ = writeln!(std::io::stderr(), "{}", with_flags(&line));
        }
    }

    pub fn say(&self, what: &str, details: &str) {
        let urgent = matches!(what, "WARNING" | "DISKS" | "stopped" | "degraded" | "giving up");
        if is_quiet() && !urgent {
            return;
        }
        let of = self.clone.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
        let tone = if urgent { Tone::Warning } else { Tone::Plain };
        let what = paint(&format!("{what:<11}"), tone, Stream::Out);
        let details = hanging(&format!("{of}{details}"), DETAILS, columns());
        let line = format!("{:>10.1} ms  {what}{details}", ms());
        self.above(|| print_line(line.trim_end()));
    }

    /// Prints above what moves in the last line of a terminal.
    fn above(&self, print: impl FnOnce()) {
        let spinner = self.spinner.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        match (spinner, self.bar.length()) {
            (Some(spinner), _) => spinner.suspend(print),
            // Suspending a bar draws it, which is too early before it has a length.
            (None, None | Some(0)) => print(),
            (None, Some(_)) => self.bar.suspend(print),
        }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Shows, until that is dropped, that something takes its time of which no progress is known.
    pub fn waiting(&self, what: &'static str) -> Waiting {
        let shown = !self.bar.is_hidden();
        Waiting(shown.then(|| {
            let spinner = ProgressBar::new_spinner().with_message(what);
            spinner.enable_steady_tick(Duration::from_millis(100));
            *self.spinner.lock().unwrap_or_else(PoisonError::into_inner) = spinner.downgrade();
            spinner
        }))
    }

    /// Removes the bar, before the last lines are printed.
    pub fn finish_bar(&self) {
        self.bar.finish_and_clear();
    }

    /// Reports the end of a command: as an event, or in words.
    pub fn done(&self, event: &CommandEvent, what: &str, details: &str) {
        self.bar.finish_and_clear();
        match self.json {
            true => self.print_json(event),
            false => self.say(what, details),
        }
    }

    /// Moves the bar to `done` of `total` pages.
    pub fn advance(&self, done: u64, total: u64, message: String) {
        self.advance_bytes(done * PAGE_SIZE as u64, total * PAGE_SIZE as u64);
        self.bar.set_message(message);
    }

    /// Moves the bar to `done` of `total` bytes.
    pub fn advance_bytes(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    pub fn save(&self, event: &SaveEvent) {
        if self.json {
            return self.print_json(event);
        }
        match event {
            SaveEvent::Waiting => self.say("waiting", "for the reverted guest's memory"),
            SaveEvent::Checked { qemu, ram_bytes, captured_disks, uncaptured_disks } => {
                let list = |what, disks: &[String]| match disks {
                    [] => String::new(),
                    disks => format!("; {what}: {}", disks.join(", ")),
                };
                let with = list("disks", captured_disks);
                let without = list("NOT part of it", uncaptured_disks);
                let ram = size(*ram_bytes);
                self.say("checked", &format!("QEMU {qemu}, {ram} of RAM{with}{without}"));
            }
            SaveEvent::Warning { says } => self.say("WARNING", says),
            SaveEvent::Ready { overlays } => {
                self.say("ready", &format!("the guest will go on in {}", overlays.join(", ")));
            }
            SaveEvent::Frozen { filesystems } => {
                self.say("frozen", &format!("{filesystems} of the guest's file systems"));
            }
            SaveEvent::Resettable { written } => {
                self.revert(&RevertEvent::Resettable { written: *written });
            }
            SaveEvent::Reset { how, pages, took_ms } => {
                let (how, pages, took_ms) = (*how, *pages, *took_ms);
                self.revert(&RevertEvent::Reset { how, pages, took_ms });
            }
            SaveEvent::Note { what, why } => self.say("note", &format!("{what}: {why}")),
            SaveEvent::Thawed => self.say("thawed", ""),
            SaveEvent::DiskCopied { disk, file, bytes, took_ms } => {
                let (took, stored) = (took_ms / 1e3, size(*bytes));
                self.say("copied", &format!("disk {disk} to {file}: {stored} in {took:.1} s"));
            }
            SaveEvent::Committed { disk } => {
                self.say("committed", &format!("the overlay back into disk {disk}"));
            }
            SaveEvent::Moment { pause_ms: Some(pause), pause_parts, .. } => {
                let parts = pause_parts.map(|parts| {
                    let PauseParts { stop_ms, changed_ms, disks_ms, .. } = parts;
                    let PauseParts { devices_ms, walk_ms, resume_ms, .. } = parts;
                    let changed = match changed_ms >= 0.05 {
                        true => format!("what changed {changed_ms:.1}, "),
                        false => String::new(),
                    };
                    format!(
                        " (stop {stop_ms:.1}, {changed}disks {disks_ms:.1}, devices \
                         {devices_ms:.1}, QEMU's walk {walk_ms:.1}, resume {resume_ms:.1})"
                    )
                });
                let parts = parts.unwrap_or_default();
                self.say("moment", &format!("the guest stood still for {pause:.1} ms{parts}"));
            }
            SaveEvent::Moment { pause_ms: None, .. } => self.say("moment", "the guest is paused"),
            SaveEvent::Draining => self.say(
                "giving up",
                "this QEMU lets go of the guest only once it has sent all memory: receiving it \
                 first (interrupt twice to leave the guest hanging)",
            ),
            SaveEvent::Progress { pages, total, image_bytes } => {
                self.advance(*pages, *total, format!("{} written", size(*image_bytes)));
            }
            SaveEvent::Saved {
                bytes,
                zero_pages,
                parent_pages,
                image_bytes,
                stalled_ms,
                changed_since,
                disks,
                ..
            } => {
                self.bar.finish_and_clear();
                let zero = size(zero_pages * PAGE_SIZE as u64);
                let stalled = match *stalled_ms > 0.0 {
                    true => format!("; QEMU waited {stalled_ms:.0} ms for the disk"),
                    false => String::new(),
                };
                let mut parent = match parent_pages {
                    0 => String::new(),
                    pages => format!(" ({} lie in its parents)", size(pages * PAGE_SIZE as u64)),
                };
                if let Some(ChangedSince::WriteProtection { pages }) = changed_since {
                    let unread = size(pages * PAGE_SIZE as u64);
                    parent = format!("{parent}, {unread} not written since,");
                }
                let (data, image) = (size(*bytes), size(*image_bytes));
                self.say(
                    "saved",
                    &format!("{data}{parent} and {zero} of zeros in {image}{stalled}"),
                );
                self.switched(disks);
            }
        }
    }

    /// Tells last, where it is seen, that the guest's disks are other files from now on; for
    /// each disk a line that can be pasted into whatever starts the guest.
    fn switched(&self, disks: &[SwitchedDisk]) {
        if disks.is_empty() {
            return;
        }
        let detail = |text: &str| print_line(&format!("{:DETAILS$}{text}", ""));
        if self.domain {
            self.say("DISKS", "from now on the domain lives in new files, as libvirt knows:");
            disks.iter().for_each(|disk| detail(&disk.overlay));
            detail("Don't write to those below, nor remove them: they are part of this snapshot.");
            return;
        }
        self.say("DISKS", "from now on the guest lives in new files: change what starts it.");
        let lost = "Started from an old file again, it loses all that it has written since, and \
                    destroys this snapshot.";
        print_about("", DETAILS, lost);
        for SwitchedDisk { frozen, option, .. } in disks {
            detail(&format!("Instead of {frozen} and its format:"));
            print_line(&shlex::try_quote(option).unwrap_or(option.into()));
        }
    }

    /// The guest of a new image has run again, so long after its revert began.
    pub fn proved(&self, after: Duration) {
        let ms = after.as_secs_f64() * 1e3;
        match self.json {
            true => self.print_json(&CommandEvent::Proved { running_ms: ms }),
            false => self.say("proved", &format!("its guest ran again after {ms:.1} ms")),
        }
    }

    /// What became of a save that was killed.
    pub fn recovered(&self, done: &Recovered) {
        let (outcome, says, disks) = match done {
            Recovered::Nothing { journal } => {
                let journal = journal.display();
                let says = format!(
                    "there is no journal {journal}, so either no save of this image was killed, \
                     or the image was called otherwise"
                );
                ("nothing", says, &[][..])
            }
            Recovered::Saved { disks } => {
                let says = "the image is whole, the guest goes on in its overlays".to_owned();
                ("saved", says, &disks[..])
            }
            Recovered::Undone => {
                ("undone", "the guest is as it was before the save".to_owned(), &[][..])
            }
        };
        if self.json {
            let disks = disks.to_vec();
            return self.print_json(&CommandEvent::Recovered { outcome, says, disks });
        }
        self.say("recovered", &format!("{outcome}: {says}"));
        self.switched(disks);
    }

    pub fn revert(&self, event: &RevertEvent) {
        if self.json {
            return self.print_json(event);
        }
        match event {
            RevertEvent::Note { what, why } => self.say("note", &format!("{what}: {why}")),
            RevertEvent::Warning { says } => self.say("WARNING", says),
            RevertEvent::Disk { disk, overlay, .. } => {
                let changes = match overlay {
                    Some(path) => format!("its changes go to {}", path.display()),
                    None => "its changes go with QEMU".to_owned(),
                };
                self.say("disk", &format!("{disk}: {changes}"));
            }
            RevertEvent::DisksResident { took_ms, fetched_bytes } => {
                let fetched = size(*fetched_bytes);
                self.say(
                    "disks",
                    &format!("all here after {took_ms:.0} ms; {fetched} were fetched"),
                );
            }
            RevertEvent::QemuReady { pid } => self.say("qemu ready", &format!("process {pid}")),
            RevertEvent::Placing { placement, reason } => {
                let way = match placement {
                    Placement::Socket => "by QEMU's socket",
                    Placement::Map => "by mapping the image",
                    Placement::Eager => "by an ordinary stream, all memory first",
                    _ => "directly into memory, by userfaultfd",
                };
                self.say("placing", &format!("{way}: {reason}"));
            }
            RevertEvent::Running { ports, .. } => {
                let ports: Vec<_> =
                    ports.iter().map(|(old, new)| format!("; port {old} is {new}")).collect();
                self.say("running", &format!("the guest runs{}", ports.concat()));
            }
            RevertEvent::Agent { did, failed, took_ms, .. } => match failed {
                Some(why) => self.say("agent", &format!("{did}: {why}")),
                None => self.say("agent", &format!("{did}: done in {took_ms:.0} ms")),
            },
            RevertEvent::TakenOver { after_ms, restarts, .. } => self.say(
                "taken over",
                &format!(
                    "from a page server that was killed {after_ms:.0} ms ago (restarts: {restarts})"
                ),
            ),
            RevertEvent::Degraded(memory) => self.say(
                "degraded",
                &format!("{}; the guest has not asked for it: all else is filled", memory.why),
            ),
            RevertEvent::Stopped { store: Some(why), .. } => self.say(
                "stopped",
                &format!(
                    "the guest waits for a disk: {why}; it goes on by itself when the store answers, \
                     or interrupt to end it"
                ),
            ),
            RevertEvent::Stopped { memory, .. } => self.say(
                "stopped",
                &format!(
                    "the guest waits for this: {}; it goes on by itself once that can be read, as \
                     from a whole copy of the image in its place; or interrupt to end the guest",
                    memory.as_ref().map(|memory| memory.why.as_str()).unwrap_or_default()
                ),
            ),
            RevertEvent::Repaired => {
                self.say("repaired", "what the guest waited for can be read again: it goes on");
            }
            RevertEvent::Progress(Progress { pages, total, requests }) => {
                self.advance(*pages, *total, format!("{requests} faults served"));
            }
            RevertEvent::StillNeeded => self.say(
                "interrupt",
                "the guest still depends on this program: filling its memory first \
                 (interrupt again to stop the guest as well)",
            ),
            RevertEvent::Resident { progress, demands, answer_p50_us, answer_p99_us } => {
                self.bar.finish_and_clear();
                let memory = size(progress.pages * PAGE_SIZE as u64);
                self.say(
                    "resident",
                    &format!(
                        "all {memory}; {demands} faults answered in {answer_p50_us:.0} µs (median), \
                         {answer_p99_us:.0} µs (99 %)"
                    ),
                );
            }
            RevertEvent::Resettable { written } => self.say(
                "resettable",
                &format!("it has written {written} pages so far; `snapback reset` undoes that"),
            ),
            RevertEvent::Reset { how, pages, took_ms } => {
                let how = match (how, pages) {
                    (ResetWay::InPlace, Some(pages)) => format!("{pages} pages written back"),
                    (ResetWay::InPlace, None) => "in place".to_owned(),
                    _ => "in a new process".to_owned(),
                };
                self.say("reset", &format!("{how}, in {took_ms:.1} ms"));
            }
            RevertEvent::Collapsed { before_bytes, after_bytes, took_ms, stopped } => {
                let (before, after) = (size(*before_bytes), size(*after_bytes));
                let stopped = stopped.as_ref().map(|why| format!("; stopped early: {why}"));
                let stopped = stopped.unwrap_or_default();
                self.say(
                    "collapsed",
                    &format!("{after} in huge pages, {before} before, in {took_ms:.0} ms{stopped}"),
                );
            }
        }
    }

    /// The command that was run once the guest ran has ended.
    pub fn hooked(&self, event: &HookEvent) {
        if self.json {
            return self.print_json(event);
        }
        match &event.failed {
            Some(why) => self.say("hook", why),
            None => self.say("hook", &format!("done in {:.0} ms", event.took_ms)),
        }
    }

    /// The server went into the background, where it does something for the guest.
    pub fn detached(&self, server: u32, id: String, log: &std::path::Path, does: &str) {
        if self.json {
            let log = log.to_owned();
            return self.print_json(&CommandEvent::Detached { server_pid: server, id, log });
        }
        let log = log.display();
        self.say("detached", &format!("{id}: process {server} {does}; log: {log}"));
    }
}

/// Something that takes its time.
pub(super) struct Waiting(Option<ProgressBar>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.iter().for_each(ProgressBar::finish_and_clear);
    }
}

/// The least columns in which words are wrapped.
const LEAST_ROOM: usize = 30;

/// Where the details of an event begin, in columns.
const DETAILS: usize = 26;

/// A text that begins behind so many columns, in the width of the terminal, each line below the
/// first; as it is where that is no terminal, or too narrow for it.
fn hanging(text: &str, before: usize, columns: Option<usize>) -> String {
    match columns.and_then(|columns| columns.checked_sub(before)) {
        Some(columns @ LEAST_ROOM..) if text.chars().count() > columns => {
            wrap(text, columns).join(&format!("\n{:before$}", ""))
        }
        _ => text.to_owned(),
    }
}

/// In the width of the terminal, whatever it is.
fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A size in the largest unit that leaves at least one digit before the point.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_texts_keep_to_the_width() {
        assert_eq!(hanging("one two", 26, None), "one two");
        assert_eq!(hanging("one two", 26, Some(80)), "one two");
        let words = "word ".repeat(20);
        let shown = hanging(words.trim(), 26, Some(80));
        assert!(shown.lines().all(|line| line.trim().len() <= 54), "{shown}");
        assert_eq!(shown.split_whitespace().count(), 20);
        assert_eq!(hanging(&words, 26, Some(40)), words);
    }

    #[test]
    fn a_last_column_without_room_gets_lines_of_its_own() {
        let rows = [["a".to_owned(), "word ".repeat(8).trim().to_owned()], ["b".into(), "".into()]];
        let lines = |columns| table_lines(["ID", "WHAT"], &rows, columns);
        let beside = ["ID  WHAT", "a   word word word word word word word word", "b"];
        assert_eq!(lines(None), beside);
        assert_eq!(lines(Some(80)), beside);
        assert_eq!(
            lines(Some(35))[..2],
            ["ID  WHAT", "a   word word word word word word\n    word word"]
        );
        let below = ["ID\n    WHAT", "a\n    word word word word word word word word", "b"];
        assert_eq!(lines(Some(33)), below);
        let rows = [["a long cell".to_owned(), String::new()]];
        assert_eq!(table_lines(["ID", "WHAT"], &rows, Some(15)), ["ID", "a long cell"]);
    }

    #[test]
    fn an_event_begins_with_its_version_name_and_time() {
        let event = json!({ "bytes": 1, "event": "verified", "message": "a \"b\"" });
        let line = Output::new(true).json_line(&event);
        assert!(line.starts_with("{\"v\":1,\"event\":\"verified\",\"ms\":"), "{line}");
        let event: Value = serde_json::from_str(&line).unwrap();
        assert!(event["ms"].is_number(), "{line}");
        assert_eq!((&event["bytes"], &event["message"]), (&json!(1), &json!("a \"b\"")));
        assert_eq!(event["clone"], Value::Null);
        let line = Output::new(true).of_clone("w1").json_line(&event);
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["clone"], json!("w1"), "{line}");
    }
}
