//! The whole way of a guest of ours, from the image to a guest that depends on nobody.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::error::RevertError;
use super::event::{OnEvent, RevertEvent};
use super::far;
use super::first_breath::FirstBreath;
use super::following;
use super::options::RevertOptions;
use super::outcome::Outcome;
use super::session::{Held, Launched, OpenImage, Planned, Resettable, Resident, Running};
use crate::cancel::Cancellation;

/// A guest that has been brought back.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Reverted {
    /// QEMU's process id.
    pub pid: i32,
    /// How its memory came.
    pub outcome: Outcome,
}

/// Brings a guest back and returns once all its memory is in place and, unless
/// [`Delivery::collapse`](super::Delivery::collapse) is off, in huge pages. QEMU then runs on by
/// itself. `on_event` is called as things happen. Where
/// [`RevertOptions::resettable`] is set, it goes on to serve resets ([`runs`](crate::runs)), until
/// QEMU ends or `cancel` is requested.
///
/// The first request of `cancel` ends a revert whose guest does not run yet. Later it is
/// answered with [`RevertEvent::StillNeeded`], and the second ends it in any case. Once all
/// memory is in place a request only ends the collapsing.
///
/// # Errors
/// When the image, QEMU or what connects them fails. QEMU has then been ended:
/// a guest without its memory is of no use, and must not run on with a wrong one.
pub async fn revert(
    options: &RevertOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Reverted, RevertError> {
    let resident = to_resident(options, cancel, &mut on_event).await?;
    let (pid, outcome) = match options.resettable {
        true => serve_resets(resident, &mut on_event).await?,
        false => resident.let_go(),
    };
    Ok(Reverted { pid: pid.unwrap_or_default(), outcome })
}

/// Resets a guest whenever that is asked for. One that can't be reset inside its QEMU is let go.
async fn serve_resets(
    resident: Resident,
    on_event: OnEvent<'_>,
) -> Result<(Option<i32>, Outcome), RevertError> {
    match Resettable::track(resident).await {
        Ok(mut resettable) => {
            on_event(RevertEvent::Resettable { written: resettable.written() });
            resettable.serve(on_event).await?;
            Ok(resettable.let_go())
        }
        Err(not) => {
            let what = "the guest can't be reset inside its QEMU".to_owned();
            on_event(RevertEvent::Note { what, why: not.error.to_string() });
            Ok(not.resident.let_go())
        }
    }
}

/// As [`revert`], but QEMU does not outlive what is returned, and it is always one of ours:
/// [`RevertOptions::domain`] counts for nothing. Overlays of its disks stay, unless they are
/// ephemeral.
///
/// # Errors
/// As [`revert`].
pub async fn revert_held(
    options: &RevertOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Held, RevertError> {
    let options = RevertOptions { domain: None, ..options.clone() };
    let resident = to_resident(&options, cancel, &mut on_event).await?;
    let held = resident.into_held();
    Ok(held.unwrap_or_else(|| unreachable!("a session that was planned has a QEMU of ours")))
}

/// As [`revert_held`], and further to a guest that can be reset inside its QEMU, by
/// [`Resettable::reset`]. [`RevertOptions::resettable`] is taken for set.
///
/// # Errors
/// As [`revert`], and [`RevertError::Reset`] where the guest can't be reset so: its QEMU has been
/// ended then.
pub async fn revert_resettable(
    options: &RevertOptions,
    cancel: Cancellation,
    mut on_event: impl FnMut(RevertEvent) + Send,
) -> Result<Resettable, RevertError> {
    let options = RevertOptions { domain: None, resettable: true, ..options.clone() };
    let resident = to_resident(&options, cancel, &mut on_event).await?;
    let resettable = Resettable::track(resident).await.map_err(|not| not.error)?;
    on_event(RevertEvent::Resettable { written: resettable.written() });
    Ok(resettable)
}

/// Goes all the way.
async fn to_resident(
    options: &RevertOptions,
    cancel: Cancellation,
    on_event: OnEvent<'_>,
) -> Result<Resident, RevertError> {
    let options = &far::prepared(&with_standby(options))?;
    if options.follow {
        let image = following::open(&options.image, &cancel).await?;
        let options = options.clone().while_captured();
        return Clone::launch(image, &options, cancel, on_event)
            .await?
            .into_resident(on_event)
            .await;
    }
    let image = far::image(options)?.into();
    let planned = Planned::of(image, options, cancel.clone(), on_event).await?;
    let agent = planned.agent().map(Path::to_owned);
    let overlays = planned.overlays();
    let launched = planned.launch(on_event).await?;
    let mut resident = from_launched(launched, agent, options, cancel, on_event).await?;
    if let Some(far) = options.far.as_ref().filter(|far| !far.disks().is_empty()) {
        far::fill_disks(&mut resident, far, &overlays, on_event).await?;
    }
    Ok(resident)
}

/// These options, with a guest held in standby where something has to be done to it before it runs.
fn with_standby(options: &RevertOptions) -> RevertOptions {
    // Cables can be unplugged only between the device state and the guest's first instruction.
    let standby = options.standby || options.agent.new_macs;
    RevertOptions { standby, ..options.clone() }
}

/// A clone of a guest: brought back from an image of it that may still be in the making.
pub(crate) struct Clone {
    launched: Launched,
    agent: Option<PathBuf>,
    options: RevertOptions,
    cancel: Cancellation,
}

impl Clone {
    /// Starts its QEMU.
    pub(crate) async fn launch(
        image: OpenImage,
        options: &RevertOptions,
        cancel: Cancellation,
        on_event: OnEvent<'_>,
    ) -> Result<Clone, RevertError> {
        let options = with_standby(options);
        let planned = Planned::of(image, &options, cancel.clone(), on_event).await?;
        let agent = planned.agent().map(Path::to_owned);
        let launched = planned.launch(on_event).await?;
        Ok(Clone { launched, agent, options, cancel })
    }

    /// Starts its QEMU, and has it wait for devices and memory, which are [`given`](Clone::given) later.
    pub(crate) async fn launch_ahead(
        image: OpenImage,
        options: &RevertOptions,
        cancel: Cancellation,
        on_event: OnEvent<'_>,
    ) -> Result<Clone, RevertError> {
        let clone = Clone::launch(image, options, cancel, on_event).await?;
        Ok(Clone { launched: clone.launched.listen().await?, ..clone })
    }

    /// Has it brought back from another image of the same machine.
    pub(crate) fn given(mut self, image: OpenImage) -> Clone {
        self.launched.give(image);
        self
    }

    /// Brings it to where it depends on nobody.
    pub(crate) async fn bring(self, on_event: OnEvent<'_>) -> Result<Reverted, RevertError> {
        let (pid, outcome) = self.into_resident(on_event).await?.let_go();
        Ok(Reverted { pid: pid.unwrap_or_default(), outcome })
    }

    async fn into_resident(self, on_event: OnEvent<'_>) -> Result<Resident, RevertError> {
        let Clone { launched, agent, options, cancel } = self;
        from_launched(launched, agent, &options, cancel, on_event).await
    }
}

/// Goes all the way from a QEMU that waits.
async fn from_launched(
    launched: Launched,
    agent: Option<PathBuf>,
    options: &RevertOptions,
    cancel: Cancellation,
    on_event: OnEvent<'_>,
) -> Result<Resident, RevertError> {
    let new_macs = options.agent.new_macs;
    let armed = launched.arm(on_event).await?;
    let (armed, unplugged) = match new_macs {
        true => armed.unplug().await?,
        false => (armed, None),
    };
    let running = armed.run(on_event).await?;
    let Some(agent) = agent else { return fill(running, on_event).await };
    let breath = FirstBreath::begin(&options.agent, &agent, unplugged).await;
    // Two tell what happens at the same time.
    let on_event = Mutex::new(on_event);
    let tell = |event| (on_event.lock().unwrap_or_else(PoisonError::into_inner))(event);
    let mut tell_filling = &tell;
    let (filling, breath) = (fill(running, &mut tell_filling), breath.draw(&cancel, &tell));
    tokio::pin!(filling, breath);
    tokio::select! {
        biased;
        resident = &mut filling => {
            let resident = resident?;
            breath.await;
            Ok(resident)
        }
        () = &mut breath => filling.await,
    }
}

/// Brings all memory of a guest that runs, in huge pages.
async fn fill(running: Running, on_event: OnEvent<'_>) -> Result<Resident, RevertError> {
    let mut resident = running.fill(on_event).await?;
    resident.collapse(on_event).await;
    Ok(resident)
}
