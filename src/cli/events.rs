//! The events that commands print with `--json`, beside those of the library's journeys, and the
//! JSON Schema of all of them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde::Serialize;
use serde_json::{Value, json};

use super::failure::ErrorEvent;
use super::hook::HookEvent;
use super::repository::events::RepositoryEvent;
use crate::bench::{BenchEvent, Change, Summary};
use crate::daemon::DaemonEvent;
use crate::doctor::{Item, Reverts};
use crate::exchange::ExchangeEvent;
use crate::machine::{Disk, Hotplug};
use crate::pools::{CacheView, GuestView, PoolView, SetupView};
use crate::repository::StoreWait;
use crate::revert::RevertEvent;
use crate::runs::{LeftOver, Run};
use crate::save::{SaveEvent, SwitchedDisk};

/// The version of events: it grows when a program that reads them would have to change. Fields
/// and events that are added leave it as it is.
pub(super) const VERSION: u32 = 1;

/// What a command tells that no journey of the library does.
#[derive(Serialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum CommandEvent {
    /// One thing that `check` has looked at.
    Check {
        /// What.
        item: &'static str,
        /// Whether a save would work, as far as this goes.
        ok: bool,
        /// Whether a save would work, but a revert would refuse its image.
        warning: bool,
        /// What was found, or why a save would not work.
        says: String,
    },
    /// One thing of this host that `check --here` has looked at for a guest. What is `missing` keeps it
    /// from running.
    Here(Box<Item>),
    /// The guest of a new image has run again.
    Proved {
        /// From the start of its revert until it ran, in milliseconds.
        running_ms: f64,
    },
    /// What became of a save that was killed.
    Recovered {
        /// `nothing`, `saved` or `undone`.
        outcome: &'static str,
        /// The same in words.
        says: String,
        /// The disks that were switched to overlays, where the image is whole.
        disks: Vec<SwitchedDisk>,
    },
    /// The server of a revert went into the background.
    Detached {
        /// The server's process id.
        server_pid: u32,
        /// The id of the revert, for `stop` and `logs`.
        id: String,
        /// Its log.
        log: PathBuf,
    },
    /// A revert that is under way, or was when its processes were killed.
    Run(Box<Run>),
    /// What a daemon keeps decompressed of an image, for all guests of its pools.
    Cache(Box<CacheOf>),
    /// A revert was ended.
    Ended {
        /// Its id.
        id: String,
        /// QEMU's process, if it was ended by this.
        qemu_pid: Option<i32>,
        /// What went with it.
        removed: Vec<PathBuf>,
        /// Overlays that the guest has written to, for `gc` to remove.
        kept: Vec<PathBuf>,
    },
    /// Something that killed reverts have left.
    LeftOver {
        /// What it is.
        #[serde(flatten)]
        left: LeftOver,
        /// Whether it has been removed.
        removed: bool,
    },
    /// What an image holds.
    Info(Box<Info>),
    /// An image's working set.
    WorkingSet {
        /// Its file.
        path: PathBuf,
        /// The image that it belongs to.
        identity: String,
        /// When it was last added to, in seconds since 1970.
        recorded_unix: u64,
        /// Pages of 4096 bytes in it.
        pages: u64,
        /// The share of the machine's pages, from 0 to 1.
        share: f64,
    },
    /// An image is whole.
    Verified {
        /// Pages whose index entries were checked.
        pages: u64,
        /// Chunks checked.
        chunks: u64,
        /// Images that it refers to.
        parents: u64,
        /// How many of those were checked too.
        parents_checked: u64,
    },
    /// One damage of an image.
    Damaged {
        /// What is wrong.
        what: String,
        /// Memory that can't be read because of it, the first ranges.
        ranges: Vec<Range>,
        /// Bytes of memory that can't be read because of it, in all.
        bytes: u64,
    },
    /// An image and its parents have been merged.
    Flattened {
        /// The new image's identity.
        identity: String,
        /// Pages of 4096 bytes that are stored.
        pages: u64,
        /// Pages that are all zeros.
        zero_pages: u64,
        /// Size of the image in bytes.
        image_bytes: u64,
    },
    /// One thing that `doctor` has asked the host for.
    Doctor(Box<Item>),
    /// What follows from all that `doctor` has found.
    Diagnosis {
        /// Whether a running guest can be saved by at least one QEMU.
        save: bool,
        /// How the best QEMU brings a guest back.
        revert: Reverts,
    },
    /// A pool of a daemon's.
    Pool(Box<PoolView>),
    /// A pool was removed.
    PoolRemoved {
        /// Its name.
        pool: String,
    },
    /// A guest of a pool was taken, and runs.
    Running(Box<Taken>),
    /// A clone of a guest that was forked runs.
    #[serde(rename = "running")]
    Forked(Box<ForkedClone>),
    /// A guest of a pool has been ended.
    Released {
        /// Its id or name, as it was asked for.
        id: String,
    },
    /// The result of a bench.
    Summary(Box<Summary>),
    /// A quantity of two benches beside each other.
    Change(Box<Change>),
    /// A setting, as `config show` tells it.
    Setting {
        /// Its name.
        name: &'static str,
        /// Its value; none where it is as the program has it by itself.
        value: Option<String>,
        /// The file that says it.
        file: Option<PathBuf>,
        /// The variable of the environment that says it.
        variable: Option<String>,
    },
}

/// A clone of a guest that was forked.
#[derive(Serialize, JsonSchema)]
pub(super) struct ForkedClone {
    /// Its name.
    pub name: String,
    /// Its QEMU's process id.
    pub qemu_pid: i32,
    /// Its QEMU's control socket (QMP).
    pub qmp: Option<PathBuf>,
    /// Its directory.
    pub dir: PathBuf,
    /// The port of this host for each recorded one.
    pub ports: BTreeMap<u16, u16>,
    /// Time from the moment until it ran, in milliseconds.
    pub since_moment_ms: f64,
}

/// What a daemon keeps decompressed of an image.
#[derive(Serialize, JsonSchema)]
pub(super) struct CacheOf {
    /// The daemon's socket.
    pub daemon: PathBuf,
    /// The pools' image.
    pub image: PathBuf,
    /// The pools whose guests share it.
    pub pools: Vec<String>,
    #[serde(flatten)]
    pub cache: CacheView,
}

/// A guest of a pool.
#[derive(Serialize, JsonSchema)]
pub(super) struct Taken {
    /// Its id.
    pub id: String,
    /// Its pool.
    pub pool: String,
    /// Its name.
    pub name: String,
    /// Its QEMU's process id.
    pub qemu_pid: i32,
    /// Its QEMU's control socket (QMP).
    pub qmp: Option<PathBuf>,
    /// Its directory.
    pub dir: PathBuf,
    /// The port of this host for each recorded one.
    pub ports: BTreeMap<String, u16>,
    /// From the request on the daemon's socket until QEMU ran the guest, in milliseconds.
    pub took_ms: Option<f64>,
    /// How what is done for it as soon as it runs has come on, where something is.
    pub setup: Option<SetupView>,
}

impl Taken {
    pub fn new(guest: GuestView) -> Taken {
        let GuestView { id, pool, name, qemu_pid, qmp, dir, ports, ms, setup, .. } = guest;
        Taken { id, pool, name, qemu_pid, qmp, dir, ports, took_ms: ms, setup }
    }
}

/// What an image holds.
#[derive(Serialize, JsonSchema)]
pub(super) struct Info {
    /// Its identity.
    pub identity: String,
    /// The program that wrote it.
    pub created_by: String,
    /// The moment of the snapshot, in microseconds since 1970.
    pub moment_unix_us: u64,
    /// How long the guest stood still for it, in milliseconds.
    pub pause_ms: Option<f64>,
    /// QEMU's version.
    pub qemu: String,
    /// Its distributor's part.
    pub qemu_package: String,
    /// QEMU's binary.
    pub binary: String,
    /// The versioned machine type.
    pub machine_type: String,
    /// Whether the guest ran.
    pub running: bool,
    /// QEMU's command line.
    pub command_line: Vec<String>,
    /// QEMU's working directory.
    pub working_folder: String,
    /// Writable disks that are no part of the image.
    pub uncaptured_disks: Vec<String>,
    /// All disks and drives.
    pub disks: Vec<Disk>,
    /// Devices that were plugged in and out.
    pub hotplug: Hotplug,
    /// The machine as libvirt describes it.
    pub libvirt_xml: Option<String>,
    /// Its persistent definition in libvirt.
    pub libvirt_inactive_xml: Option<String>,
    /// The guest's RAMBlocks.
    pub blocks: Vec<InfoBlock>,
    /// `packed` or `flat`.
    pub layout: &'static str,
    /// The images that it refers to.
    pub layers: Vec<Layer>,
    /// Pages of 4096 bytes that are stored.
    pub data_pages: u64,
    /// Those of them that lie in other images.
    pub parent_pages: u64,
    /// Pages that are all zeros.
    pub zero_pages: u64,
    /// Bytes of memory that are not zeros.
    pub data_bytes: u64,
    /// The file's length in bytes.
    pub image_bytes: u64,
    /// The size of memory divided by that of the file.
    pub ratio: f64,
}

/// A RAMBlock.
#[derive(Serialize, JsonSchema)]
pub(super) struct InfoBlock {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// The size of the host's pages behind it, in bytes.
    pub page_size: u64,
}

/// An image that another one refers to.
#[derive(Serialize, JsonSchema)]
pub(super) struct Layer {
    /// Its identity.
    pub identity: String,
    /// Where it was found.
    pub path: Option<String>,
    /// Why it was not found.
    pub problem: Option<String>,
    /// Its recorded path, as seen from the image's directory.
    pub relative: String,
    /// Its recorded absolute path.
    pub absolute: String,
    /// Its length in bytes.
    pub file_bytes: u64,
    /// Pages of the image that lie in it.
    pub pages: u64,
}

/// A range of guest memory.
#[derive(Serialize, JsonSchema)]
pub(super) struct Range {
    /// The block's name.
    pub block: String,
    /// Offset in the block, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// The schema of a line, as text.
pub(super) fn schema_text() -> String {
    format!("{:#}\n", schema())
}

/// The schema of a line: its version, its name, its time, and the fields of its event.
fn schema() -> Value {
    let mut generator: SchemaGenerator =
        SchemaSettings::draft2020_12().for_serialize().into_generator();
    let events = [
        generator.subschema_for::<SaveEvent>(),
        generator.subschema_for::<RevertEvent>(),
        generator.subschema_for::<DaemonEvent>(),
        generator.subschema_for::<ExchangeEvent>(),
        generator.subschema_for::<BenchEvent>(),
        generator.subschema_for::<CommandEvent>(),
        generator.subschema_for::<RepositoryEvent>(),
        generator.subschema_for::<StoreWait>(),
        generator.subschema_for::<HookEvent>(),
        generator.subschema_for::<ErrorEvent>(),
    ];
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line that snapback prints with --json",
        "type": "object",
        "required": ["v", "event", "ms"],
        "properties": {
            "v": { "const": VERSION },
            "event": { "type": "string" },
            "ms": { "type": "number", "minimum": 0 },
            "clone": { "type": "string" },
        },
        "anyOf": events,
        "unevaluatedProperties": false,
        "$defs": generator.take_definitions(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With SNAPBACK_WRITE_SCHEMA set, writes it anew.
    #[test]
    fn the_schema_in_the_documentation_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/events.schema.json");
        if std::env::var_os("SNAPBACK_WRITE_SCHEMA").is_some() {
            std::fs::write(path, schema_text()).unwrap();
        }
        let current = std::fs::read_to_string(path).unwrap_or_default();
        assert!(current == schema_text(), "run `snapback schema > docs/events.schema.json`");
    }

    #[test]
    fn every_kind_of_error_is_documented_with_its_exit_code() {
        let text = include_str!("../../docs/events.md");
        let troubleshooting = include_str!("../../docs/troubleshooting.md");
        for kind in crate::kind::ErrorKind::ALL {
            let exit_code = super::super::failure::Failure::said(*kind, String::new()).exit_code();
            let row = format!("| `{}` | {exit_code} | ", kind.code());
            assert!(text.contains(&row), "no row {row}");
            let code = format!("`{}`", kind.code());
            assert!(troubleshooting.contains(&code), "no {code} in troubleshooting.md");
        }
    }
}
