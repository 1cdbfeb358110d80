//! What a revert tells as it goes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};

use super::options::Placement;
use crate::reset::ResetWay;

/// Who hears what happens during a revert. Not a generic type, of which each caller would add all of
/// a revert to the program once more.
pub(crate) type OnEvent<'a> = &'a mut (dyn FnMut(RevertEvent) + Send);

/// What happens during a revert, in this order but for `StillNeeded` and those of memory that can't
/// be read. A server that takes over from another begins with `TakenOver`; `Placing` may come again
/// then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum RevertEvent {
    /// Something of the recorded command line was changed.
    Note {
        /// What was changed.
        what: String,
        /// Why.
        why: String,
    },
    /// Something that should be changed, and holds up nothing.
    Warning {
        /// What, and how.
        says: String,
    },
    /// A disk that is part of the snapshot: where the guest's changes to it go.
    Disk {
        /// The disk.
        disk: String,
        /// The frozen file, which is only read.
        frozen: PathBuf,
        /// The new file on top of it; none for one without a name, which goes with QEMU.
        overlay: Option<PathBuf>,
    },
    /// QEMU's QMP answers.
    QemuReady {
        /// QEMU's process id.
        pid: i32,
    },
    /// By which transport memory goes.
    Placing {
        /// The transport.
        #[serde(rename = "way")]
        placement: Placement,
        /// Why this one.
        reason: String,
    },
    /// The disks of a snapshot that was far away are here: the guest depends on nobody. Behind
    /// `Resident`.
    DisksResident {
        /// How long that took from `Resident` on, in milliseconds.
        took_ms: f64,
        /// Bytes that were fetched from the repository in all.
        fetched_bytes: u64,
    },
    /// The guest runs (or, saved while paused, could run).
    Running {
        /// QEMU's process id; none for a QEMU that somebody else started.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid: Option<i32>,
        /// Ports of this host that were replaced ([`RewriteOptions::ports`]): the new one for
        /// each recorded one.
        ///
        /// [`RewriteOptions::ports`]: crate::RewriteOptions::ports
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "ports")]
        ports: BTreeMap<u16, u16>,
        /// QEMU's control socket (QMP) for others; none where it has none with a path, and for a
        /// QEMU that somebody else started.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        qmp: Option<PathBuf>,
    },
    /// The guest's agent has done something that it was told once the guest ran
    /// ([`RevertOptions::agent`](super::RevertOptions::agent)), or has failed. It comes at any time
    /// behind `Running`.
    Agent {
        /// What: a command of the guest's shell, `guest-set-time`, or a card's new address.
        did: String,
        /// Why it failed; none where it did not. What was to follow is left out then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<String>,
        /// How long it took, in milliseconds; the first time with the wait for the agent.
        took_ms: f64,
        /// How many things are to follow.
        left: u64,
    },
    /// The process that served the guest has died, and this one has taken its place.
    TakenOver {
        /// By what: `keeper`, or `resume` where the keeper had died as well.
        by: String,
        /// How long the guest was not served, in milliseconds; by `resume`, how long that took to
        /// serve it.
        after_ms: f64,
        /// How many servers have followed the first.
        restarts: u64,
    },
    /// Memory can't be read from the image that the guest has not asked for. All else is brought;
    /// this is tried again once a second.
    Degraded(Unreadable),
    /// The guest has asked for memory that can't be read from the image, or for a part of a disk that
    /// is still in a repository. The thread of QEMU's that needs it waits until it can be, which is
    /// tried once a second; QEMU is told to stop the guest meanwhile, if we speak to it.
    Stopped {
        /// Why: `unreadable`, or `store` where the store of a repository does not answer.
        reason: String,
        /// Which memory; nothing where a disk waits.
        #[serde(flatten, skip_serializing_if = "Option::is_none")]
        memory: Option<Unreadable>,
        /// What is wrong with the store, where a disk waits for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        store: Option<String>,
    },
    /// All that the guest waited for could be read after all: the guest goes on.
    Repaired,
    /// How far memory has come.
    Progress(Progress),
    /// An interrupt came while the guest still depends on the image being served.
    StillNeeded,
    /// All memory is in place; the guest no longer depends on us.
    Resident {
        /// The final counts.
        #[serde(flatten)]
        progress: Progress,
        /// Answers that brought memory, as opposed to requests for what was on its way.
        demands: u64,
        /// The median time of such an answer, in microseconds.
        answer_p50_us: f64,
        /// The time that 99 of 100 answers took at most, in microseconds.
        answer_p99_us: f64,
    },
    /// The guest can be reset inside its QEMU from now on.
    Resettable {
        /// Host pages that it has written so far.
        written: u64,
    },
    /// The guest was taken back to its image, and goes on from there.
    Reset {
        /// How.
        how: ResetWay,
        /// Host pages that were written back; none in a new process.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pages: Option<u64>,
        /// From the request until the guest ran again, in milliseconds.
        took_ms: f64,
    },
    /// Memory that came in small pages was collapsed into huge ones. It comes only where memory
    /// was installed directly, [`Delivery::collapse`](super::Delivery::collapse) is set, and
    /// QEMU has not ended.
    Collapsed {
        /// Bytes of the guest's memory in huge pages when its memory was in place.
        before_bytes: u64,
        /// The same now.
        after_bytes: u64,
        /// How long it took, in milliseconds.
        took_ms: f64,
        /// Why some small pages were left that are worth collapsing; none where none were.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stopped: Option<String>,
    },
}

/// Memory that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unreadable {
    /// The block's name.
    pub block: String,
    /// Offset in the block, in bytes.
    pub offset: u64,
    /// Its guest-physical address, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_physical: Option<u64>,
    /// What is wrong, with the image, the place in it, and the address.
    pub why: String,
}

/// How far a revert has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// Pages of 4096 bytes that are in place.
    pub pages: u64,
    /// Pages of the machine.
    pub total: u64,
    /// Requests from the guest so far.
    pub requests: u64,
}

/// Reads a map whose keys are numbers, which are text in JSON. Within an enum with a tag serde
/// doesn't turn them back.
fn ports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u16, u16>, D::Error> {
    let ports = BTreeMap::<String, u16>::deserialize(deserializer)?;
    let number = |(old, new): (String, u16)| Ok((old.parse().map_err(D::Error::custom)?, new));
    ports.into_iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_tells_ports_by_their_numbers() {
        let event = RevertEvent::Running {
            pid: Some(7),
            ports: [(2222, 40731)].into(),
            qmp: Some("/q".into()),
        };
        let json = serde_json::json!({"event": "running", "pid": 7, "ports": {"2222": 40731},
                                      "qmp": "/q"});
        assert_eq!(serde_json::to_value(&event).unwrap(), json);
        assert_eq!(serde_json::from_value::<RevertEvent>(json).unwrap(), event);
        let none = serde_json::json!({"event": "running"});
        let event: RevertEvent = serde_json::from_value(none.clone()).unwrap();
        assert_eq!(serde_json::to_value(&event).unwrap(), none);
    }
}
