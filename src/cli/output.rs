//! What the program prints: lines for people, or one JSON object a line.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use super::flags::with_flags;
use crate::page::PAGE_SIZE;
use crate::revert::{Progress, RevertEvent, Way};
use crate::save::{PauseParts, Recovered, SaveEvent, SwitchedDisk};

/// A command that failed, in words.
pub(super) struct Failure {
    message: String,
    /// It has been printed already, by whoever did the work.
    pub printed: bool,
}

impl Failure {
    /// Something that failed on our side.
    pub fn new(doing: &str, error: &dyn fmt::Display) -> Failure {
        Failure { message: format!("{doing}: {error}"), printed: false }
    }

    /// A failure in words that say all.
    pub fn said(message: String) -> Failure {
        Failure { message, printed: false }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { message: error.to_string(), printed: false }
    }
}

/// Prints a failure where its reader looks for it.
pub(super) fn print_failure(failure: &Failure, json: bool) {
    if failure.printed {
        return;
    }
    if json {
        print_line(&json!({ "event": "error", "message": failure.message }).to_string());
    }
    let _ = writeln!(std::io::stderr(), "snapback: {}", with_flags(&failure.message));
}

/// Prints one line. A reader that has gone away is not our failure.
pub(super) fn print_line(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{}", with_flags(line)).and_then(|()| stdout.flush());
}

/// Prints events as they come.
pub(super) struct Output {
    json: bool,
    start: Instant,
    bar: ProgressBar,
    /// Whether events go to stderr too.
    log: bool,
}

impl Output {
    pub fn new(json: bool) -> Output {
        let bar = match !json && std::io::stderr().is_terminal() {
            true => ProgressBar::new(0).with_style(bar_style()),
            false => ProgressBar::hidden(),
        };
        Output { json, start: Instant::now(), bar, log: false }
    }

    /// The output of a server in the background: JSON for whoever started it, for as
    /// long as that reads, and the same to the log.
    pub fn of_server() -> Output {
        Output { json: true, start: Instant::now(), bar: ProgressBar::hidden(), log: true }
    }

    fn ms(&self) -> f64 {
        (self.start.elapsed().as_secs_f64() * 1e6).round() / 1e3
    }

    /// One object: the event's name and time first, for whoever reads along.
    pub fn print_json(&self, event: &impl Serialize) {
        let Ok(Value::Object(mut fields)) = serde_json::to_value(event) else { return };
        let name = fields.remove("event").unwrap_or_default();
        let mut line = format!("{{\"event\":{name},\"ms\":{}", self.ms());
        for (key, value) in fields {
            line.push_str(&format!(",\"{key}\":{value}"));
        }
        line.push('}');
        print_line(&line);
        if self.log {
            let _ = writeln!(std::io::stderr(), "{}", with_flags(&line));
        }
    }

    pub fn say(&self, what: &str, details: &str) {
        let line = format!("{:>10.1} ms  {what:<11}{details}", self.ms());
        // A bar that has not begun is not drawn yet, and suspending it would do that.
        match self.bar.length() {
            None | Some(0) => print_line(line.trim_end()),
            Some(_) => self.bar.suspend(|| print_line(line.trim_end())),
        }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Takes the bar away, for what is said last.
    pub fn finish_bar(&self) {
        self.bar.finish_and_clear();
    }

    /// The end of a command: an event for programs, words for people.
    pub fn done(&self, event: &Value, what: &str, details: &str) {
        self.bar.finish_and_clear();
        match self.json {
            true => self.print_json(event),
            false => self.say(what, details),
        }
    }

    pub fn advance(&self, done: u64, total: u64, message: String) {
        self.bar.set_length(total * PAGE_SIZE as u64);
        self.bar.set_position(done * PAGE_SIZE as u64);
        self.bar.set_message(message);
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
            SaveEvent::Note { what, why } => self.say("note", &format!("{what}: {why}")),
            SaveEvent::Thawed => self.say("thawed", ""),
            SaveEvent::Committed { disk } => {
                self.say("committed", &format!("the overlay back into disk {disk}"));
            }
            SaveEvent::Moment { pause_ms: Some(pause), pause_parts, .. } => {
                let parts = pause_parts.map(|parts| {
                    let PauseParts { stop_ms, disks_ms, walk_ms, resume_ms } = parts;
                    format!(
                        " (stop {stop_ms:.1}, disks {disks_ms:.1}, QEMU's walk {walk_ms:.1}, \
                         resume {resume_ms:.1})"
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
                disks,
                ..
            } => {
                self.bar.finish_and_clear();
                let zero = size(zero_pages * PAGE_SIZE as u64);
                let stalled = match *stalled_ms > 0.0 {
                    true => format!("; QEMU waited {stalled_ms:.0} ms for the disk"),
                    false => String::new(),
                };
                let parent = match parent_pages {
                    0 => String::new(),
                    pages => format!(" ({} lie in its parents)", size(pages * PAGE_SIZE as u64)),
                };
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
        self.say("DISKS", "from now on the guest lives in new files: change what starts it.");
        let detail = |text: &str| print_line(&format!("{:26}{text}", ""));
        detail("Started from an old file again, it loses all that it has written since, and");
        detail("destroys this snapshot.");
        for SwitchedDisk { frozen, option, .. } in disks {
            detail(&format!("Instead of {frozen} and its format:"));
            print_line(&shlex::try_quote(option).unwrap_or(option.into()));
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
            return self.print_json(&json!({
                "event": "recovered", "outcome": outcome, "says": says, "disks": disks,
            }));
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
            RevertEvent::Disk { disk, overlay, .. } => {
                let changes = match overlay {
                    Some(path) => format!("its changes go to {}", path.display()),
                    None => "its changes go with QEMU".to_owned(),
                };
                self.say("disk", &format!("{disk}: {changes}"));
            }
            RevertEvent::QemuReady { pid } => self.say("qemu ready", &format!("process {pid}")),
            RevertEvent::Placing { way, reason } => {
                let way = match way {
                    Way::Socket => "by QEMU's socket",
                    Way::Map => "by mapping the image",
                    _ => "straight into memory, by userfaultfd",
                };
                self.say("placing", &format!("{way}: {reason}"));
            }
            RevertEvent::Running { .. } => self.say("running", "the guest runs"),
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
        }
    }

    /// The server went into the background.
    pub fn detached(&self, server: u32, log: &std::path::Path) {
        if self.json {
            let log = log.display().to_string();
            return self
                .print_json(&json!({ "event": "detached", "server_pid": server, "log": log }));
        }
        self.say("detached", &format!("process {server} fills its memory; log: {}", log.display()));
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}")
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
