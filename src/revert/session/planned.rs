//! Planned: the command line is rewritten, nothing is touched.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::confined::Confinement;
use super::connection::Connection;
use super::contents::Reading;
use super::launched::Launched;
use super::lifecycle::{Lifecycle, Start};
use super::qemu::Qemu;
use crate::cancel::Cancellation;
use crate::guest::{Note, OverlayOptions, Process, RewriteOptions, StartPlan};
use crate::host::check_page_size;
use crate::image::{Image, verify_chain, verify_flat};
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::event::RevertEvent;
use crate::revert::kept::Kept;
use crate::revert::mapping;
use crate::revert::options::RevertOptions;
use crate::runs::{Entry, ProcessId, Record};

/// A guest that could be brought back: the command line is rewritten, nothing is touched.
pub struct Planned {
    image: Arc<Image>,
    plan: StartPlan,
    start: Start,
    options: RevertOptions,
    cancel: Cancellation,
}

impl Planned {
    /// Plans how the guest of an image is brought back, and tells what differs from the
    /// record. `cancel` holds for the whole session.
    ///
    /// # Errors
    /// When the image can't be used, or QEMU not be started as recorded.
    pub async fn new(
        options: &RevertOptions,
        cancel: Cancellation,
        on_event: &mut impl FnMut(RevertEvent),
    ) -> Result<Planned, RevertError> {
        check_page_size()?;
        let image = Image::open(&options.image)?;
        let machine = &image.manifest().machine;
        let stays_paused = options.rewrite.stays_paused() || !machine.running;
        let paused = stays_paused || options.preload || options.standby;
        let overlays = placed(&options.rewrite, &options.image);
        let rewriting = RewriteOptions { paused, overlays, ..options.rewrite.clone() };
        let (plan, not_mapped) = mapping::plan(&image, options, rewriting)?;
        if options.check {
            tokio::select! {
                checked = check(&image) => checked?,
                () = cancel.requested() => {
                    return Err(RevertError::Interrupted("the image was still being checked"));
                }
            }
        }
        tell(&plan, not_mapped, image.exposures(), on_event);
        let start = match (plan.paused, stays_paused) {
            (false, _) => Start::ByItself,
            (true, false) => Start::Continued { preload: options.preload },
            (true, true) => Start::LeftToOwner,
        };
        Ok(Planned { image, plan, start, options: options.clone(), cancel })
    }

    /// Starts QEMU, while what it is given is read from the image.
    ///
    /// # Errors
    /// When QEMU does not start, or the session is cancelled.
    pub async fn launch(
        self,
        on_event: &mut impl FnMut(RevertEvent),
    ) -> Result<Launched, RevertError> {
        let Planned { image, mut plan, start, options, cancel } = self;
        // Should nobody be left who knows whose guest it is.
        plan.label = image.identity().to_string();
        let RevertOptions { delivery, standby, rtc, keeper, sandbox, run, .. } = options;
        let run = run.map(|options| Entry::begin(&options, record(&image, &plan)));
        // A guest whose memory is mapped needs nobody.
        let keeper = keeper.filter(|_| plan.mapped.is_empty());
        let keeper = keeper.and_then(|successor| {
            let sandbox = sandbox.as_deref();
            let started = Kept::start(&successor, &image, &delivery, sandbox, run.as_ref());
            started.inspect_err(|error| tracing::warn!("no keeper can be started: {error}")).ok()
        });
        // QEMU's start takes tens of milliseconds.
        let contents = Reading::start(&image, &delivery, rtc, &plan.mapped);
        let lifecycle = Lifecycle::new(start, standby);
        let lifecycle = match plan.mapped.is_empty() {
            true => lifecycle,
            false => lifecycle.mapped(),
        };
        let ports = plan.ports.clone();
        let (process, qmp) = tokio::select! {
            started = Process::start(plan) => started?,
            () = cancel.requested() => {
                return Err(RevertError::Interrupted("QEMU was not up yet"));
            }
        };
        on_event(RevertEvent::QemuReady { pid: process.pid() });
        if let Some((_, kept)) = &keeper {
            kept.hold_qemu(&process, &qmp).map_err(PostcopyError::Duplicate)?;
        }
        let pid = process.pid();
        let qemu = Qemu::ours(process, qmp, ports);
        let mut connection = Connection::new(qemu, lifecycle, image, delivery, cancel);
        connection.confinement = Confinement::wanted(sandbox);
        connection.run =
            run.inspect(|run| run.note(move |record| record.qemu = ProcessId::of(pid)));
        if let Some((keeper, kept)) = keeper {
            connection.keep(keeper, kept);
        }
        Ok(Launched { connection, contents, socket: None })
    }
}

/// Tells what differs from the record, and what should be changed.
fn tell(
    plan: &StartPlan,
    not_mapped: Option<String>,
    exposures: Vec<String>,
    on_event: &mut impl FnMut(RevertEvent),
) {
    for Note { what, why } in plan.notes.clone() {
        on_event(RevertEvent::Note { what, why });
    }
    if let Some(why) = not_mapped {
        on_event(RevertEvent::Note { what: "served memory instead of mapping it".into(), why });
    }
    for says in exposures {
        on_event(RevertEvent::Warning { says });
    }
    for disk in &plan.overlays {
        on_event(RevertEvent::Disk {
            disk: disk.disk.clone(),
            frozen: disk.frozen().to_owned(),
            overlay: disk.path.clone(),
        });
    }
}

/// What is recorded of a guest that is about to be started.
fn record(image: &Image, plan: &StartPlan) -> Record {
    let path = image.files().next().map(|(path, _)| path.to_owned()).unwrap_or_default();
    let pages = image.manifest().blocks.iter().map(|block| block.pages()).sum();
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    Record {
        overlays: plan.overlays.iter().filter_map(|disk| disk.path.clone()).collect(),
        sockets: plan.sockets.clone(),
        ..Record::new(absolute(path), pages)
    }
}

/// Where overlays go and what they are called: in the guest's own directory or else beside the
/// image, and after its name, unless the options say otherwise.
fn placed(rewrite: &RewriteOptions, image: &Path) -> OverlayOptions {
    let options = &rewrite.overlays;
    let parent = || image.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = options.directory.clone().or(rewrite.own.clone());
    let directory = directory.unwrap_or_else(|| parent().unwrap_or(Path::new(".")).to_owned());
    let name = || image.file_name().map(|name| name.to_string_lossy().into_owned());
    OverlayOptions {
        directory: Some(directory),
        prefix: options.prefix.clone().or_else(name),
        ephemeral: options.ephemeral,
    }
}

/// Checks the whole image. Cancelled, it goes on reading in the background until it is done
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
