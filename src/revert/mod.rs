//! Bringing a saved guest back: QEMU starts with device state only, the guest runs
//! at once, and its memory follows.

mod delivery;
mod error;
mod feed;
mod harvest;
mod map;
mod rtc;
mod serve;
#[cfg(test)]
mod tests;
mod way;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedReceiver;

pub use crate::transport::proof::AdoptError;
use delivery::Heard;
pub use delivery::{Delivery, Outcome};
pub use error::RevertError;
use error::{feed_error, with_qemus_words};
pub use feed::{Feed, FeedError, FeedEvent, FeedOptions, Prepared};
pub use harvest::harvest;
use map::Mapped;
pub use rtc::Rtc;
pub use serve::{ServeOptions, serve};
pub use way::Way;

use crate::cancel::Cancellation;
use crate::guest::{Note, OverlayOptions, Process, RewriteOptions};
use crate::host::check_page_size;
use crate::image::{Image, Sections, verify_chain, verify_flat};
use crate::qmp::{Event, Events, Qmp, QmpError};

/// The name under which QEMU is given its end of the migration stream.
const INCOMING: &str = "snapback-incoming";

/// The migration capabilities that a revert turns on, and off again at its end.
const CAPABILITIES: [&str; 2] = ["postcopy-ram", "events"];

/// How long QEMU may take to end the migration once it has confirmed its end.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// How long it may take until all is read that a QEMU which has ended has said.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(5);

/// Which guest to bring back, and how.
#[derive(Debug, Clone, Default)]
pub struct RevertOptions {
    /// The image.
    pub image: PathBuf,
    /// How the recorded command line is changed.
    pub rewrite: RewriteOptions,
    /// How its memory is brought.
    pub delivery: Delivery,
    /// Let the guest run only once its working set is in place.
    pub preload: bool,
    /// What the machine's battery-backed clock shows.
    pub rtc: Rtc,
    /// Check the whole image before anything of it is used. Memory that is mapped is
    /// checked in no other way.
    pub check: bool,
}

/// What happens during a revert, in this order but for `StillNeeded`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RevertEvent {
    /// Something of the recorded command line was changed.
    Note {
        /// What was changed.
        what: String,
        /// Why.
        why: String,
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
    /// The way that memory goes.
    Placing {
        /// The way.
        way: Way,
        /// Why this one.
        reason: String,
    },
    /// The guest runs (or, saved while paused, could run).
    Running {
        /// QEMU's process id; none for a QEMU that somebody else started.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pid: Option<i32>,
    },
    /// How far memory has come.
    Progress(Progress),
    /// An interrupt came while the guest still depends on the image being served.
    StillNeeded,
    /// All memory is in place; the guest depends on nothing any more.
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
}

/// How far a revert has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Pages of 4096 bytes that are in place.
    pub pages: u64,
    /// Pages of the machine.
    pub total: u64,
    /// Requests from the guest so far.
    pub requests: u64,
}

/// A guest that has been brought back.
#[derive(Debug, Clone)]
pub struct Reverted {
    /// QEMU's process id.
    pub pid: i32,
    /// How its memory came.
    pub outcome: Outcome,
}

/// A guest that has been brought back and is still its owner's: QEMU ends when
/// `process` is dropped.
#[derive(Debug)]
pub struct Held {
    /// QEMU's process.
    pub process: Process,
    /// QEMU's control socket.
    pub qmp: Qmp,
    /// How its memory came.
    pub outcome: Outcome,
}

/// Brings a guest back and returns once all its memory is in place. QEMU then runs
/// on by itself. `on_event` is called as things happen.
///
/// The first interrupt ends a revert whose guest does not run yet, and is otherwise
/// answered with [`RevertEvent::StillNeeded`]; the second ends it in any case.
///
/// # Errors
/// When the image, QEMU or the way between them fails. QEMU has then been ended:
/// a guest without its memory is of no use, and must not run on with a wrong one.
pub async fn revert(
    options: &RevertOptions,
    cancel: Cancellation,
    on_event: impl FnMut(RevertEvent),
) -> Result<Reverted, RevertError> {
    let Held { mut process, outcome, .. } = revert_held(options, cancel, on_event).await?;
    process.detach();
    Ok(Reverted { pid: process.pid(), outcome })
}

/// As [`revert`], but QEMU does not outlive what is returned. Overlays of its disks stay,
/// unless they are ephemeral.
///
/// # Errors
/// As [`revert`].
pub async fn revert_held(
    options: &RevertOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent),
) -> Result<Held, RevertError> {
    check_page_size()?;
    let image = Image::open(&options.image)?;
    let machine = &image.manifest().machine;
    let stays_paused = options.rewrite.stays_paused() || !machine.running;
    let paused = stays_paused || options.preload;
    let overlays = overlays_beside(&options.image, &options.rewrite.overlays);
    let rewriting = RewriteOptions { paused, overlays, ..options.rewrite.clone() };
    let (plan, not_mapped) = map::plan(&image, options, rewriting)?;
    if options.check {
        tokio::select! {
            checked = check(&image) => checked?,
            () = cancel.requested() => {
                return Err(RevertError::Interrupted("the image was still being checked"));
            }
        }
    }
    for Note { what, why } in plan.notes.clone() {
        on_event(RevertEvent::Note { what, why });
    }
    if let Some(why) = not_mapped {
        on_event(RevertEvent::Note { what: "served memory instead of mapping it".into(), why });
    }
    for disk in &plan.overlays {
        on_event(RevertEvent::Disk {
            disk: disk.disk.clone(),
            frozen: disk.frozen().to_owned(),
            overlay: disk.path.clone(),
        });
    }
    let start = match (plan.paused, stays_paused) {
        (false, _) => Start::Runs,
        (true, false) => Start::WhenPreloaded,
        (true, true) => Start::StaysPaused,
    };

    // QEMU's start takes tens of milliseconds: what it is given is read meanwhile.
    let ready = tokio::task::spawn_blocking({
        let (image, delivery, rtc) = (Arc::clone(&image), options.delivery.clone(), options.rtc);
        let mapped = plan.mapped.clone();
        move || {
            let sections = sections(&image, rtc)?;
            Ok::<_, RevertError>(match mapped.as_slice() {
                [] => Bring::Serve(delivery.prepare(&image, prepared(&image, &sections))),
                mapped => Bring::Map(Mapped::new(&image, &sections, mapped)?),
            })
        }
    });
    let (mut process, qmp) = tokio::select! {
        started = Process::start(plan) => started?,
        () = cancel.requested() => return Err(RevertError::Interrupted("QEMU was not up yet")),
    };
    let pid = process.pid();
    on_event(RevertEvent::QemuReady { pid });

    let mut said = qmp.events();
    // Outlives QEMU: a guest whose feed has ended would only wait.
    let feed = OnceLock::new();
    let bring = async {
        let until_it_runs = async {
            let ready = ready.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
            let ready = match ready? {
                Bring::Serve(ready) => ready,
                Bring::Map(mapped) => {
                    let outcome = mapped.bring(&image, &qmp, start, &mut on_event).await?;
                    return Ok(Runs::Whole(outcome));
                }
            };
            let mut events = qmp.events();
            let (ours, theirs) = socket_pair()?;
            // Meanwhile QEMU gets ready: what it reads first lies there when it begins to.
            let (connected, started) = tokio::join!(
                biased;
                connect(&qmp, theirs),
                async { options.delivery.start(ready, &image, ours, Some(pid), options.preload) }
            );
            let (started, mut steps) = started?;
            let feed = feed.get_or_init(|| started);
            connected?;
            let heard = wait_running(&qmp, &mut events, &mut steps, start, &mut on_event).await?;
            Ok::<_, RevertError>(Runs::Served(feed, steps, heard))
        };
        let runs = tokio::select! {
            runs = until_it_runs => runs?,
            () = cancel.requested() => {
                return Err(RevertError::Interrupted("the guest did not run yet; it was ended"));
            }
        };
        process.keep_overlays();
        on_event(RevertEvent::Running { pid: Some(pid) });
        let outcome = match runs {
            Runs::Whole(outcome) => outcome,
            Runs::Served(feed, mut steps, heard) => {
                let every = options.delivery.progress_every;
                let followed =
                    delivery::follow(feed, &mut steps, heard, every, &cancel, &mut on_event);
                let outcome = followed.await?;
                // QEMU has confirmed that it has all of the guest, which depends on nobody
                // any more: whatever happens from here on, it stays.
                if let Err(error) = finish(&qmp).await {
                    tracing::warn!(
                        "the guest's memory is complete, but QEMU was not tidied up: {error}"
                    );
                }
                outcome
            }
        };
        on_event(outcome.resident());
        Ok(outcome)
    };
    match bring.await {
        Ok(outcome) => {
            if outcome.way != Way::Map {
                options.delivery.remember(&image, &outcome);
            }
            Ok(Held { process, qmp, outcome })
        }
        Err(error) => {
            let error = with_qemus_words(error, &process);
            process.kill().await;
            abandon(feed.into_inner());
            // Now that QEMU has gone, all that it has said can be heard. What a guest that has
            // run may have promised to others is not thrown away.
            let has_run = tokio::time::timeout(LAST_WORDS_TIMEOUT, has_run(&mut said)).await;
            if has_run != Ok(false) {
                process.keep_overlays();
            }
            Err(error)
        }
    }
}

/// A guest that runs, or could.
enum Runs<'a> {
    /// It has all its memory.
    Whole(Outcome),
    /// It is fed. With what the feed has yet to say and has said.
    Served(&'a Feed, UnboundedReceiver<FeedEvent>, Heard),
}

/// Ends a feed that has failed, without waiting for its threads: one may be stuck in a read
/// of a disk that has died.
fn abandon(feed: Option<Feed>) {
    let thread = std::thread::Builder::new().name("abandoned".into());
    if let Err(error) = thread.spawn(move || drop(feed)) {
        tracing::debug!("no thread to wait for those of a feed: {error}");
    }
}

/// Where overlays go and how they are called: beside the image and after it, where
/// nothing else was said.
fn overlays_beside(image: &Path, options: &OverlayOptions) -> OverlayOptions {
    let parent = || image.parent().filter(|parent| !parent.as_os_str().is_empty());
    let folder = options.folder.clone();
    let folder = folder.unwrap_or_else(|| parent().unwrap_or(Path::new(".")).to_owned());
    let name = || image.file_name().map(|name| name.to_string_lossy().into_owned());
    OverlayOptions {
        folder: Some(folder),
        prefix: options.prefix.clone().or_else(name),
        ephemeral: options.ephemeral,
    }
}

/// How a guest gets its memory, made ready.
enum Bring {
    /// It is served.
    Serve(delivery::Ready),
    /// QEMU maps it.
    Map(Mapped),
}

/// Checks the whole image. When nobody waits any more, it reads on in vain until it is done
/// or the program ends.
async fn check(image: &Arc<Image>) -> Result<(), RevertError> {
    let image = Arc::clone(image);
    let checked = tokio::task::spawn_blocking(move || {
        let report = verify_chain(&image, |_, _| {})?;
        verify_flat(&image)?;
        match report.damages.first() {
            Some(damage) => Err(RevertError::Damaged(damage.error.to_string())),
            None => Ok(()),
        }
    });
    checked.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
}

/// Reads from the image what is sent before the guest runs.
fn prepare(image: &Image, rtc: Rtc) -> Result<Prepared, RevertError> {
    Ok(prepared(image, &sections(image, rtc)?))
}

fn prepared(image: &Image, sections: &Sections) -> Prepared {
    Prepared::new(&sections.config, &sections.devices, &image.manifest().blocks)
}

/// The parts of the stream that are not RAM, with the clock as it shall be.
fn sections(image: &Image, rtc: Rtc) -> Result<Sections, RevertError> {
    let (mut sections, manifest) = (image.sections()?, image.manifest());
    if rtc == Rtc::Keep {
        let moment = UNIX_EPOCH + Duration::from_micros(manifest.moment_unix_us);
        let since = moment.elapsed().unwrap_or_default().as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        rtc::keep(&mut sections.devices, since).map_err(RevertError::Rtc)?;
    }
    Ok(sections)
}

/// The two ends of the migration stream.
fn socket_pair() -> Result<(UnixStream, UnixStream), RevertError> {
    UnixStream::pair().map_err(|source| RevertError::Socket {
        what: "making a socket for the migration stream failed".into(),
        source,
    })
}

/// Has QEMU read the migration stream from its end. The commands are sent one behind
/// the other without waiting for answers: QEMU executes them in that order, and each
/// way there and back costs a guest that waits to run a good part of a millisecond.
async fn connect(qmp: &Qmp, theirs: UnixStream) -> Result<(), QmpError> {
    let capabilities = CAPABILITIES.map(|name| (name, true));
    let incoming = format!("fd:{INCOMING}");
    let (capable, given, listening) = tokio::join!(
        biased;
        qmp.set_migration_capabilities(&capabilities),
        qmp.getfd(INCOMING, theirs.as_fd()),
        qmp.migrate_incoming(&incoming),
    );
    capable.and(given).and(listening)
}

/// When the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// As soon as its device state is in.
    Runs,
    /// Once its working set is in place as well.
    WhenPreloaded,
    /// When its user says so.
    StaysPaused,
}

/// Waits until the guest runs, or, if it is to stay paused, until it could.
async fn wait_running(
    qmp: &Qmp,
    events: &mut Events,
    steps: &mut UnboundedReceiver<FeedEvent>,
    start: Start,
    on_event: &mut impl FnMut(RevertEvent),
) -> Result<Heard, RevertError> {
    let (mut loaded, mut preloaded) = (false, false);
    let mut heard = Heard::default();
    loop {
        tokio::select! {
            event = events.next() => if event?.name == "RESUME" {
                return Ok(heard);
            },
            step = steps.recv(), if heard.finished.is_none() => match step {
                Some(FeedEvent::Placing { way, reason }) => {
                    heard.way = Some(way);
                    on_event(RevertEvent::Placing { way, reason });
                }
                Some(FeedEvent::Loaded) => loaded = true,
                Some(FeedEvent::Preloaded) => preloaded = true,
                Some(FeedEvent::Failed(error)) => return Err(feed_error(error)),
                Some(FeedEvent::Faults(report)) => heard.direct_faults = report,
                Some(FeedEvent::Finished(faults)) => heard.finished = Some(faults),
                None => return Err(feed_error(FeedError::HungUp)),
            },
        }
        match start {
            Start::StaysPaused if loaded => return Ok(heard),
            // All is over, and QEMU has not said that the guest runs: does it?
            Start::Runs if heard.finished.is_some() => {
                let status = qmp.status().await?;
                // It may have run and stand still again; its events came ahead of the answer.
                let has_run = has_run(events);
                return match tokio::time::timeout(Duration::ZERO, has_run).await == Ok(true) {
                    false if status != "running" => {
                        Err(RevertError::NotRun { status, qemu: String::new() })
                    }
                    _ => Ok(heard),
                };
            }
            // QEMU answers once it has finished loading, RUN included.
            Start::WhenPreloaded if loaded && preloaded => {
                qmp.cont().await?;
                return Ok(heard);
            }
            _ => {}
        }
    }
}

/// Reads events until one tells that the guest runs, or QEMU has gone and there are no more.
async fn has_run(events: &mut Events) -> bool {
    loop {
        match events.next().await {
            Ok(event) if event.name == "RESUME" => return true,
            Ok(_) => {}
            // It may be among those that are lost.
            Err(QmpError::EventsLost(_)) => return true,
            Err(_) => return false,
        }
    }
}

/// Waits until QEMU has ended the migration, whose end it has confirmed to us, and leaves
/// its capabilities as a QEMU that was never migrated has them.
async fn finish(qmp: &Qmp) -> Result<(), QmpError> {
    let mut events = qmp.events();
    let status = qmp.migration_info().await?.status.unwrap_or_default();
    // Any other status is of what came after it: somebody saves this guest, for example.
    if status.starts_with("postcopy") {
        let ended =
            |event: &Event| event.name == "MIGRATION" && event.data["status"] == "completed";
        events.wait(ended, END_TIMEOUT).await?;
    }
    qmp.set_migration_capabilities(&CAPABILITIES.map(|name| (name, false))).await
}
