//! Taking a snapshot of a running guest: checks first, then a pause of milliseconds in
//! which its disks are frozen, then its memory is written out behind its back.

mod agent;
mod checks;
mod collapse;
mod ending;
mod error;
mod event;
mod journal;
mod left_over;
mod moment;
mod obstacles;
mod overlays;
mod prefault;
mod receive;
mod recover;
mod release;
mod settings;
mod steps;
mod undo;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};

use self::checks::{Checked, check};
use self::ending::wait_end;
use self::moment::{Moment, PauseClock, millis};
use self::receive::{Received, Receiving};
use self::settings::Settings;
use self::steps::step;
use self::undo::Undo;
use crate::cancel::Cancellation;
use crate::guest;
use crate::image::{Compression, ImageError, Saved};
use crate::machine::Disk;
use crate::qmp::{Event, Events, Qmp, QmpError};
use crate::wire::WireError;

pub use agent::AgentError;
pub use checks::{CheckError, CheckItem, survey};
pub use error::SaveError;
pub use event::SaveEvent;
pub use journal::JournalError;
pub use left_over::LeftOver;
pub use moment::PauseParts;
pub use obstacles::Obstacle;
pub use overlays::OverlayError;
pub use recover::{Recovered, recover};

/// The name under which QEMU is given its end of the migration stream.
const OUTGOING: &str = "snapback-outgoing";

/// Room that is asked for in the socket between QEMU and us, in bytes: some
/// milliseconds' worth of pages, so that QEMU never waits for a thread of ours that
/// does not run at this moment.
const SOCKET_BYTES: usize = 1 << 20;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How long a guest that we stopped may wait for QEMU's walk over its memory: three
/// milliseconds a GiB are usual.
const HOLD_LIMIT: Duration = Duration::from_secs(30);

/// Which guest to save, where to, and how.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// The guest's QMP socket.
    pub qmp: PathBuf,
    /// The image to write.
    pub image: PathBuf,
    /// How memory is stored.
    pub compression: Compression,
    /// What becomes of writable disks.
    pub disks: DiskChoice,
    /// Where overlays are made; without, each beside its disk's file.
    pub overlay_dir: Option<PathBuf>,
    /// Writable disks that are not captured: by the name of a node, drive or device.
    pub exclude_disks: Vec<String>,
    /// The socket of qemu-guest-agent, to freeze the guest's file systems around the
    /// moment.
    pub quiesce: Option<PathBuf>,
    /// Fail rather than wait when the guest was reverted and its memory is not complete.
    pub no_wait: bool,
    /// Replace an image of that name.
    pub force: bool,
    /// The image on top of which to save: what the guest's memory has in common with it
    /// is not stored again.
    pub parent: Option<PathBuf>,
    /// The most bytes a second that are written to the image. Where QEMU sends more, the
    /// guest may have to wait, which [`SaveEvent::Saved`] tells.
    pub bandwidth: Option<u64>,
}

impl SaveOptions {
    /// Saves the guest behind a QMP socket with all its disks, and everything else as
    /// the program does by default.
    pub fn new(qmp: impl Into<PathBuf>, image: impl Into<PathBuf>) -> SaveOptions {
        SaveOptions {
            qmp: qmp.into(),
            image: image.into(),
            compression: Compression::Zstd(1),
            disks: DiskChoice::Overlay,
            overlay_dir: None,
            exclude_disks: Vec::new(),
            quiesce: None,
            no_wait: false,
            force: false,
            parent: None,
            bandwidth: None,
        }
    }
}

/// What becomes of a guest's writable disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskChoice {
    /// They are frozen and captured; the guest goes on in overlays over them.
    Overlay,
    /// They are left as they are, and are no part of the snapshot.
    None,
}

/// Saves a guest while it runs, and returns once the image is whole.
///
/// A guest with disks to capture is stopped; its disks are switched to overlays, QEMU
/// begins a background snapshot, and the guest goes on, all within one pause. What can
/// be done ahead of the pause is. Any other guest is never stopped by us.
///
/// An interrupt ends the save; the guest runs on and no image is left. QEMU before 8.1
/// has to send all memory before it lets go of the guest (see [`SaveEvent::Draining`]);
/// who does not wait for that, by a second interrupt, may leave the guest hanging.
///
/// # Errors
/// See [`SaveError`]; [`SaveError::StillFrozen`] leaves a whole image. Whatever fails, the guest runs on as it ran before, its disks and
/// migration settings are what they were, and nothing is left behind; after a SIGKILL,
/// [`recover`] does all that.
pub async fn save(
    options: &SaveOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(SaveEvent),
) -> Result<Saved, SaveError> {
    let connect_and_check = async {
        let qmp = Qmp::connect(&options.qmp, checks::ANSWER_TIMEOUT).await?;
        if !options.no_wait {
            checks::wait_complete(&qmp, || on_event(SaveEvent::Waiting)).await?;
        }
        let checked = check(&qmp, options).await?;
        Ok::<_, SaveError>((qmp, checked))
    };
    let (qmp, checked) = tokio::select! {
        ready = connect_and_check => ready?,
        () = cancel.requested() => return Err(SaveError::Interrupted),
    };
    let settings = Settings::ask(&qmp, checked.background).await?;
    let mut undo = Undo::begin(settings, options, &checked)?;
    step("journal");
    let outcome = async {
        undo.apply_settings(&qmp).await?;
        step("settings");
        on_event(SaveEvent::Checked {
            qemu: checked.machine.qemu.to_string(),
            ram_bytes: checked.blocks.iter().map(|block| block.used_len).sum(),
            captured_disks: checked.captured().map(|found| found.disk.describe()).collect(),
            uncaptured_disks: checked.machine.uncaptured_disks.clone(),
        });
        if let Some(says) = checked.irrevertible.clone() {
            on_event(SaveEvent::Warning { says });
        }
        make_ready(&qmp, &checked, &undo, &cancel, &mut on_event).await?;
        let (received, moment) =
            take(&qmp, options, &checked, &mut undo, &cancel, &mut on_event).await?;
        undo.restore_settings(&qmp).await?;
        step("restored");
        commit(received, moment, &checked, &undo, &cancel).await
    };
    match outcome.await {
        Ok((saved, stalled)) => {
            step("named");
            let nothing_left = undo.nothing_left(&mut on_event);
            on_event(SaveEvent::Saved {
                bytes: saved.data_pages * crate::page::PAGE_SIZE as u64,
                pages: saved.data_pages,
                zero_pages: saved.zero_pages,
                repeated_pages: saved.repeated_pages,
                parent_pages: saved.parent_pages,
                image_bytes: saved.image_bytes,
                stalled_ms: millis(stalled),
            });
            nothing_left.map(|()| saved)
        }
        // QEMU takes no other settings while a migration is under way, nor commits.
        Err(error @ SaveError::InterruptedTwice) => Err(error),
        Err(error) => Err(undo.all(&qmp, error, &mut on_event).await),
    }
}

/// Does ahead of the pause what can be done: makes the overlays, touches memory that was
/// never used and puts small pages together, and flushes disks.
async fn make_ready(
    qmp: &Qmp,
    checked: &Checked,
    undo: &Undo,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(SaveEvent),
) -> Result<(), SaveError> {
    overlays::prepare(qmp, checked, undo.overlays()).await?;
    let overlays: Vec<String> =
        undo.overlays().iter().map(|overlay| overlay.path.clone()).collect();

    let touch = {
        let (pid, blocks, cancel) = (checked.pid, checked.blocks.clone(), cancel.clone());
        let files: Vec<String> =
            checked.captured().map(|found| found.disk.chain[0].path.clone()).collect();
        let background = checked.background;
        // Where we don't stop the guest, QEMU touches its memory before it does.
        let touched = background && !overlays.is_empty();
        tokio::task::spawn_blocking(move || {
            if touched {
                prefault::prefault(pid, &blocks, &cancel);
            }
            if background {
                collapse::collapse_memory(pid, &blocks, &cancel);
            }
            // Stopping the guest flushes its disks: it shall find little left to do.
            for file in files {
                if let Err(error) = guest::write_out(Path::new(&file)) {
                    tracing::debug!("flushing {file} ahead failed: {error}");
                }
            }
        })
    };
    tokio::select! {
        // A help only: whatever has become of it, the save goes on.
        _ = touch => {}
        () = cancel.requested() => return Err(SaveError::Interrupted),
    }
    if !overlays.is_empty() {
        on_event(SaveEvent::Ready { overlays });
    }
    Ok(())
}

/// Takes the snapshot and receives all of it. If that fails, the guest goes on, the
/// migration has been ended and nothing of the image is left.
async fn take(
    qmp: &Qmp,
    options: &SaveOptions,
    checked: &Checked,
    undo: &mut Undo,
    cancel: &Cancellation,
    on_event: &mut impl FnMut(SaveEvent),
) -> Result<(Received, Moment), SaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
    widen(&theirs);
    qmp.getfd(OUTGOING, theirs.as_fd()).await?;
    // Only QEMU may hold the other end: its closing tells us that the stream is over.
    drop(theirs);
    let mut receiving = Receiving::start(ours, options, checked)?;
    let mut events = qmp.events();
    let frozen = undo.freeze(options, cancel, on_event).await;
    let mut clock = PauseClock::new(checked.machine.running);
    let outcome = async {
        frozen?;
        step("ready");
        // Not to be interrupted: what has been done to the guest must be known.
        begin(qmp, checked, undo, &mut clock).await?;
        tokio::select! {
            outcome = follow(qmp, &mut events, &mut clock, undo, &mut receiving, on_event) => outcome,
            () = cancel.requested() => Err(SaveError::Interrupted),
        }
    };
    let error = match outcome.await {
        Err(error) => error,
        taken => return taken,
    };
    // The guest comes first.
    if !clock.held() || qmp.cont().await.is_ok() {
        undo.let_go();
    }
    // Both at once: a guest that is to answer may need its memory received, and one whose
    // agent has died its memory let go of.
    let mut thawed = false;
    let mut hear = |_| thawed = true;
    let thaw = async {
        tokio::select! {
            () = undo.thaw(&mut hear) => {}
            () = cancel.requested_times(2) => {}
        }
    };
    let end = ending::end(qmp, error, checked, receiving, cancel, on_event);
    let ((), error) = tokio::join!(thaw, end);
    if thawed {
        on_event(SaveEvent::Thawed);
    }
    Err(error)
}

/// Makes room in a socket, as much as we may: more than the system's limit only as root
/// (socket(7)). With less, a save works all the same.
fn widen(socket: &UnixStream) {
    let _ = setsockopt(socket, SndBuf, &SOCKET_BYTES);
    let _ = setsockopt(socket, SndBufForce, &SOCKET_BYTES);
}

/// Begins the snapshot. A guest with disks to capture stands still when this returns,
/// its disks switched to their overlays, and is to be let go with the first page.
async fn begin(
    qmp: &Qmp,
    checked: &Checked,
    undo: &mut Undo,
    clock: &mut PauseClock,
) -> Result<(), SaveError> {
    unchanged(qmp, checked).await?;
    if !undo.overlays().is_empty() {
        if clock.running() {
            undo.hold()?;
            step("held");
            // Writing may have taken a while.
            unchanged(qmp, checked).await?;
            clock.hold();
            qmp.stop().await?;
            clock.step();
            step("stopped");
        }
        overlays::switch(qmp, undo.overlays()).await?;
        clock.step();
        step("switched");
    }
    qmp.migrate(&format!("fd:{OUTGOING}")).await?;
    step("migrating");
    Ok(())
}

/// Whether the guest still runs, or stands still, as it did when it was looked at: what is
/// done now depends on it, and a guest that somebody else has stopped is not ours to let go.
async fn unchanged(qmp: &Qmp, checked: &Checked) -> Result<(), SaveError> {
    let state = qmp.status().await?;
    match (state == "running") == checked.machine.running {
        true => Ok(()),
        false => Err(SaveError::Meanwhile { state }),
    }
}

/// Follows a migration that has begun to its end.
async fn follow(
    qmp: &Qmp,
    events: &mut Events,
    clock: &mut PauseClock,
    undo: &mut Undo,
    receiving: &mut Receiving,
    on_event: &mut impl FnMut(SaveEvent),
) -> Result<(Received, Moment), SaveError> {
    let Receiving { first_page, done, counters, .. } = receiving;
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let limit = tokio::time::Instant::now() + HOLD_LIMIT;
    let received = loop {
        tokio::select! {
            // What lets the guest go comes before all else.
            biased;
            first = &mut *first_page, if !first_page.is_terminated() => if first.is_ok() {
                clock.pass();
                step("first page");
                release(qmp, clock).await?;
                step("released");
            },
            event = events.next() => hear(clock, event)?,
            received = &mut *done => break received,
            () = tokio::time::sleep_until(limit), if clock.held() => {
                return Err(SaveError::Held(HOLD_LIMIT));
            }
            _ = tick.tick(), if clock.moment().is_some() => on_event(counters.progress()),
        }
        if clock.tell(on_event) {
            undo.guest_goes_on(on_event).await;
            step("moment");
        }
    };
    let died = || SaveError::Thread(std::io::Error::other("the receiving thread died"));
    match received.unwrap_or_else(|_| Err(died())) {
        Ok(received) => {
            // A tiny machine's stream may end before we have looked for its first page.
            clock.pass();
            release(qmp, clock).await?;
            wait_end(qmp).await?;
            step("received");
            // A small guest may be there before its events; QEMU's answer comes after.
            while let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next()).await
                && hear(clock, event).is_ok()
            {}
            let told = clock.moment().is_some();
            let moment = clock.settle(on_event);
            if !told {
                undo.guest_goes_on(on_event).await;
            }
            Ok((received, moment))
        }
        // QEMU's own reason, where it has one, says more than the end of its stream.
        Err(error @ SaveError::Wire(WireError::Ended { .. })) => {
            wait_end(qmp).await?;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Takes note of an event. That some were lost costs only what they had to say of the
/// moment: its times.
fn hear(clock: &mut PauseClock, event: Result<Event, QmpError>) -> Result<(), QmpError> {
    match event {
        Ok(event) => clock.hear(&event),
        Err(QmpError::EventsLost(lost)) => tracing::debug!("{lost} events of QEMU were lost"),
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Lets a guest go that we hold: its memory is write-protected. QEMU before 9.0 has let
/// it go by itself; then this changes nothing.
async fn release(qmp: &Qmp, clock: &mut PauseClock) -> Result<(), SaveError> {
    if clock.held() {
        clock.step();
        qmp.cont().await?;
        clock.released();
    }
    Ok(())
}

/// Makes the image whole, which takes as long as the disk or the bandwidth asks for, and
/// gives it its name, with the disks as they were at the moment. An interrupt ends it.
async fn commit(
    received: Received,
    moment: Moment,
    checked: &Checked,
    undo: &Undo,
    cancel: &Cancellation,
) -> Result<(Saved, Duration), SaveError> {
    let (stalled, writing) = (received.stalled(), received.cancellation());
    let mut overlays = undo.overlays().iter();
    let disks = checked.disks.iter().map(|found| {
        let captured = found.disk.role == crate::machine::DiskRole::Captured;
        let overlay = if captured { overlays.next().map(|o| o.path.clone()) } else { None };
        Disk { overlay, ..found.disk.clone() }
    });
    let mut machine = checked.machine.clone();
    machine.disks = disks.collect();
    let work = move || {
        for disk in &mut machine.disks {
            guest::stamp_files(disk)?;
        }
        received.commit(machine, moment)
    };
    let mut work = tokio::task::spawn_blocking(work);
    let done = tokio::select! {
        done = &mut work => done,
        () = cancel.requested() => {
            writing.request();
            work.await
        }
    };
    match done.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic())) {
        Err(SaveError::Image(ImageError::Interrupted(_))) => Err(SaveError::Interrupted),
        saved => Ok((saved?, stalled)),
    }
}
