//! The checks: whether a snapshot can be taken, found out without touching the guest.

pub(super) mod error;

mod disks;
mod domain;
mod hotplug;
mod obstacles;
mod resettable;
mod room;

use std::sync::Arc;
use std::time::Duration;

use self::domain::Described;
use self::error::{CheckError, OLDEST_QEMU};
use super::access::Access;
use super::checked::Checked;
use super::error::SaveError;
use super::options::{DiskChoice, SaveOptions};
use super::quiesce;
use super::settings::Settings;
use crate::guest;
use crate::image::Image;
use crate::libvirt::{Domain, without_our_arguments};
use crate::machine::Machine;
use crate::qmp::{Qmp, QmpError};
use crate::runs;

/// How often a machine is looked at that a revert would refuse.
const LOOKS: u32 = 10;

/// The time between two of these looks.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// From this version on `background-snapshot` leaves a paused guest paused; before,
/// it starts it (seen on 7.2).
const KEEPS_PAUSED: (u32, u32) = (9, 0);

/// From this version on a background snapshot that comes to nothing takes its write
/// protection off memory. Before, the guest hangs at its next write to a page that has
/// not been sent (fixed in QEMU by "migration: stop tracking ram writes when cancelling
/// background migration"; seen on 7.2.22).
const LETS_GO: (u32, u32) = (8, 1);

/// One thing that was looked at before a save.
#[derive(Debug)]
#[non_exhaustive]
pub struct CheckItem {
    /// What: `qemu`, `state`, `migration`, `devices`, `memory`, `process`, `libvirt`, `disks`,
    /// `hotplug`, `revert`, `room`, `agent`, `parent` or `background-snapshot`.
    pub name: &'static str,
    /// What was found, or why a save would not work.
    pub outcome: Result<String, SaveError>,
    /// Whether what was found is a warning: a save would work, but `revert` will refuse its
    /// image.
    pub warning: bool,
}

/// Asks whether an instant save would work, without touching the guest: every check
/// that [`save`](super::save) makes, item by item. To ask QEMU itself, the migration
/// capability `background-snapshot` is set and put back. If [`SaveOptions::image`] is
/// empty, only the room in the current directory is looked at.
///
/// # Errors
/// [`SaveError::Qmp`] when nothing can be asked. What stands in the way of a save is told by
/// the items.
pub async fn check(options: &SaveOptions) -> Result<Vec<CheckItem>, SaveError> {
    let access = Access::open(&options.guest, Duration::ZERO).await?;
    let (mut items, checked) = look(&access, options).await;
    let background = checked.as_ref().is_none_or(|checked| checked.background);
    let says = match background {
        true => "QEMU can write-protect its memory with userfaultfd on this host",
        false => "not needed: the guest is paused",
    };
    let outcome = match checked.is_some_and(|checked| runs::is_tracked(checked.pid)) {
        // QEMU would refuse it now.
        true => Ok("its writes are tracked for a reset: a save ends that".to_owned()),
        false => try_settings(&access.qmp, background).await.map(|()| says.to_owned()),
    };
    items.push(CheckItem { name: "background-snapshot", outcome, warning: false });
    Ok(items)
}

/// Asks QEMU whether it takes the settings of a save, by setting them and putting them back.
async fn try_settings(qmp: &Qmp, background: bool) -> Result<(), SaveError> {
    let mut settings = Settings::ask(qmp, background).await?;
    let applied = settings.apply(qmp).await;
    let restored = settings.restore(qmp).await.map_err(SaveError::from);
    applied.and(restored)
}

/// Runs all checks except QEMU's own, which it makes when `background-snapshot` is set.
pub(super) async fn ensure(access: &Access, options: &SaveOptions) -> Result<Checked, SaveError> {
    let mut left = LOOKS;
    loop {
        let (items, checked) = look(access, options).await;
        left -= 1;
        match items.into_iter().find_map(|item| item.outcome.err()) {
            // There is a result whenever nothing has failed.
            None => return checked.ok_or(SaveError::Check(CheckError::Unseen)),
            // A device that is being removed leaves the machine a moment before its disk does:
            // in between, the disk has no device in the record.
            Some(SaveError::Check(CheckError::Irrevertible { .. })) if left > 0 => {}
            Some(error) => return Err(error),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Looks at everything, in the order in which it is listed. What was found is returned once
/// all of it could be looked at, even if some of it stands in the way of a save.
async fn look(access: &Access, options: &SaveOptions) -> (Vec<CheckItem>, Option<Checked>) {
    let Access { qmp, domain } = access;
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
    let described = match domain {
        Some(domain) => list.note("libvirt", Described::read(domain).await),
        None => Some(Described::default()),
    };
    let disks = match &process {
        Some((pid, machine)) => {
            let known = described.as_ref().filter(|_| domain.is_some());
            let known = known.map(|described| &described.disks[..]);
            list.note("disks", disks::check_disks(*pid, qmp, machine, known, options).await)
        }
        None => None,
    };
    let (Some(running), Some(blocks), Some((pid, mut machine)), Some(mut disks), Some(described)) =
        (running, blocks, process, disks, described)
    else {
        return (list.0, None);
    };
    let plugged = match domain {
        // What was plugged in is in the domain's XML.
        Some(_) => hotplug::check_domain(qmp).await,
        None => hotplug::check_hotplug(qmp, &mut machine, &mut disks, options).await,
    };
    let Some(devices) = list.note("hotplug", plugged) else { return (list.0, None) };
    let revert = match domain {
        Some(_) => Ok(None),
        None => disks::check_revert(&machine, &disks, options),
    };
    let irrevertible = list.note(
        "revert",
        revert.map(|why| {
            let says = why.clone().unwrap_or_else(|| "nothing will keep it".to_owned());
            (why, says)
        }),
    );
    let irrevertible = irrevertible.flatten();
    list.warn_if(irrevertible.is_some());
    list.note("room", room::check_room(options, &blocks, pid, &disks).map(|says| ((), says)));
    list.note("agent", check_agent(options, domain.as_ref()).await);
    if options.resettable {
        let quiesced = options.quiesce.is_some();
        let found = resettable::Found { pid, blocks: &blocks, disks: &disks, background, quiesced };
        let outcome = match domain {
            Some(_) => Err(CheckError::NotResettable("libvirt would not know of it".into()).into()),
            None if matches!(options.disks, DiskChoice::Copy | DiskChoice::Reflink) => {
                let why = "the overlays that a reset discards are committed once disks are copied";
                Err(CheckError::NotResettable(why.into()).into())
            }
            None => found.check(),
        };
        list.note("resettable", outcome.map(|says| ((), says)));
    }
    let Some(parent) = list.note("parent", open_parent(options)) else { return (list.0, None) };
    let uncaptured = disks.iter().filter(|found| found.writable());
    let uncaptured_disks = uncaptured.map(|found| found.disk.describe()).collect();
    let Described { live: libvirt_xml, persistent: libvirt_inactive_xml, disks: domain_disks } =
        described;
    if let Some(xml) = &libvirt_xml {
        machine.argv = without_our_arguments(machine.argv, xml);
    }
    let machine =
        Machine { running, uncaptured_disks, libvirt_xml, libvirt_inactive_xml, ..machine };
    let must_drain = background && number < LETS_GO;
    let checked = Checked {
        machine,
        pid,
        blocks,
        parent,
        disks,
        domain_disks,
        devices,
        irrevertible,
        background,
        must_drain,
    };
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
async fn check_agent(
    options: &SaveOptions,
    domain: Option<&Domain>,
) -> Result<((), String), SaveError> {
    match &options.quiesce {
        Some(quiesce) => Ok(((), quiesce::check(quiesce, domain).await?)),
        None => Ok(((), "none was asked for".into())),
    }
}

/// The items that have been looked at.
struct Checklist(Vec<CheckItem>);

impl Checklist {
    /// Adds an item. Returns the value that was found, if there is one.
    fn note<T>(&mut self, name: &'static str, found: Result<(T, String), SaveError>) -> Option<T> {
        let (value, outcome) = match found {
            Ok((value, says)) => (Some(value), Ok(says)),
            Err(error) => (None, Err(error)),
        };
        self.0.push(CheckItem { name, outcome, warning: false });
        value
    }

    /// Makes the last item a warning.
    fn warn_if(&mut self, warning: bool) {
        if let Some(item) = self.0.last_mut() {
            item.warning = warning;
        }
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

/// That no migration is under way, and that nothing forbids one.
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
        // `postcopy-paused` waits for a new source, which may never come.
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
