//! Planned: the command line is rewritten, nothing is touched.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::away::StoreWatch;
use super::confined::Confinement;
use super::connection::Connection;
use super::contents::Reading;
use super::launched::Launched;
use super::launcher::Launcher;
use super::lifecycle::{Lifecycle, Start};
use super::open_image::OpenImage;
use crate::cancel::Cancellation;
use crate::guest::{Note, Overlay};
use crate::host::check_page_size;
use crate::image::{Image, verify_chain, verify_flat};
use crate::keeper::if_started;
use crate::revert::error::{PostcopyError, RevertError};
use crate::revert::event::{OnEvent, RevertEvent};
use crate::revert::first_breath;
use crate::revert::kept::{FarDetails, Kept};
use crate::revert::options::{Preload, RevertOptions};
use crate::runs::{Entry, ProcessId};

/// A guest that could be brought back: the command line is rewritten, nothing is touched.
pub struct Planned {
    image: OpenImage,
    launcher: Launcher,
    start: Start,
    options: RevertOptions,
    cancel: Cancellation,
    agent: Option<PathBuf>,
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
        on_event: OnEvent<'_>,
    ) -> Result<Planned, RevertError> {
        Planned::of(Image::open(&options.image)?.into(), options, cancel, on_event).await
    }

    /// The same with an image that is open already, whose file that of the options need not be any
    /// more.
    ///
    /// # Errors
    /// As [`Planned::new`].
    pub(crate) async fn of(
        open: OpenImage,
        options: &RevertOptions,
        cancel: Cancellation,
        on_event: OnEvent<'_>,
    ) -> Result<Planned, RevertError> {
        check_page_size()?;
        let image = &open.image;
        let machine = &image.manifest().machine;
        let stays_paused = options.rewrite.stays_paused() || !machine.running;
        let paused = stays_paused || options.preload != Preload::Nothing || options.standby;
        let (launcher, not_mapped) = Launcher::plan(image, options, paused)?;
        let agent = first_breath::socket(&options.agent, launcher.agent(), stays_paused)?;
        if options.check {
            tokio::select! {
                checked = check(image) => checked?,
                () = cancel.requested() => {
                    return Err(RevertError::Interrupted("the image was still being checked"));
                }
            }
        }
        tell(&launcher, not_mapped, image.exposures(), on_event);
        let start = match (launcher.is_paused(), stays_paused) {
            (false, _) => Start::ByItself,
            (true, false) => Start::Continued { preload: options.preload },
            (true, true) => Start::LeftToOwner,
        };
        Ok(Planned { image: open, launcher, start, options: options.clone(), cancel, agent })
    }

    /// The socket of the agent that is to be told something once the guest runs.
    pub(crate) fn agent(&self) -> Option<&Path> {
        self.agent.as_deref()
    }

    /// The overlays of its disks, as QEMU names them.
    pub(crate) fn overlays(&self) -> Vec<PathBuf> {
        self.launcher.overlays().iter().map(Overlay::file_name).collect()
    }

    /// Starts QEMU, while what it is given is read from the image.
    ///
    /// # Errors
    /// When QEMU does not start, or the session is cancelled.
    pub async fn launch(self, on_event: OnEvent<'_>) -> Result<Launched, RevertError> {
        let Planned { image: OpenImage { image, pages }, launcher, start, options, cancel, .. } =
            self;
        let RevertOptions { delivery, standby, rtc, resettable, keeper, sandbox, run, far, .. } =
            options;
        // Who speaks to libvirt may have to connect anew.
        let domain = launcher.domain();
        let sandbox = sandbox.filter(|_| domain.is_none());
        let run = run.map(|options| Entry::begin(&options, launcher.record(&image)));
        let overlays = || launcher.overlays().iter().map(Overlay::file_name).collect();
        let kept = far.as_ref().map(|far| FarDetails { again: far.again(), overlays: overlays() });
        let mapped = launcher.mapped();
        let is_mapped = !mapped.is_empty();
        // A guest whose memory is mapped needs nobody.
        let keeper = keeper.filter(|_| !is_mapped);
        let keep = async {
            let sandbox = sandbox.as_deref();
            keeper.and_then(|successor| {
                let run = run.as_ref();
                if_started(Kept::start(&successor, &image, &delivery, domain, sandbox, run, kept))
            })
        };
        // QEMU's start takes tens of milliseconds.
        let contents = Reading::start(&image, &delivery, rtc, &mapped);
        let lifecycle = Lifecycle::new(start, standby);
        let lifecycle = if is_mapped { lifecycle.mapped() } else { lifecycle };
        let launch = launcher.launch(image.identity().to_string(), &cancel);
        // The keeper behind QEMU, whose start it would hold up, and while QEMU's takes its time.
        let (qemu, keeper) = tokio::join!(biased; launch, keep);
        let qemu = qemu?;
        let pid = qemu.pid();
        on_event(RevertEvent::QemuReady { pid: pid.unwrap_or_default() });
        if let Some((_, kept)) = &keeper {
            qemu.keep_by(kept).map_err(PostcopyError::Duplicate)?;
        }
        let mut connection = Connection::new(qemu, lifecycle, image, delivery, cancel);
        connection.pages = pages;
        connection.disks_follow = far.as_ref().is_some_and(|far| !far.disks().is_empty());
        connection.store = far.map(|far| StoreWatch::new(far.answering()));
        connection.confinement = Confinement::wanted(sandbox);
        (connection.rtc, connection.resettable, connection.mapped) = (rtc, resettable, mapped);
        connection.run =
            run.inspect(|run| run.note(move |record| record.qemu = pid.and_then(ProcessId::of)));
        if let Some((keeper, kept)) = keeper {
            connection.keep(keeper, kept);
        }
        Ok(Launched { connection, contents, socket: None, refused: None })
    }
}

/// Tells what differs from the record, and what should be changed.
fn tell(
    launcher: &Launcher,
    not_mapped: Option<String>,
    exposures: Vec<String>,
    on_event: OnEvent<'_>,
) {
    for Note { what, why } in launcher.notes().to_vec() {
        on_event(RevertEvent::Note { what, why });
    }
    if let Some(why) = not_mapped {
        on_event(RevertEvent::Note { what: "served memory instead of mapping it".into(), why });
    }
    for says in exposures {
        on_event(RevertEvent::Warning { says });
    }
    for disk in launcher.overlays() {
        on_event(RevertEvent::Disk {
            disk: disk.disk.clone(),
            frozen: disk.frozen().to_owned(),
            overlay: disk.path.clone(),
        });
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
