//! A guest whose snapshot is still in a repository: its disks are served, and filled once its memory is
//! in place.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::error::RevertError;
use super::event::{OnEvent, RevertEvent};
use super::options::RevertOptions;
use super::session::Resident;
use crate::failpoint::failpoint;
use crate::far::FarSnapshot;
use crate::guest::FarDisks;
use crate::image::Image;
use crate::memory::FillDelay;

/// For how long filling waits, unless it is told otherwise, for each MiB that is not here yet: meanwhile
/// the way from the repository is the guest's alone, whose faults come in bursts. At 200 MB/s it is less
/// than a fifth of the time that its download takes: each moment that filling waits is one more at the
/// end.
const HOLD_PER_MIB: Duration = Duration::from_micros(900);
/// The least of it, and the most: by then what the guest needs to go on is there.
const HOLD: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(2);

/// How long QEMU may take to answer while its disks follow: one that was told to stop its guest answers
/// only once the disks' requests are done, which may wait for the store.
const PATIENCE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The image of a revert, wherever it is.
///
/// # Errors
/// When it can't be opened.
pub(super) fn image(options: &RevertOptions) -> Result<Arc<Image>, RevertError> {
    match &options.far {
        Some(far) => Ok(Arc::clone(far.image())),
        None => Ok(Image::open(&options.image)?),
    }
}

/// The options with what differs for a snapshot that is far away.
///
/// # Errors
/// When its disks can't be served.
pub(super) fn prepared(options: &RevertOptions) -> Result<RevertOptions, RevertError> {
    let mut options = options.clone();
    let Some(far) = &options.far else { return Ok(options) };
    options.rewrite.add_profile(far.profile())?;
    options.delivery.working_set_file.get_or_insert_with(|| far.working_set());
    let delivery = &mut options.delivery;
    if delivery.fill_delay.is_none() {
        // Not ended by a quiet moment: what comes next would wait behind all that filling has asked for.
        delivery.fill_delay = Some(FillDelay::Fixed { fixed: hold(far.missing()) });
    }
    // In a sandbox nobody reaches the repository.
    options.sandbox = None;
    if !far.disks().is_empty() {
        let socket = far.serve_disks().map_err(RevertError::Disks)?;
        let names = far.disks().iter().map(|disk| (disk.path.clone(), disk.export.clone()));
        options.rewrite.overlays.far = Some(FarDisks { socket, names: names.collect() });
    }
    Ok(options)
}

/// For how long filling is held back, where so many bytes are to be fetched.
fn hold(missing: u64) -> Duration {
    let mib = u32::try_from(missing >> 20).unwrap_or(u32::MAX);
    HOLD_PER_MIB.saturating_mul(mib).clamp(*HOLD.start(), *HOLD.end())
}

/// Brings what is missing of the guest's disks into these overlays. It runs meanwhile, and needs nobody
/// afterwards.
///
/// # Errors
/// When QEMU fails to.
pub(super) async fn fill_disks(
    resident: &mut Resident,
    far: &FarSnapshot,
    overlays: &[PathBuf],
    on_event: OnEvent<'_>,
) -> Result<(), RevertError> {
    let Some(qmp) = resident.monitor().await else { return Ok(()) };
    let qmp = qmp.with_timeout(PATIENCE);
    failpoint("revert-before-disks");
    let began = Instant::now();
    let nodes = qmp.block_nodes().await?;
    let follow = async {
        for overlay in overlays {
            let node =
                nodes.iter().find(|node| node.driver == "qcow2" && is_on(&node.file, overlay));
            // Gone meanwhile: unplugged, or streamed by somebody else.
            let Some(node) = node else { continue };
            qmp.stream(&node.name).await?;
        }
        Ok::<_, RevertError>(())
    };
    resident.while_disks_follow(&qmp, far.answering(), follow, on_event).await?;
    resident.has_disks();
    let took_ms = began.elapsed().as_secs_f64() * 1e3;
    on_event(RevertEvent::DisksResident { took_ms, fetched_bytes: far.fetched() });
    Ok(())
}

/// Whether a node is on a file, by what QEMU calls the node's file: its path, or, where the node has
/// options that a path can't tell, `json:` and these.
fn is_on(called: &str, file: &Path) -> bool {
    let Some(options) = called.strip_prefix("json:") else { return Path::new(called) == file };
    let options: Value = serde_json::from_str(options).unwrap_or_default();
    options["file"]["filename"].as_str().is_some_and(|path| Path::new(path) == file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filling_is_held_back_by_what_is_to_be_fetched() {
        let milliseconds = |missing| hold(missing).as_millis();
        assert_eq!([0, 512 << 20, 1 << 30].map(milliseconds), [100, 460, 921]);
        assert_eq!([64 << 30, u64::MAX].map(milliseconds), [2000, 2000]);
    }

    #[test]
    fn a_node_is_found_by_its_file_however_qemu_calls_it() {
        let file = Path::new("/d/a.qcow2");
        assert!(is_on("/d/a.qcow2", file) && !is_on("/d/b.qcow2", file));
        let options = r#"json:{"backing": {"driver": "qcow2"}, "driver": "qcow2", "file":
            {"driver": "file", "filename": "/d/a.qcow2"}}"#;
        assert!(is_on(options, file) && !is_on(options, Path::new("/d")) && !is_on("json:{", file));
    }
}
