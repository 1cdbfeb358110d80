//! Whether a snapshot can be taken, asked while the guest runs and is not touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{SaveError, SaveOptions};
use crate::image::Compression;
use crate::machine::Machine;
use crate::qmp::{Qmp, QmpError, RamBlock};
use crate::uffd::{self, UffdError};
use crate::vm;

/// How long QEMU may take to greet us.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The oldest QEMU that is known to work, as major and minor version.
const OLDEST_QEMU: (u32, u32) = (7, 2);

/// From this version on `background-snapshot` leaves a paused guest paused; before,
/// it starts it (seen on 7.2).
const KEEPS_PAUSED: (u32, u32) = (9, 0);

/// From this version on a background snapshot that comes to nothing takes its write
/// protection off memory. Before, the guest hangs at its next write to a page that has
/// not been sent (fixed in QEMU by "migration: stop tracking ram writes when cancelling
/// background migration"; seen on 7.2.22).
const LETS_GO: (u32, u32) = (8, 1);

/// How much smaller than memory a compressed image is expected to be, at the least,
/// when the room for it is checked. A guess: a disk that fills up later is an error
/// that leaves the guest as it was.
const COMPRESSED_SHARE: u64 = 4;

/// Why a snapshot can't be taken. The guest has not been touched.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// QEMU is too old.
    #[error("QEMU {found} is too old: an instant save needs {}.{} or later", OLDEST_QEMU.0, OLDEST_QEMU.1)]
    TooOld {
        /// QEMU's version.
        found: String,
    },
    /// The guest is in a state in which it can't be saved.
    #[error("the guest is in state `{state}`: {hint}")]
    State {
        /// QEMU's run state.
        state: String,
        /// What to do.
        hint: &'static str,
    },
    /// Another migration is under way.
    #[error(
        "a migration is under way in this QEMU (status `{0}`): wait until it has ended, or cancel it"
    )]
    Migrating(String),
    /// A device or a setting forbids migration.
    #[error("QEMU can't save this guest: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// QEMU has no `background-snapshot` or refuses it.
    #[error("QEMU refuses a background snapshot: {refusal}{}", .host.as_ref().map(|h| format!("; {h}")).unwrap_or_default())]
    NoBackgroundSnapshot {
        /// QEMU's words.
        refusal: String,
        /// What this host lacks, as far as we can see.
        host: Option<UffdError>,
    },
    /// QEMU's process can't be seen.
    #[error(
        "the process behind the QMP socket can't be seen from here (it lives in another PID \
         namespace): run snapback where QEMU's process is visible"
    )]
    Unseen,
    /// The guest has writable disks.
    #[error(
        "the guest has writable disks, whose content would not be part of the snapshot: {}; \
         make them read-only or detach them, or pass --memory-only to save memory without them",
        .0.join(", ")
    )]
    WritableDisks(Vec<String>),
    /// There is not enough room for the image.
    #[error(
        "too little room for the image in `{folder}`: {free} MiB free, about {needed} MiB needed; \
         free some, choose another folder, or use --compress zstd"
    )]
    Room {
        /// The image's folder.
        folder: PathBuf,
        /// MiB that are free.
        free: u64,
        /// MiB that the image may need.
        needed: u64,
    },
    /// The image's folder can't be asked for its room.
    #[error("the image's folder `{folder}` can't be used: {source}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What the checks found out.
pub(super) struct Checked {
    pub machine: Machine,
    pub blocks: Vec<RamBlock>,
    /// Whether the guest is saved in the background. A paused guest on an old QEMU is
    /// not: its memory stands still anyway.
    pub background: bool,
    /// Whether a save that fails or is interrupted has to receive all memory none the
    /// less, because this QEMU lets go of the guest only then.
    pub must_drain: bool,
}

/// Runs all checks but QEMU's own on `background-snapshot`, which setting the
/// capability makes.
pub(super) async fn check(qmp: &Qmp, options: &SaveOptions) -> Result<Checked, SaveError> {
    let version = qmp.version();
    if (version.major, version.minor) < OLDEST_QEMU {
        return Err(CheckError::TooOld { found: version.to_string() }.into());
    }
    let paused_is_kept = (version.major, version.minor) >= KEEPS_PAUSED;

    let running = check_state(&qmp.status().await?)?;
    check_migration(qmp).await?;
    let disks = check_disks(qmp, options.memory_only).await?;
    let blocks = qmp.ram_blocks().await?;
    let pid = qmp.peer_pid().ok_or(CheckError::Unseen)?;
    let machine = vm::capture(pid, qmp).await?;
    let machine = Machine { running, uncaptured_disks: disks, ..machine };

    crate::image::check_target(&options.image, options.force)?;
    let ram = blocks.iter().map(|block| block.used_len).sum();
    check_room(&options.image, options.compression, ram, memory_in_use(pid))?;
    let background = running || paused_is_kept;
    let must_drain = background && (version.major, version.minor) < LETS_GO;
    Ok(Checked { machine, blocks, background, must_drain })
}

/// Whether the guest runs; an error in states that can't be saved.
fn check_state(state: &str) -> Result<bool, CheckError> {
    let hint = match state {
        "running" => return Ok(true),
        "paused" | "prelaunch" | "debug" | "io-error" | "watchdog" | "guest-panicked"
        | "shutdown" => return Ok(false),
        "postmigrate" => "it has been saved or migrated while paused; let it run (`cont`) first",
        "inmigrate" => "its own incoming migration has not ended; wait until it has",
        "suspended" => "wake it up first (`system_wakeup`)",
        _ => "it can be saved while it runs or is paused",
    };
    Err(CheckError::State { state: state.into(), hint })
}

async fn check_migration(qmp: &Qmp) -> Result<(), SaveError> {
    let info = qmp.migration_info().await?;
    match info.status.as_deref() {
        None | Some("none" | "completed" | "failed" | "cancelled") => {}
        Some(status) => return Err(CheckError::Migrating(status.into()).into()),
    }
    if !info.blocked_reasons.is_empty() {
        return Err(CheckError::Blocked(info.blocked_reasons).into());
    }
    Ok(())
}

/// The writable disks, which are refused unless only memory is wanted.
async fn check_disks(qmp: &Qmp, memory_only: bool) -> Result<Vec<String>, SaveError> {
    let describe = |disk: crate::qmp::BlockDevice| {
        let name = [Some(disk.device), disk.qdev, disk.node_name];
        let name = name.into_iter().flatten().find(|name| !name.is_empty());
        let file = disk.file.map(|file| format!(" ({file})")).unwrap_or_default();
        format!("{}{file}", name.unwrap_or_else(|| "unnamed".into()))
    };
    let devices = qmp.block_devices().await?;
    let disks: Vec<_> = devices.into_iter().filter(|disk| disk.writable).map(describe).collect();
    if disks.is_empty() || memory_only {
        Ok(disks)
    } else {
        Err(CheckError::WritableDisks(disks).into())
    }
}

/// An image holds at most the memory that the guest has ever touched, which is at most
/// what QEMU's process uses.
fn check_room(
    image: &Path,
    compression: Compression,
    ram_bytes: u64,
    used_bytes: u64,
) -> Result<(), CheckError> {
    let folder = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let stat = nix::sys::statvfs::statvfs(folder)
        .map_err(|errno| CheckError::Folder { folder: folder.to_owned(), source: errno.into() })?;
    let free = stat.blocks_available() * stat.fragment_size();
    let share = if compression == Compression::None { 1 } else { COMPRESSED_SHARE };
    let needed = ram_bytes.min(used_bytes) / share;
    if free < needed {
        let folder = folder.to_owned();
        return Err(CheckError::Room { folder, free: free >> 20, needed: needed >> 20 });
    }
    Ok(())
}

/// Bytes of memory that a process uses, in RAM, in huge pages and swapped out
/// (proc_pid_status(5)). Nothing where that can't be read: then the check that wanted
/// it has no opinion.
fn memory_in_use(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let counts = ["VmRSS", "VmSwap", "HugetlbPages"].contains(&name);
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok().filter(|_| counts)
    };
    status.lines().filter_map(kib).sum::<u64>() << 10
}

/// The error for QEMU's refusal of `background-snapshot`, with what the host says.
pub(super) fn refused(error: QmpError) -> SaveError {
    match error {
        QmpError::Command { desc, .. } => CheckError::NoBackgroundSnapshot {
            refusal: desc,
            host: uffd::write_protect_supported().err(),
        }
        .into(),
        other => other.into(),
    }
}
