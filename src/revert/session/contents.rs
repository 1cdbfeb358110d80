//! What an image gives a guest, made ready while QEMU starts.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use tokio::task::JoinHandle;

use crate::image::{Image, Sections};
use crate::memory::FillOptions;
use crate::revert::error::RevertError;
use crate::revert::mapping::MappedStream;
use crate::revert::options::Delivery;
use crate::revert::recorded;
use crate::revert::rtc::{self, Rtc};
use crate::revert::source::DeviceState;

/// Threads that prefetch, at most: more than this don't make any transport faster.
const MAX_PREFETCH: usize = 4;

/// What a guest is given.
pub(super) enum Contents {
    /// By postcopy: its device state, and then its memory in this order.
    Postcopy { device_state: DeviceState, fill: FillOptions },
    /// By an ordinary migration: all that QEMU does not map.
    Mapped(MappedStream),
}

impl Contents {
    /// Reads them from the image. `mapped` names the blocks that QEMU maps.
    pub fn read(
        image: &Arc<Image>,
        delivery: &Delivery,
        rtc: Rtc,
        mapped: &[String],
    ) -> Result<Contents, RevertError> {
        let Sections { config, devices, .. } = &sections(image, rtc)?;
        if !mapped.is_empty() {
            return Ok(Contents::Mapped(MappedStream::new(image, config, devices, mapped)?));
        }
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let fill = FillOptions {
            threads: threads.min(MAX_PREFETCH),
            working_set: recorded::recall(delivery, image).map(|set| set.pages).unwrap_or_default(),
            rate: delivery.fill_rate,
            hold: delivery.hold,
            delay: delivery.fill_delay,
        };
        let device_state = DeviceState::new(config, devices, &image.manifest().blocks);
        Ok(Contents::Postcopy { device_state, fill })
    }
}

/// Contents that are being read, or have been.
pub(super) enum Reading {
    UnderWay(JoinHandle<Result<Contents, RevertError>>),
    Done(Contents),
}

impl Reading {
    /// Begins to read.
    pub fn start(image: &Arc<Image>, delivery: &Delivery, rtc: Rtc, mapped: &[String]) -> Reading {
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
    let (mut sections, manifest) = (image.sections()?, image.manifest());
    if rtc == Rtc::Keep {
        let moment = UNIX_EPOCH + Duration::from_micros(manifest.moment_unix_us);
        let since = moment.elapsed().unwrap_or_default().as_nanos();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        rtc::keep(&mut sections.devices, since).map_err(RevertError::Rtc)?;
    }
    Ok(sections)
}
