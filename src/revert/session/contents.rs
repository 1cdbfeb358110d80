//! What an image gives a guest, made ready while QEMU starts.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use tokio::task::JoinHandle;

use super::qemu::{POSTCOPY, Qemu};
use crate::guest::userfaultfd_lack;
use crate::image::{Image, Manifest, Sections};
use crate::memory::FillOptions;
use crate::page::{Page, PageSource};
use crate::qmp::{Qmp, QmpError};
use crate::revert::eager::EagerStream;
use crate::revert::error::RevertError;
use crate::revert::mapping::MappedStream;
use crate::revert::options::{Delivery, Placement};
use crate::revert::recorded;
use crate::revert::rtc::{self, Rtc};
use crate::revert::source::DeviceState;

/// Threads that prefetch, at most: more than this don't make any transport faster.
const MAX_PREFETCH: usize = 4;

/// The same where memory comes from afar: they mostly wait.
const FAR_PREFETCH: usize = 16;

/// How memory is filled.
pub(super) fn fill_options(
    delivery: &Delivery,
    image: &Arc<Image>,
    working_set: Vec<Page>,
) -> FillOptions {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    FillOptions {
        threads: if image.is_far() { FAR_PREFETCH } else { threads.min(MAX_PREFETCH) },
        working_set,
        rate: delivery.fill_rate,
        hold: delivery.hold,
        delay: delivery.fill_delay,
    }
}

/// What a guest is given.
pub(super) enum Contents {
    /// By postcopy: its device state, and then its memory in this order. Where it was left to
    /// us, it can be given `eagerly` instead.
    Postcopy { device_state: DeviceState, fill: FillOptions, eagerly: Option<EagerStream> },
    /// By an ordinary migration, all memory first, and why.
    Eager { stream: EagerStream, reason: String },
    /// By an ordinary migration: all that QEMU does not map.
    Mapped(MappedStream),
}

impl Contents {
    /// Reads them from the image. `mapped` names the blocks that QEMU maps: in the image, in QEMU.
    pub fn read(
        image: &Arc<Image>,
        delivery: &Delivery,
        rtc: Rtc,
        mapped: &[(String, String)],
    ) -> Result<Contents, RevertError> {
        let sections = sections(image, rtc)?;
        let Sections { config, devices, .. } = &sections;
        if delivery.placement == Placement::Eager {
            let stream = EagerStream::new(image, &sections);
            return Ok(Contents::Eager { stream, reason: "as was asked for".into() });
        }
        if !mapped.is_empty() {
            return Ok(Contents::Mapped(MappedStream::new(image, config, devices, mapped)?));
        }
        let working_set = recorded::recall(delivery, image).map(|set| set.pages);
        let working_set = working_set.unwrap_or_default();
        // While QEMU starts.
        image.will_need(&working_set);
        let fill = fill_options(delivery, image, working_set);
        let device_state = DeviceState::new(config, devices, &image.manifest().blocks);
        // What a guest asks for can only be seen where memory is served.
        let may_be_eager = delivery.placement == Placement::Auto && delivery.hold.is_none();
        let eagerly = may_be_eager.then(|| EagerStream::new(image, &sections));
        Ok(Contents::Postcopy { device_state, fill, eagerly })
    }

    /// The migration capabilities that QEMU needs for it.
    pub fn capabilities(&self) -> &'static [&'static str] {
        match self {
            Contents::Postcopy { .. } => &POSTCOPY,
            Contents::Eager { .. } | Contents::Mapped(_) => &[],
        }
    }

    /// What is left to give to a QEMU that has refused these capabilities.
    ///
    /// # Errors
    /// When nothing is, or QEMU has not answered at all.
    pub fn without_postcopy(self, qemu: &Qemu, error: QmpError) -> Result<Contents, RevertError> {
        let QmpError::Command { desc: refusal, .. } = error else { return Err(error.into()) };
        let version = qemu.qmp().map(Qmp::version).cloned().unwrap_or_default();
        let lack = userfaultfd_lack(qemu.pid(), &version).map(|lack| lack.to_string());
        match self {
            Contents::Postcopy { eagerly: Some(stream), .. } => {
                let why = lack.map(|lack| format!(": {lack}")).unwrap_or_default();
                let reason = format!("QEMU takes no postcopy migration here ({refusal}){why}");
                Ok(Contents::Eager { stream, reason })
            }
            _ => Err(RevertError::NoPostcopy { refusal, lack }),
        }
    }
}

/// Contents that are being read, or have been.
pub(super) enum Reading {
    UnderWay(JoinHandle<Result<Contents, RevertError>>),
    Done(Contents),
}

impl Reading {
    /// Begins to read.
    pub fn start(
        image: &Arc<Image>,
        delivery: &Delivery,
        rtc: Rtc,
        mapped: &[(String, String)],
    ) -> Reading {
        let (image, delivery, mapped) = (Arc::clone(image), delivery.clone(), mapped.to_vec());
        let read = move || Contents::read(&image, &delivery, rtc, &mapped);
        Reading::UnderWay(tokio::task::spawn_blocking(read))
    }

    /// Waits until all is read.
    pub async fn finish(self) -> Result<Contents, RevertError> {
        match self {
            Reading::UnderWay(task) => {
                task.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
            }
            Reading::Done(contents) => Ok(contents),
        }
    }
}

/// The parts of the saved stream that are not RAM, with the clock set as `rtc` says.
fn sections(image: &Image, rtc: Rtc) -> Result<Sections, RevertError> {
    set_clock(image.sections()?, image.manifest(), rtc)
}

/// These parts with the clock set as `rtc` says, for a guest that goes on now.
pub(super) fn set_clock(
    mut sections: Sections,
    manifest: &Manifest,
    rtc: Rtc,
) -> Result<Sections, RevertError> {
    if rtc == Rtc::Keep {
        let moment = UNIX_EPOCH + Duration::from_micros(manifest.moment_unix_us);
        let since = moment.elapsed().unwrap_or_default().as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        rtc::keep(&mut sections.devices, since).map_err(RevertError::Rtc)?;
    }
    Ok(sections)
}
