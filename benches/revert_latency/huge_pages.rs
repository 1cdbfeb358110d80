//! Huge pages after a revert, with and without collapsing, and what a save that follows costs.

use std::path::Path;
use std::time::Duration;

use snapback::cancel::Cancellation;
use snapback::revert::{Placement, RevertEvent, RevertOptions, revert};
use tokio::task::spawn_blocking;

use crate::reverts::{Ended, Place};
use crate::saves;
use crate::support::{Beat, Pidfd, Result, SerialLog, huge_bytes};

/// A revert, and a save that followed it.
#[derive(Debug, Default)]
pub struct Measured {
    /// Bytes of guest memory in huge pages at the end of the revert.
    pub huge: u64,
    /// What was told of collapsing; nothing where nothing was collapsed.
    pub collapsed: Option<Collapsed>,
    /// The longest time between two heartbeats in as long a time behind it, in ms.
    pub gap_after_ms: u64,
    /// The guest's pause in the save, in ms.
    pub pause_ms: f64,
    /// From the order of the save to its moment, in ms.
    pub moment_ms: f64,
}

/// How collapsing went.
#[derive(Debug, Clone, Copy)]
pub struct Collapsed {
    /// Bytes in huge pages before it.
    pub before: u64,
    pub took_ms: f64,
    /// The longest time between two heartbeats meanwhile, by the guest's clock, in ms.
    pub gap_ms: u64,
}

impl Collapsed {
    fn took(self) -> Duration {
        Duration::from_secs_f64(self.took_ms / 1e3)
    }
}

/// Reverts a guest of so many MiB by the library, and saves it beside its image as soon as the
/// revert has ended. The guest is ended then.
pub async fn revert_and_save(
    image: &Path,
    recorded: &Path,
    mib: u64,
    placement: Placement,
    collapse: bool,
) -> Result<Measured> {
    let place = Place::new(recorded)?;
    let log = place.log();
    let mut options = RevertOptions::new(image);
    options.rewrite = place.rewrite.clone();
    options.delivery.placement = placement;
    options.delivery.working_set = false;
    options.delivery.collapse = collapse;
    let (mut beats, mut collapsed) = (0, None);
    let reverted = revert(&options, Cancellation::new(), |event| match event {
        RevertEvent::Resident { .. } => beats = log.beats().len(),
        RevertEvent::Collapsed { before_bytes, took_ms, .. } => {
            let gap_ms = longest_gap(&log, beats);
            collapsed = Some(Collapsed { before: before_bytes, took_ms, gap_ms });
        }
        _ => {}
    })
    .await?;
    let pid = reverted.pid as u32;
    let _qemu = Ended(Pidfd::open(pid)?);
    let huge = huge_bytes(pid, mib)?;
    let behind = log.beats().len();
    tokio::time::sleep(collapsed.map_or(Duration::ZERO, Collapsed::took)).await;
    let gap_after_ms = longest_gap(&log, behind);
    let (qmp, target) = (place.folder.path().join("qmp.sock"), image.with_extension("again"));
    let again = target.clone();
    let save = spawn_blocking(move || saves::ours(&qmp, &again, "none")).await??;
    std::fs::remove_file(target)?;
    let (pause_ms, moment_ms) = (save.saved.pause_ms, save.moment_ms);
    Ok(Measured { huge, collapsed, gap_after_ms, pause_ms, moment_ms })
}

/// The longest time between two heartbeats from the one of this index on.
fn longest_gap(log: &SerialLog, first: usize) -> u64 {
    let beats = log.beats();
    let gap = |pair: &[Beat]| pair[1].uptime_ms.saturating_sub(pair[0].uptime_ms);
    let seen = beats.get(first.saturating_sub(1)..).unwrap_or_default();
    seen.windows(2).map(gap).max().unwrap_or(0)
}
