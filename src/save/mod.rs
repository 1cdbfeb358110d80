//! Taking a snapshot of a running guest: checks first, then a pause of milliseconds,
//! then its memory is written out behind its back.

mod checks;
mod receive;
mod settings;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};
use serde::Serialize;

use self::checks::{Checked, check};
use self::receive::{Received, Receiving};
use self::settings::Settings;
use crate::image::{Compression, ImageError, Saved};
use crate::interrupt::Interrupts;
use crate::qmp::{Event, Events, Qmp, QmpError};
use crate::vm::VmError;
use crate::wire::WireError;

pub use checks::CheckError;

/// The name under which QEMU is given its end of the migration stream.
const OUTGOING: &str = "snapback-outgoing";

/// Room that is asked for in the socket between QEMU and us, in bytes: some
/// milliseconds' worth of pages, so that QEMU never waits for a thread of ours that
/// does not run at this moment.
const SOCKET_BYTES: usize = 1 << 20;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How long QEMU may take to end a migration that it has been told to end, or whose
/// stream it has closed.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// Which guest to save, where to, and how.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// The guest's QMP socket.
    pub qmp: PathBuf,
    /// The image to write.
    pub image: PathBuf,
    /// How memory is stored.
    pub compression: Compression,
    /// Save memory even though the guest has writable disks, whose content is then
    /// not part of the snapshot.
    pub memory_only: bool,
    /// Replace an image of that name.
    pub force: bool,
}

/// What happens during a save, in this order but for `Draining`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum SaveEvent {
    /// The snapshot can be taken; the guest has not been touched.
    Checked {
        /// QEMU's version.
        qemu: String,
        /// The guest's RAM in bytes, all blocks together.
        ram_bytes: u64,
        /// Writable disks that are left out.
        uncaptured_disks: Vec<String>,
    },
    /// The snapshot's moment has passed: nothing that the guest does from now on is in
    /// it, although its memory is still being written.
    Moment {
        /// How long the guest stood still, in milliseconds; none for a guest that was
        /// paused all the time.
        pause_ms: Option<f64>,
        /// The moment by the host's clock, in microseconds since 1970.
        unix_us: u64,
    },
    /// The save has failed or was interrupted, but QEMU lets go of the guest only once
    /// it has sent all memory: that is received and thrown away. QEMU before 8.1.
    Draining,
    /// How far memory has been written.
    Progress {
        /// Pages of 4096 bytes received.
        pages: u64,
        /// Pages of the machine.
        total: u64,
        /// Bytes written to the image.
        image_bytes: u64,
    },
    /// The image is whole, on disk, under its name.
    Saved {
        /// Bytes of guest memory that are not zero.
        bytes: u64,
        /// Pages of 4096 bytes that are stored.
        pages: u64,
        /// Pages that are all zeros.
        zero_pages: u64,
        /// Size of the image in bytes.
        image_bytes: u64,
        /// How long QEMU had to wait for our disk, in milliseconds.
        stalled_ms: f64,
    },
}

/// Why a save failed. The guest runs on (or stays paused) as before, and no image is
/// left behind.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It can't work, as was found before the guest was touched.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// QEMU's control socket failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The machine could not be looked at.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The migration stream could not be understood.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The socket for the stream failed.
    #[error("making a socket for the migration stream failed: {0}")]
    Socket(std::io::Error),
    /// A thread could not be started.
    #[error("starting a thread failed: {0}")]
    Thread(std::io::Error),
    /// QEMU ended the migration itself.
    #[error("QEMU's migration ended with status `{status}`{}", .reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default())]
    Migration {
        /// QEMU's migration status.
        status: String,
        /// QEMU's reason.
        reason: Option<String>,
    },
    /// Interrupted before the image was whole.
    #[error("interrupted: the guest runs on, and no image was written")]
    Interrupted,
    /// Interrupted a second time, before QEMU had let go of the guest's memory.
    #[error(
        "interrupted twice: no image was written, and the guest may hang, since QEMU had not let \
         go of its memory yet"
    )]
    InterruptedTwice,
}

/// Saves a guest while it runs, and returns once the image is whole.
///
/// An interrupt ends the save; the guest runs on and no image is left. QEMU before 8.1
/// has to send all memory before it lets go of the guest (see [`SaveEvent::Draining`]);
/// who does not wait for that, by a second interrupt, may leave the guest hanging.
///
/// # Errors
/// See [`SaveError`]. Whatever fails, the guest runs on as it ran before, its
/// migration settings are what they were, and nothing is left behind.
pub async fn save(
    options: &SaveOptions,
    mut interrupts: Interrupts,
    mut on_event: impl FnMut(SaveEvent),
) -> Result<Saved, SaveError> {
    let connect_and_check = async {
        let qmp = Qmp::connect(&options.qmp, checks::ANSWER_TIMEOUT).await?;
        let checked = check(&qmp, options).await?;
        Ok::<_, SaveError>((qmp, checked))
    };
    let (qmp, checked) = tokio::select! {
        ready = connect_and_check => ready?,
        () = interrupts.at_least(1) => return Err(SaveError::Interrupted),
    };
    let settings = Settings::apply(&qmp, &checked).await?;
    on_event(SaveEvent::Checked {
        qemu: checked.machine.qemu.to_string(),
        ram_bytes: checked.blocks.iter().map(|block| block.used_len).sum(),
        uncaptured_disks: checked.machine.uncaptured_disks.clone(),
    });

    let outcome = take(&qmp, options, &checked, &mut interrupts, &mut on_event).await;
    if let Err(error @ SaveError::InterruptedTwice) = outcome {
        // QEMU takes no other settings while a migration is under way.
        return Err(error);
    }
    let restored = settings.restore(&qmp).await;

    let (received, moment) = outcome?;
    restored?;
    let stalled = received.stalled();
    let committed = tokio::task::spawn_blocking(move || received.commit(checked.machine, moment));
    let saved = committed.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
    on_event(SaveEvent::Saved {
        bytes: saved.data_pages * crate::page::PAGE_SIZE as u64,
        pages: saved.data_pages,
        zero_pages: saved.zero_pages,
        image_bytes: saved.image_bytes,
        stalled_ms: millis(stalled),
    });
    Ok(saved)
}

/// When the snapshot was taken, and what it cost the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    unix_us: u64,
    pause: Option<Duration>,
}

/// Starts the migration and receives all of it. If that fails, the migration has been
/// ended and nothing of the image is left.
async fn take(
    qmp: &Qmp,
    options: &SaveOptions,
    checked: &Checked,
    interrupts: &mut Interrupts,
    on_event: &mut impl FnMut(SaveEvent),
) -> Result<(Received, Moment), SaveError> {
    let (ours, theirs) = UnixStream::pair().map_err(SaveError::Socket)?;
    widen(&theirs);
    qmp.getfd(OUTGOING, theirs.as_fd()).await?;
    // Only QEMU may hold the other end: its closing tells us that the stream is over.
    drop(theirs);
    let mut receiving = Receiving::start(ours, options, checked)?;
    let mut events = qmp.events();
    let asked = unix_us();
    // Not to be interrupted: whether it has begun must be known.
    let begun = qmp.migrate(&format!("fd:{OUTGOING}")).await;
    let outcome = match begun {
        Ok(()) => tokio::select! {
            outcome = follow(qmp, &mut events, asked, checked, &mut receiving, on_event) => outcome,
            () = interrupts.at_least(1) => Err(SaveError::Interrupted),
        },
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(taken) => Ok(taken),
        Err(error) => Err(end(qmp, error, checked, receiving, interrupts, on_event).await),
    }
}

/// Makes room in a socket, as much as we may: more than the system's limit only as root
/// (socket(7)). With less, a save works all the same.
fn widen(socket: &UnixStream) {
    let _ = setsockopt(socket, SndBuf, &SOCKET_BYTES);
    let _ = setsockopt(socket, SndBufForce, &SOCKET_BYTES);
}

/// Ends a migration and its stream, so that QEMU holds nothing of the guest any more.
/// Returns the error that led here, or a worse one.
async fn end(
    qmp: &Qmp,
    error: SaveError,
    checked: &Checked,
    receiving: Receiving,
    interrupts: &mut Interrupts,
    on_event: &mut impl FnMut(SaveEvent),
) -> SaveError {
    receiving.give_up();
    if checked.must_drain {
        on_event(SaveEvent::Draining);
    }
    let end = async {
        // A migration that was never begun has left QEMU its end under its name. In all
        // other cases there is no such name.
        let _ = qmp.closefd(OUTGOING).await;
        if !checked.must_drain {
            cancel(qmp).await;
        }
        // It fails when the stream has ended, as it is to.
        let _ = receiving.ended.await;
        let _ = wait_end(qmp).await;
    };
    tokio::select! {
        () = end => error,
        () = interrupts.at_least(2) => SaveError::InterruptedTwice,
    }
}

/// Follows a migration, begun at `asked` by the host's clock, to its end.
async fn follow(
    qmp: &Qmp,
    events: &mut Events,
    asked: u64,
    checked: &Checked,
    receiving: &mut Receiving,
    on_event: &mut impl FnMut(SaveEvent),
) -> Result<(Received, Moment), SaveError> {
    let Receiving { first_page, done, counters, .. } = receiving;
    let mut clock = PauseClock::new(checked.machine.running, asked);
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    let received = loop {
        tokio::select! {
            received = &mut *done => break received,
            first = &mut *first_page, if !first_page.is_terminated() => clock.passed = first.is_ok(),
            event = events.next() => clock.hear(&event?),
            _ = tick.tick(), if clock.moment.is_some() => on_event(counters.progress()),
        }
        clock.tell(on_event);
    };
    let died = || SaveError::Thread(std::io::Error::other("the receiving thread died"));
    match received.unwrap_or_else(|_| Err(died())) {
        Ok(received) => {
            wait_end(qmp).await?;
            // A small guest may be there before its events; QEMU's answer comes after.
            while let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next()).await {
                clock.hear(&event?);
            }
            clock.passed = true;
            clock.tell(on_event);
            Ok((received, clock.moment.unwrap_or(Moment { unix_us: asked, pause: None })))
        }
        // QEMU's own reason, where it has one, says more than the end of its stream.
        Err(error @ SaveError::Wire(WireError::Ended { .. })) => {
            wait_end(qmp).await?;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Puts together the moment from what QEMU's events and its stream tell. The first
/// page comes only after write protection is on, so it proves that the moment has
/// passed; the events before and after it give its time.
struct PauseClock {
    /// Whether the guest ran before.
    running: bool,
    /// When the migration was asked for, in microseconds since 1970.
    asked: u64,
    /// The first page has come.
    passed: bool,
    stopped: Option<u64>,
    resumed: Option<u64>,
    moment: Option<Moment>,
}

impl PauseClock {
    fn new(running: bool, asked: u64) -> PauseClock {
        PauseClock { running, asked, passed: false, stopped: None, resumed: None, moment: None }
    }

    fn hear(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" => self.stopped = Some(event.timestamp),
            "RESUME" => self.resumed = Some(event.timestamp),
            _ => {}
        }
    }

    /// Tells the moment, once, as soon as it is known.
    fn tell(&mut self, on_event: &mut impl FnMut(SaveEvent)) {
        if self.moment.is_some() {
            return;
        }
        self.moment = match (self.passed, self.running, self.stopped, self.resumed) {
            (true, false, ..) => Some(Moment { unix_us: self.asked, pause: None }),
            (true, true, Some(stopped), Some(resumed)) => Some(Moment {
                unix_us: stopped,
                pause: Some(Duration::from_micros(resumed.saturating_sub(stopped))),
            }),
            _ => None,
        };
        if let Some(Moment { unix_us, pause }) = self.moment {
            on_event(SaveEvent::Moment { pause_ms: pause.map(millis), unix_us });
        }
    }
}

/// Waits until QEMU's migration is over, and says how it ended.
async fn wait_end(qmp: &Qmp) -> Result<(), SaveError> {
    let deadline = tokio::time::Instant::now() + END_TIMEOUT;
    loop {
        let info = qmp.migration_info().await?;
        let status = info.status.unwrap_or_default();
        match status.as_str() {
            "completed" => return Ok(()),
            "setup" | "active" | "device" | "cancelling"
                if tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            _ => {
                return Err(SaveError::Migration { status, reason: info.error_desc });
            }
        }
    }
}

/// Ends a migration under way and waits until it has ended, so that the guest's
/// memory is no longer write-protected. An error means that QEMU is gone.
async fn cancel(qmp: &Qmp) {
    if qmp.migrate_cancel().await.is_ok() {
        let _ = wait_end(qmp).await;
    }
}

fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
