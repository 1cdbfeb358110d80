//! Clones of a guest that runs, which goes on: a save and reverts at once.
//!
//! QEMUs are started ahead where that can be, get the state of the devices right behind the moment,
//! and run. What they touch is read from what has been captured by then, or from the memory of the
//! guest itself, which is write-protected for as long as it is not.

mod error;
mod event;

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};

use crate::cancel::Cancellation;
use crate::identity::Identity;
use crate::image::{Details, Sections, skeleton};
use crate::machine::Machine;
use crate::memory::FillDelay;
use crate::page::PageSource;
use crate::revert::session::OpenImage;
use crate::revert::{Clone, RevertError, RevertEvent, RevertOptions, Reverted};
use crate::save::{Ahead, AtMoment, Forking, SaveOptions, save_and_fork};

pub use error::ForkError;
pub use event::ForkEvent;

/// How long clones are waited for that start, before memory is read at full speed: what the source writes
/// meanwhile waits longer.
const CLONES_FIRST: Duration = Duration::from_millis(50);

/// How long clones that run have the processors for themselves: every page that they touch is a fault then, and
/// under TCG all code is translated anew. On two processors their first heartbeat comes twice as soon for it,
/// and the last of their memory by a sixth later.
const FIRST_BREATH: Duration = Duration::from_millis(90);

/// Which guest to fork, and into what.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ForkOptions {
    /// How the guest is saved. The image is written only if it is to be [kept](ForkOptions::keep);
    /// its path is that of the journal in any case.
    pub save: SaveOptions,
    /// Leave an image as well.
    pub keep: bool,
    /// How each clone is brought back. The image, the check, the keeper, the sandbox and resets
    /// count for nothing.
    pub clones: Vec<RevertOptions>,
}

impl ForkOptions {
    /// Forks a guest into these clones, and leaves no image.
    pub fn new(save: SaveOptions, clones: Vec<RevertOptions>) -> ForkOptions {
        ForkOptions { save, keep: false, clones }
    }
}

/// Forks a guest that runs: each clone goes on from the same moment, and so does the guest itself,
/// which stands still for as long as in a save. Returns once each clone has all its memory, or has
/// failed, in their order.
///
/// The memory of the guest that is not zero is held once more, by this process, until then. A guest
/// whose disks are captured goes on in overlays, as after a save; the clones have their own over the
/// same frozen files. Should the guest, or this process, end before all of its memory is captured,
/// clones that miss some of it are stopped: nothing can complete them.
///
/// # Errors
/// When the guest can't be saved; and where memory can't be captured to the end.
pub async fn fork(
    options: &ForkOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(ForkEvent),
) -> Result<Vec<Result<Reverted, RevertError>>, ForkError> {
    let (sender, mut events) = unbounded_channel();
    let (ahead_sender, ahead) = oneshot::channel();
    let (ready, ready_receiver) = oneshot::channel();
    let (moment_sender, moment) = oneshot::channel();
    let clones_run = Cancellation::new();
    let forking = Forking {
        ahead: Some(ahead_sender),
        ready: Some(ready_receiver),
        at_moment: Some(moment_sender),
        clones_run: clones_run.clone(),
    };
    let tell = sender.clone();
    let save_options = SaveOptions { without_image: !options.keep, ..options.save.clone() };
    let save = save_and_fork(&save_options, Some(forking), cancel.clone(), move |event| {
        let _ = tell.send(ForkEvent::Save(event));
    });
    let clones = Clones { options: options.clone(), cancel, events: sender, clones_run };
    // A task of their own: what the save has to write down at the moment does not hold them up.
    let mut task = JoinSet::new();
    task.spawn(clones.bring(ahead, ready, moment));
    let both = async { tokio::join!(save, task.join_all()) };
    tokio::pin!(both);
    let (saved, mut clones) = loop {
        tokio::select! {
            // What happened before the end is told before it.
            biased;
            Some(event) = events.recv() => on_event(event),
            ended = &mut both => break ended,
        }
    };
    while let Ok(event) = events.try_recv() {
        on_event(event);
    }
    saved?;
    clones.pop().unwrap_or_else(|| unreachable!("one task was spawned"))
}

/// Clones that are brought up.
struct Clones {
    options: ForkOptions,
    cancel: Cancellation,
    events: UnboundedSender<ForkEvent>,
    /// Requested once they run, or this is dropped.
    clones_run: Cancellation,
}

impl Drop for Clones {
    fn drop(&mut self) {
        self.clones_run.request();
    }
}

/// A clone whose QEMU may have been started.
type Launched = Result<Option<Clone>, RevertError>;

impl Clones {
    async fn bring(
        self,
        ahead: oneshot::Receiver<Ahead>,
        ready: oneshot::Sender<()>,
        moment: oneshot::Receiver<AtMoment>,
    ) -> Result<Vec<Result<Reverted, RevertError>>, ForkError> {
        let launched = match ahead.await {
            Ok(ahead) => self.launch_ahead(ahead).await?,
            Err(_) => self.options.clones.iter().map(|_| Ok(None)).collect(),
        };
        let _ = ready.send(());
        // Without a moment the save has failed, which says why.
        let Ok(at_moment) = moment.await else { return Err(ForkError::NoMoment) };
        let passed = Instant::now();
        let image = open(at_moment).await?;
        let mut tasks = JoinSet::new();
        let (starting, mut started) = mpsc::channel::<Infallible>(1);
        for (index, clone) in launched.into_iter().enumerate() {
            let (image, options) = (image.clone(), self.clone_options(index));
            let (cancel, events) = (self.cancel.clone(), self.events.clone());
            let mut starting = Some(starting.clone());
            let brought = async move {
                let mut tell = |event| {
                    if matches!(event, RevertEvent::Running { .. }) {
                        starting = None;
                    }
                    let since_moment = passed.elapsed();
                    let _ = events.send(ForkEvent::Clone { index, since_moment, event });
                };
                let clone = match clone? {
                    Some(clone) => clone.given(image),
                    None => Clone::launch(image, &options, cancel, &mut tell).await?,
                };
                clone.bring(&mut tell).await
            };
            tasks.spawn(async move { (index, brought.await) });
        }
        drop(starting);
        // None, as soon as nobody is left who starts.
        let _ = timeout(CLONES_FIRST, started.recv()).await;
        sleep(FIRST_BREATH).await;
        self.clones_run.request();
        let mut ended = tasks.join_all().await;
        ended.sort_by_key(|(index, _)| *index);
        Ok(ended.into_iter().map(|(_, outcome)| outcome).collect())
    }

    /// Starts the QEMUs of all clones.
    async fn launch_ahead(&self, ahead: Ahead) -> Result<Vec<Launched>, ForkError> {
        let Ahead { machine, blocks } = ahead;
        let details = Details { machine, moment_unix_us: 0, pause_us: None };
        let label = label(&details.machine);
        let image = skeleton(
            Path::new(&label),
            Identity::random(),
            &blocks,
            details,
            &Sections::default(),
        )?;
        let mut launched = Vec::new();
        for index in 0..self.options.clones.len() {
            let (image, options) = (image.clone().into(), self.clone_options(index));
            let mut tell = |event: RevertEvent| {
                let since_moment = Default::default();
                let _ = self.events.send(ForkEvent::Clone { index, since_moment, event });
            };
            let clone = Clone::launch_ahead(image, &options, self.cancel.clone(), &mut tell).await;
            launched.push(clone.map(Some));
        }
        Ok(launched)
    }

    /// The options of a clone, with what can't be had for one.
    fn clone_options(&self, index: usize) -> RevertOptions {
        let mut options = self.options.clones[index].clone();
        let breath = FillDelay::Fixed { fixed: FIRST_BREATH };
        options.delivery.fill_delay.get_or_insert(breath);
        RevertOptions { domain: None, ..options.while_captured() }
    }
}

/// What errors call the guest.
fn label(machine: &Machine) -> String {
    format!("a fork of {}", machine.binary)
}

/// An image of the guest at its moment, whose pages come as they are asked for.
async fn open(at_moment: AtMoment) -> Result<OpenImage, ForkError> {
    let pages = Arc::clone(&at_moment.pages);
    let image = spawn_blocking(move || {
        let label = label(&at_moment.details.machine);
        at_moment.image(Path::new(&label))
    });
    let image = image.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
    let pages: Arc<dyn PageSource> = Arc::new(pages);
    Ok(OpenImage { image, pages })
}
