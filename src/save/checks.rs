//! Whether a snapshot can be taken, asked while the guest runs and is not touched.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::agent;
use super::journal::Journal;
use super::obstacles::{self, Obstacle};
use super::overlays::overlay_folder;
use super::settings::Settings;
use super::{DiskChoice, SaveError, SaveOptions};
use crate::guest::{self, FoundDisk};
use crate::host::procfs::{memory_in_use, owner, sysctl};
use crate::host::uffd;
use crate::image::{Compression, Image};
use crate::machine::{DiskRole, Machine};
use crate::qmp::{Qmp, QmpError, RamBlock};

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

/// Room that an overlay needs at the least, in bytes: what the guest writes while its
/// memory is saved has to fit as well, but nobody knows how much that is.
const OVERLAY_ROOM: u64 = 16 << 20;

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
    /// A reverted guest still waits for memory.
    #[error(
        "the guest was reverted and its memory is not complete yet (status `{0}`): save it when it \
         is, or without --no-wait"
    )]
    Incomplete(String),
    /// A device or a setting forbids migration.
    #[error("QEMU can't save this guest: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// Something in the guest does not go together with a background snapshot.
    #[error("this guest can't be saved while it runs: {}", .0.iter().map(Obstacle::to_string).collect::<Vec<_>>().join("; "))]
    Obstacles(Vec<Obstacle>),
    /// QEMU has no `background-snapshot` or refuses it.
    #[error("QEMU refuses a background snapshot: {refusal}{}", .lack.as_ref().map(|l| format!("; {l}")).unwrap_or_default())]
    NoBackgroundSnapshot {
        /// QEMU's words.
        refusal: String,
        /// What QEMU lacks on this host, as far as we can see.
        lack: Option<String>,
    },
    /// QEMU's process can't be seen.
    #[error(
        "the process behind the QMP socket can't be seen from here (it lives in another PID \
         namespace): run snapback where QEMU's process is visible"
    )]
    Unseen,
    /// A writable disk can't be frozen.
    #[error(
        "disk {disk} can't be captured: {problem}; detach it, leave it out with --exclude-disk, or \
         save memory alone with --disks none"
    )]
    Disk {
        /// The disk.
        disk: String,
        /// Why not.
        problem: String,
    },
    /// A disk was to be left out that is not there.
    #[error("--exclude-disk {name}: no disk is called that; there are: {}", .disks.join(", "))]
    NoSuchDisk {
        /// The name that was given.
        name: String,
        /// The writable disks.
        disks: Vec<String>,
    },
    /// There is not enough room.
    #[error(
        "too little room for {what} in `{folder}`: {free} MiB free, about {needed} MiB needed; \
         free some, or choose another folder{hint}"
    )]
    Room {
        /// What needs it.
        what: &'static str,
        /// The folder.
        folder: PathBuf,
        /// MiB that are free.
        free: u64,
        /// MiB that may be needed.
        needed: u64,
        /// What else helps.
        hint: &'static str,
    },
    /// A folder can't be asked for its room.
    #[error("the folder `{folder}` can't be used: {source}")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// One thing that was looked at before a save.
#[derive(Debug)]
pub struct CheckItem {
    /// What: `qemu`, `state`, `migration`, `devices`, `memory`, `process`, `disks`,
    /// `revert`, `room`, `agent`, `parent` or `background-snapshot`.
    pub name: &'static str,
    /// What was found, or why a save would not work.
    pub outcome: Result<String, SaveError>,
    /// What was found is a warning: a save would work, but what is saved can't be used in
    /// every way.
    pub warning: bool,
}

/// What the checks found out.
pub(super) struct Checked {
    pub machine: Machine,
    pub pid: i32,
    pub blocks: Vec<RamBlock>,
    /// The image on top of which this one is saved.
    pub parent: Option<Arc<Image>>,
    /// All disks; the role says which are captured.
    pub disks: Vec<FoundDisk>,
    /// Why `revert` will refuse the image, if it will.
    pub irrevertible: Option<String>,
    /// Whether the guest is saved in the background. A paused guest on an old QEMU is
    /// not: its memory stands still anyway.
    pub background: bool,
    /// Whether a save that fails or is interrupted has to receive all memory none the
    /// less, because this QEMU lets go of the guest only then.
    pub must_drain: bool,
}

impl Checked {
    /// The disks to capture.
    pub fn captured(&self) -> impl Iterator<Item = &FoundDisk> {
        self.disks.iter().filter(|found| found.disk.role == DiskRole::Captured)
    }
}

/// Asks whether an instant save would work, without touching the guest: every check
/// that [`save`](super::save) makes, item by item. To ask QEMU itself, the migration
/// capability `background-snapshot` is set and put back. Without an image's name only
/// the current folder's room is looked at.
///
/// # Errors
/// Only when nothing can be asked: [`SaveError::Qmp`].
pub async fn survey(options: &SaveOptions) -> Result<Vec<CheckItem>, SaveError> {
    let qmp = Qmp::connect(&options.qmp, ANSWER_TIMEOUT).await?;
    let (mut items, checked) = look(&qmp, options).await;
    let background = checked.as_ref().is_none_or(|checked| checked.background);
    let says = match background {
        true => "QEMU can write-protect its memory with userfaultfd on this host",
        false => "not needed: the guest is paused",
    };
    items.push(CheckItem {
        name: "background-snapshot",
        outcome: try_settings(&qmp, background).await.map(|()| says.to_owned()),
        warning: false,
    });
    Ok(items)
}

/// Asks QEMU whether it takes the settings of a save, by setting them and putting them back.
async fn try_settings(qmp: &Qmp, background: bool) -> Result<(), SaveError> {
    let mut settings = Settings::ask(qmp, background).await?;
    let applied = settings.apply(qmp).await;
    let restored = settings.restore(qmp).await.map_err(SaveError::from);
    applied.and(restored)
}

/// Runs all checks but QEMU's own on `background-snapshot`, which setting the
/// capability makes.
pub(super) async fn check(qmp: &Qmp, options: &SaveOptions) -> Result<Checked, SaveError> {
    let (items, checked) = look(qmp, options).await;
    match items.into_iter().find_map(|item| item.outcome.err()) {
        Some(error) => Err(error),
        // There is a result whenever nothing has failed.
        None => checked.ok_or(SaveError::Check(CheckError::Unseen)),
    }
}

/// Looks at everything, in the order in which it is told. What was found is there when
/// all could be looked at, even if some of it stands in the way of a save.
async fn look(qmp: &Qmp, options: &SaveOptions) -> (Vec<CheckItem>, Option<Checked>) {
    let mut list = Checklist(Vec::new());
    let version = qmp.version();
    let number = (version.major, version.minor);
    list.note(
        "qemu",
        match number >= OLDEST_QEMU {
            true => Ok(((), format!("QEMU {version}"))),
            false => Err(CheckError::TooOld { found: version.to_string() }.into()),
        },
    );
    let running = list.note("state", check_state(qmp).await);
    list.note("migration", check_migration(qmp).await);
    list.note("devices", obstacles::check_devices(qmp).await.map(|says| ((), says)));
    let background = running != Some(false) || number >= KEEPS_PAUSED;
    let blocks = list.note("memory", obstacles::check_memory(qmp, background).await);
    let process = list.note("process", record(qmp).await);
    let disks = match &process {
        Some((pid, machine)) => list.note("disks", check_disks(*pid, qmp, machine, options).await),
        None => None,
    };
    let (Some(running), Some(blocks), Some((pid, machine)), Some(disks)) =
        (running, blocks, process, disks)
    else {
        return (list.0, None);
    };
    let irrevertible = check_revert(&machine, &disks);
    list.0.push(CheckItem {
        name: "revert",
        warning: irrevertible.is_some(),
        outcome: Ok(irrevertible.clone().unwrap_or_else(|| "nothing will keep it".to_owned())),
    });
    list.note("room", check_room(options, &blocks, pid, &disks).map(|says| ((), says)));
    list.note("agent", check_agent(options).await);
    let Some(parent) = list.note("parent", open_parent(options)) else { return (list.0, None) };
    let uncaptured = disks.iter().filter(|found| found.writable());
    let uncaptured_disks = uncaptured.map(|found| found.disk.describe()).collect();
    let machine = Machine { running, uncaptured_disks, ..machine };
    let must_drain = background && number < LETS_GO;
    let checked =
        Checked { machine, pid, blocks, parent, disks, irrevertible, background, must_drain };
    (list.0, Some(checked))
}

/// Opens the image on top of which to save, and all that it refers to.
fn open_parent(options: &SaveOptions) -> Result<(Option<Arc<Image>>, String), SaveError> {
    let Some(path) = &options.parent else { return Ok((None, "none was asked for".into())) };
    let parent = Image::open(path)?;
    crate::image::check_parent(&parent, &options.image)?;
    Ok((Some(parent), path.display().to_string()))
}

/// Asks the guest agent that is to freeze file systems whether it could.
async fn check_agent(options: &SaveOptions) -> Result<((), String), SaveError> {
    match &options.quiesce {
        Some(socket) => Ok(((), agent::check(socket, &agent::PATIENCE).await?)),
        None => Ok(((), "none was asked for".into())),
    }
}

/// What has been looked at.
struct Checklist(Vec<CheckItem>);

impl Checklist {
    /// Notes what was found, in words; gives back the value, if there is one.
    fn note<T>(&mut self, name: &'static str, found: Result<(T, String), SaveError>) -> Option<T> {
        let (value, outcome) = match found {
            Ok((value, says)) => (Some(value), Ok(says)),
            Err(error) => (None, Err(error)),
        };
        self.0.push(CheckItem { name, outcome, warning: false });
        value
    }
}

/// Whether the guest runs; an error in states that can't be saved.
async fn check_state(qmp: &Qmp) -> Result<(bool, String), SaveError> {
    let state = qmp.status().await?;
    let hint = match state.as_str() {
        "running" => return Ok((true, "the guest runs".into())),
        "paused" | "prelaunch" | "debug" | "io-error" | "watchdog" | "guest-panicked"
        | "shutdown" => return Ok((false, format!("the guest stands still (`{state}`)"))),
        "postmigrate" => "it has been saved or migrated while paused; let it run (`cont`) first",
        "inmigrate" => "its own incoming migration has not ended; wait until it has",
        "suspended" => "wake it up first (`system_wakeup`)",
        _ => "it can be saved while it runs or is paused",
    };
    Err(CheckError::State { state, hint }.into())
}

async fn check_migration(qmp: &Qmp) -> Result<((), String), SaveError> {
    let info = qmp.migration_info().await?;
    match info.status.as_deref() {
        None | Some("none" | "completed" | "failed" | "cancelled") => {}
        Some(status) if status.starts_with("postcopy") => {
            return Err(CheckError::Incomplete(status.into()).into());
        }
        Some(status) => return Err(CheckError::Migrating(status.into()).into()),
    }
    if !info.blocked_reasons.is_empty() {
        return Err(CheckError::Blocked(info.blocked_reasons).into());
    }
    Ok(((), "none under way, nothing forbids one".into()))
}

/// Waits until the memory of a reverted guest is complete: until its incoming postcopy
/// migration has ended, however that goes.
pub(super) async fn wait_complete(qmp: &Qmp, mut on_wait: impl FnMut()) -> Result<(), QmpError> {
    const ASK_EVERY: Duration = Duration::from_millis(20);
    let mut told = false;
    loop {
        let status = qmp.migration_info().await?.status.unwrap_or_default();
        // A paused one waits for another source, and nobody may ever come.
        if !status.starts_with("postcopy") || status.starts_with("postcopy-paused") {
            return Ok(());
        }
        if !std::mem::replace(&mut told, true) {
            on_wait();
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// QEMU's process and the record of its machine.
async fn record(qmp: &Qmp) -> Result<((i32, Machine), String), SaveError> {
    let pid = qmp.peer_pid().ok_or(CheckError::Unseen)?;
    let machine = guest::capture(pid, qmp).await?;
    let says = format!("process {pid}, {}", machine.binary);
    Ok(((pid, machine), says))
}

/// The disks, each with its role.
async fn check_disks(
    pid: i32,
    qmp: &Qmp,
    machine: &Machine,
    options: &SaveOptions,
) -> Result<(Vec<FoundDisk>, String), SaveError> {
    let mut disks = guest::disks(pid, qmp, machine).await?;
    for name in &options.exclude_disks {
        if !disks.iter().any(|found| found.is_called(name)) {
            let disks = disks.iter().filter(|found| found.writable());
            let disks = disks.map(|found| found.disk.describe()).collect();
            return Err(CheckError::NoSuchDisk { name: name.clone(), disks }.into());
        }
    }
    for found in disks.iter_mut().filter(|found| found.writable()) {
        let excluded = options.exclude_disks.iter().any(|name| found.is_called(name));
        if options.disks == DiskChoice::None || excluded {
            continue;
        }
        if let Some(problem) = found.problem.take() {
            return Err(CheckError::Disk { disk: found.disk.describe(), problem }.into());
        }
        found.disk.role = DiskRole::Captured;
    }
    let count = |role| disks.iter().filter(|found| found.disk.role == role).count();
    let says = format!(
        "{} to capture, {} left out, {} read-only",
        count(DiskRole::Captured),
        count(DiskRole::Excluded),
        count(DiskRole::ReadOnly)
    );
    Ok((disks, says))
}

/// Why a revert won't find its disks where it looks for them.
fn check_revert(machine: &Machine, disks: &[FoundDisk]) -> Option<String> {
    let captured = disks.iter().filter(|found| found.disk.role == DiskRole::Captured);
    let problems = captured.filter_map(|found| guest::check_given(machine, &found.disk).err());
    let problems: Vec<String> = problems.map(|problem| problem.to_string()).collect();
    (!problems.is_empty()).then(|| problems.join("; "))
}

/// Whether image and overlays can be written where they are to be, and fit. An image
/// holds at most the memory that the guest has ever touched, which is at most what
/// QEMU's process uses.
fn check_room(
    options: &SaveOptions,
    blocks: &[RamBlock],
    pid: i32,
    disks: &[FoundDisk],
) -> Result<String, SaveError> {
    let image = &options.image;
    if !image.as_os_str().is_empty() {
        Journal::check(image)?;
        crate::image::check_target(image, options.force)?;
    }
    let share = if options.compression == Compression::None { 1 } else { COMPRESSED_SHARE };
    let ram: u64 = blocks.iter().map(|block| block.used_len).sum();
    let needed = match options.parent {
        // How much differs from it, nobody can tell.
        Some(_) => 0,
        None => ram.min(memory_in_use(pid)) / share,
    };
    let folder = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let hint = ", or use --compress zstd";
    let free = check_free("the image", folder, needed, if share == 1 { hint } else { "" })?;
    for found in disks.iter().filter(|found| found.disk.role == DiskRole::Captured) {
        let Some(below) = found.disk.chain.first() else { continue };
        let folder = overlay_folder(options.overlay_dir.as_deref(), Path::new(&below.path), image);
        check_free("a disk's overlay", &folder, OVERLAY_ROOM, " with --overlay-dir")?;
    }
    Ok(format!("{} MiB free for the image, about {} needed at most", free >> 20, needed >> 20))
}

/// Bytes that are free in a folder, if they are enough.
fn check_free(
    what: &'static str,
    folder: &Path,
    needed: u64,
    hint: &'static str,
) -> Result<u64, CheckError> {
    let stat = nix::sys::statvfs::statvfs(folder)
        .map_err(|errno| CheckError::Folder { folder: folder.to_owned(), source: errno.into() })?;
    let free = stat.blocks_available() * stat.fragment_size();
    if free < needed {
        let (folder, free, needed) = (folder.to_owned(), free >> 20, needed >> 20);
        return Err(CheckError::Room { what, folder, free, needed, hint });
    }
    Ok(free)
}

/// The error for QEMU's refusal of `background-snapshot`, with what the host says.
pub(super) fn refused(qmp: &Qmp, error: QmpError) -> SaveError {
    let QmpError::Command { desc: refusal, .. } = error else { return error.into() };
    let lack = match uffd::write_protect_supported() {
        Err(lack) => Some(lack.to_string()),
        // It may work for us and not for QEMU.
        Ok(()) => qmp.peer_pid().and_then(lacks_rights),
    };
    CheckError::NoBackgroundSnapshot { refusal, lack }.into()
}

/// Why a process may have no userfaultfd that catches the kernel's accesses as well
/// (userfaultfd(2)), where its user is the reason.
fn lacks_rights(pid: i32) -> Option<String> {
    const SWITCH: &str = "vm.unprivileged_userfaultfd";
    let forbidden = sysctl(SWITCH).is_some_and(|switch| switch == "0");
    let (user, _) = owner(pid)?;
    (user != 0 && forbidden).then(|| {
        format!(
            "QEMU runs as user {user}, who has no right to userfaultfd: `sysctl {SWITCH}=1` gives it"
        )
    })
}
