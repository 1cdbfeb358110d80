//! The state of the machine while runs are measured: what makes figures differ that are of the same
//! program.

use std::fs;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::{SysconfVar, sysconf};
use schemars::JsonSchema;
use serde::Serialize;

use crate::host::huge_pages;

/// The share of the processors that others may use, or a hypervisor keep, before somebody is warned.
pub(super) const TOLERATED: f64 = 0.05;

/// The machine's state. What can't be found out is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub struct State {
    /// How processors choose their frequency; of several that differ, all, with commas.
    pub governor: Option<String>,
    /// Whether processors may go beyond their nominal frequency.
    pub turbo: Option<bool>,
    /// What transparent huge pages are made of: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// Whether this is a virtual machine itself.
    pub virtual_machine: bool,
    /// Whether QEMU can have KVM.
    pub kvm: bool,
    /// Processes that ran or waited to, on average of the last minute, ahead of the runs.
    pub load: Option<f64>,
    /// The processors on which all of it ran, where they were chosen.
    pub pinned: Option<String>,
    /// The share of all processors' time that other processes used during the runs, from 0 to 1.
    pub others_share: Option<f64>,
    /// The same of what a hypervisor gave to others.
    pub stolen_share: Option<f64>,
}

/// Seconds of processors since the machine's start.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Times {
    all: f64,
    busy: f64,
    stolen: f64,
}

/// What has been read ahead of the runs.
pub(super) struct Watch {
    state: State,
    before: Option<(Times, f64)>,
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

impl Watch {
    /// Begins to watch.
    pub fn begin(pinned: Option<String>) -> Watch {
        let cpu_flags = read("/proc/cpuinfo").unwrap_or_default();
        let state = State {
            governor: governors(),
            turbo: turbo(),
            huge_pages: huge_pages::mode(),
            virtual_machine: cpu_flags.split_whitespace().any(|flag| flag == "hypervisor"),
            kvm: fs::File::options().read(true).write(true).open("/dev/kvm").is_ok(),
            load: read("/proc/loadavg")
                .and_then(|text| text.split_whitespace().next()?.parse().ok()),
            pinned,
            others_share: None,
            stolen_share: None,
        };
        Watch { state, before: now() }
    }

    /// What is known ahead of the runs.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The state with what has happened since.
    pub fn end(self) -> State {
        let shares = self.before.zip(now()).and_then(|((before, ours), (after, ours_now))| {
            let all = after.all - before.all;
            let others = (after.busy - before.busy) - (ours_now - ours);
            (all > 0.0).then(|| {
                let share = |seconds: f64| (seconds / all).clamp(0.0, 1.0);
                (share(others), share(after.stolen - before.stolen))
            })
        });
        let (others_share, stolen_share) = shares.unzip();
        State { others_share, stolen_share, ..self.state }
    }
}

impl State {
    /// What makes figures worse than they could be, or harder to repeat.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut warn = |text: String| warnings.push(text);
        if let Some(governor) = self.governor.as_ref().filter(|governor| *governor != "performance")
        {
            warn(format!(
                "processors run by the governor {governor}: their frequency changes with load \
                 (`cpupower frequency-set -g performance`)"
            ));
        }
        if self.virtual_machine {
            warn("this is a virtual machine: what its host does is part of all times".into());
        }
        if !self.kvm {
            warn(
                "there is no KVM: QEMU emulates, and guests run much slower than elsewhere".into(),
            );
        }
        // The average of a minute: runs of before may be in it.
        if let Some(load) = self.load.filter(|load| *load > 0.5 && self.others_share.is_none()) {
            warn(format!("{load:.1} processes ran or waited to in the last minute"));
        }
        let share = |share: Option<f64>| share.filter(|share| *share > TOLERATED);
        if let Some(others) = share(self.others_share) {
            let percent = others * 100.0;
            warn(format!(
                "other processes used {percent:.0} % of the processors meanwhile: compare these \
                 figures to none"
            ));
        }
        if let Some(stolen) = share(self.stolen_share) {
            let percent = stolen * 100.0;
            warn(format!("this machine's host gave {percent:.0} % of the processors to others"));
        }
        warnings
    }
}

fn governors() -> Option<String> {
    let cpus = fs::read_dir("/sys/devices/system/cpu").ok()?.flatten();
    let governor = |entry: fs::DirEntry| {
        let path = entry.path().join("cpufreq/scaling_governor");
        fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
    };
    let mut found: Vec<String> = cpus.filter_map(governor).collect();
    found.sort();
    found.dedup();
    (!found.is_empty()).then(|| found.join(","))
}

fn turbo() -> Option<bool> {
    let intel = read("/sys/devices/system/cpu/intel_pstate/no_turbo").map(|text| text == "0");
    intel.or_else(|| read("/sys/devices/system/cpu/cpufreq/boost").map(|text| text == "1"))
}

/// The processors' time, and that of this process and of all its children that have ended.
fn now() -> Option<(Times, f64)> {
    let ours = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN].into_iter().map(|who| {
        let usage = getrusage(who).ok()?;
        let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Some(micros as f64 / 1e6)
    });
    let ours = ours.sum::<Option<f64>>()?;
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten()? as f64;
    Some((times(&fs::read_to_string("/proc/stat").ok()?, ticks)?, ours))
}

/// The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
fn times(text: &str, ticks: f64) -> Option<Times> {
    let numbers = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    let numbers: Vec<f64> = numbers.map_while(|n| n.parse().ok()).map(|n: f64| n / ticks).collect();
    let [user, nice, system, idle, waiting, irq, soft_irq, stolen] = *numbers.get(..8)? else {
        return None;
    };
    let busy = user + nice + system + irq + soft_irq;
    Some(Times { all: busy + idle + waiting + stolen, busy, stolen })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read() {
        let found = times("cpu  100 0 50 800 20 0 10 20 7 0\ncpu0 1", 2.0);
        assert_eq!(found, Some(Times { all: 500.0, busy: 80.0, stolen: 10.0 }));
        assert_eq!(times("intr 5", 100.0), None);
    }

    #[test]
    fn what_spoils_figures_is_warned_about() {
        let quiet = State { kvm: true, governor: Some("performance".into()), ..State::default() };
        assert_eq!(quiet.warnings(), [""; 0]);
        let loud = State { others_share: Some(0.3), stolen_share: Some(0.01), ..quiet };
        let warnings = loud.warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("30 %"), "{warnings:?}");
    }

    #[test]
    fn a_watch_tells_shares() {
        let state = Watch::begin(None).end();
        assert!(state.others_share.is_none_or(|share| (0.0..=1.0).contains(&share)), "{state:?}");
    }
}
