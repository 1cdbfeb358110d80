//! Reverts: snapback's, and QEMU's own from a stream file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use snapback::cancel::Cancellation;
use snapback::guest::{Process, RewriteOptions, rewrite};
use snapback::image::Image;
use snapback::revert::{Placement, Progress, RevertEvent, RevertOptions, revert};
use tempfile::TempDir;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::support::{Pidfd, Result, SOON, SerialLog, resident_kib};

/// How a revert went. Times count from its beginning.
#[derive(Debug, Default)]
pub struct Reverted {
    /// QEMU's control socket answers.
    pub ready: Duration,
    /// QEMU has said RESUME.
    pub running: Duration,
    /// The guest's first heartbeat is in its log.
    pub beat: Duration,
    /// All memory is in place.
    pub complete: Duration,
    /// QEMU's resident memory at `running` and at `complete`, in KiB.
    pub rss_running: u64,
    pub rss_complete: u64,
    pub requests: u64,
    /// By which transport memory went.
    pub placement: Placement,
}

/// A place for the reverted guest's sockets and log, which its command line had in
/// the folder `recorded`.
pub struct Place {
    pub folder: TempDir,
    pub rewrite: RewriteOptions,
}

impl Place {
    pub fn new(recorded: &Path) -> Result<Place> {
        let folder = tempfile::tempdir()?;
        let text = |path: &Path| path.display().to_string();
        let mut rewrite = RewriteOptions::default();
        rewrite.paths = vec![(text(recorded), text(folder.path()))];
        Ok(Place { rewrite, folder })
    }

    pub fn log(&self) -> SerialLog {
        SerialLog::whole(&self.folder.path().join("serial0.log"))
    }
}

/// Waits for the first heartbeat on a thread of its own, until it comes or this is
/// dropped.
struct FirstBeat {
    waiting: JoinHandle<Result<Duration>>,
    stop: Arc<AtomicBool>,
}

impl FirstBeat {
    fn watch(log: SerialLog, start: Instant) -> FirstBeat {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let waiting = spawn_blocking(move || {
            while !stopped.load(Ordering::Relaxed) && start.elapsed() < SOON {
                match log.last_beat() {
                    Some(beat) if beat.bad == 0 => return Ok(start.elapsed()),
                    Some(beat) => return Err(format!("the guest's memory is bad: {beat:?}").into()),
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            Err(format!("no heartbeat came; the log ends:\n{}", log.tail()).into())
        });
        FirstBeat { waiting, stop }
    }

    async fn came(mut self) -> Result<Duration> {
        (&mut self.waiting).await?
    }
}

impl Drop for FirstBeat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Kills a QEMU that would outlive us.
pub struct Ended(pub Pidfd);

impl Drop for Ended {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill() {
            eprintln!("a QEMU may be left behind: {error}");
        }
    }
}

/// Reverts by the library. The guest is ended when its memory is complete.
pub async fn ours(image: &Path, recorded: &Path, placement: Placement) -> Result<Reverted> {
    let place = Place::new(recorded)?;
    let mut options = RevertOptions::new(image);
    options.rewrite = place.rewrite.clone();
    options.delivery.placement = placement;
    // Each revert as the first one: a working set from earlier ones would help.
    options.delivery.working_set = false;
    // Measured by itself.
    options.delivery.collapse = false;
    let (mut told, mut rss) = (Reverted::default(), Ok(0));
    let start = Instant::now();
    let beat = FirstBeat::watch(place.log(), start);
    let reverted = revert(&options, Cancellation::new(), |event| match event {
        RevertEvent::QemuReady { .. } => told.ready = start.elapsed(),
        RevertEvent::Placing { placement, .. } => told.placement = placement,
        RevertEvent::Running { pid: Some(pid), .. } => {
            told.running = start.elapsed();
            rss = resident_kib(pid as u32);
        }
        RevertEvent::Resident { progress: Progress { requests, .. }, .. } => {
            told.complete = start.elapsed();
            told.requests = requests;
        }
        _ => {}
    })
    .await?;
    let _qemu = Ended(Pidfd::open(reverted.pid as u32)?);
    told.rss_complete = resident_kib(reverted.pid as u32)?;
    told.rss_running = rss?;
    told.beat = beat.came().await?;
    Ok(told)
}

/// Reverts by QEMU, started with the very same command line.
pub async fn peer(image: &Path, stream: &Path, recorded: &Path) -> Result<Reverted> {
    let place = Place::new(recorded)?;
    let image = Image::open(image)?;
    let start = Instant::now();
    let beat = FirstBeat::watch(place.log(), start);
    let plan = rewrite(&image.manifest().machine, &place.rewrite)?;
    // Dropped, it kills QEMU.
    let (mut process, qmp) = Process::start(plan).await?;
    let ready = start.elapsed();
    let mut events = qmp.events();
    qmp.migrate_incoming(&format!("exec:cat {}", stream.display())).await?;
    events.wait(|event| event.name == "RESUME", SOON).await?;
    let running = start.elapsed();
    // All memory comes before the guest runs.
    let rss = resident_kib(process.pid() as u32)?;
    let beat = beat.came().await?;
    process.kill().await;
    Ok(Reverted {
        ready,
        running,
        beat,
        complete: running,
        rss_running: rss,
        rss_complete: rss,
        ..Reverted::default()
    })
}

/// Reads a file once, so that it is in the page cache as far as there is room.
pub fn warm(path: &PathBuf) -> Result<()> {
    std::io::copy(&mut std::fs::File::open(path)?, &mut std::io::sink())?;
    Ok(())
}
