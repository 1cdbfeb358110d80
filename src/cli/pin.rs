//! Processors to keep to.

use std::fmt;
use std::io;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Some of this host's processors.
#[derive(Clone)]
pub(super) struct Cpus {
    text: String,
    set: CpuSet,
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Cpus {
    /// Keeps all threads that there are to them, and so all threads and processes that these start.
    pub fn pin(&self) -> io::Result<()> {
        for entry in std::fs::read_dir("/proc/self/task")? {
            let name = entry?.file_name();
            let thread = name.to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw);
            if let Some(thread) = thread {
                sched_setaffinity(thread, &self.set)?;
            }
        }
        Ok(())
    }
}

/// Numbers and ranges with commas between them.
pub(super) fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let wrong = || "it has the form 2-5,8".to_owned();
    let mut set = CpuSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CpuSet::count() {
            return Err(wrong());
        }
        for cpu in first..=last {
            set.set(cpu).map_err(|error| error.to_string())?;
        }
    }
    Ok(Cpus { text: text.to_owned(), set })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_read_as_documented() {
        let cpus = parse_cpus("2-5,8").unwrap_or_else(|why| panic!("{why}"));
        let set = |cpu| cpus.set.is_set(cpu).unwrap_or_default();
        assert_eq!([1, 2, 5, 6, 8, 9].map(set), [false, true, true, false, true, false]);
        for wrong in ["", "a", "5-2", "1,", "99999999"] {
            assert!(parse_cpus(wrong).is_err(), "{wrong}");
        }
    }
}
