//! What came of backups, as a file for the textfile collector of Prometheus' node exporter
//! (<https://github.com/prometheus/node_exporter#textfile-collector>).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use uuid::Uuid;

use super::error::BackupError;
use super::spool::io;

/// The longest file that is read.
const MAX_FILE: u64 = 16 << 20;

/// All figures, with what they tell.
const FIGURES: [(&str, &str); 5] = [
    (SUCCESS, "Whether the last backup of a machine succeeded."),
    (
        LAST_SUCCESS,
        "When the last backup of a machine that succeeded ended, in seconds since 1970.",
    ),
    (LAST_RUN, "When the last backup of a machine ended, in seconds since 1970."),
    (DURATION, "How long the last backup of a machine took."),
    (NEW_BYTES, "Bytes that the last snapshot of a machine has added to the repository."),
];
pub(super) const SUCCESS: &str = "snapback_backup_success";
pub(super) const LAST_SUCCESS: &str = "snapback_backup_last_success_timestamp_seconds";
pub(super) const LAST_RUN: &str = "snapback_backup_last_run_timestamp_seconds";
pub(super) const DURATION: &str = "snapback_backup_duration_seconds";
pub(super) const NEW_BYTES: &str = "snapback_backup_new_bytes";

/// Figures of machines: by the figure's name, and the machine's label.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    values: BTreeMap<(String, String), String>,
}

impl Metrics {
    /// Those that an earlier backup has left: of machines that are not saved this time, and of when one
    /// last was. A file that can't be understood counts as none.
    pub fn read(path: &Path) -> Metrics {
        let small = fs::metadata(path).is_ok_and(|meta| meta.len() <= MAX_FILE);
        let text = if small { fs::read_to_string(path).unwrap_or_default() } else { String::new() };
        let mut values = BTreeMap::new();
        for line in text.lines() {
            let Some((name, value)) = line.rsplit_once(' ') else { continue };
            let Some((name, label)) = name.split_once('{') else { continue };
            if FIGURES.iter().any(|(known, _)| *known == name) && value.parse::<f64>().is_ok() {
                values.insert((name.to_owned(), format!("{{{label}")), value.to_owned());
            }
        }
        Metrics { values }
    }

    /// Notes a figure of a machine.
    pub fn set(&mut self, figure: &str, machine: &str, value: f64) {
        let machine = machine.replace('\\', "\\\\").replace('"', "\\\"");
        let label = format!("{{machine=\"{machine}\"}}");
        self.values.insert((figure.to_owned(), label), value.to_string());
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (figure, help) in FIGURES {
            // Writing to a string does not fail.
            let _ = writeln!(text, "# HELP {figure} {help}\n# TYPE {figure} gauge");
            let of = self.values.iter().filter(|((name, _), _)| name == figure);
            for ((_, label), value) in of {
                let _ = writeln!(text, "{figure}{label} {value}");
            }
        }
        text
    }

    /// Writes the file. Who reads it sees the old one or the new one.
    pub fn write(&self, path: &Path) -> Result<(), BackupError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // The collector reads what ends in `.prom`.
        let new = path.with_file_name(format!(".{name}.{}", Uuid::new_v4().simple()));
        let create = File::options().write(true).create_new(true).mode(0o644).open(&new);
        let written = create.and_then(|mut file| {
            file.write_all(self.text().as_bytes())?;
            file.sync_all()
        });
        let named = written.and_then(|()| fs::rename(&new, path));
        named.map_err(|error| {
            let _ = fs::remove_file(&new);
            io("writing", path, error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_left_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapback.prom");
        let mut first = Metrics::read(&path);
        first.set(LAST_SUCCESS, "web \"1\"", 17.0);
        first.set(SUCCESS, "db1", 1.0);
        first.write(&path).unwrap();
        let mut second = Metrics::read(&path);
        second.set(SUCCESS, "db1", 0.0);
        second.write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("seconds{machine=\"web \\\"1\\\"\"} 17\n"), "{text}");
        assert!(text.contains("snapback_backup_success{machine=\"db1\"} 0\n"), "{text}");
        assert!(text.contains("# TYPE snapback_backup_success gauge\n"), "{text}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let error = second.write(&directory.path().join("no/such.prom")).unwrap_err();
        assert!(error.to_string().contains("such.prom"), "{error}");
    }

    #[test]
    fn nonsense_counts_as_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapback.prom");
        fs::write(&path, "x{ 1\nsnapback_backup_success{machine=\"a\"} x\n{} {}\n\n").unwrap();
        assert!(Metrics::read(&path).values.is_empty());
    }
}
