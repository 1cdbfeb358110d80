//! Where QEMU and what brings a guest's memory report, and how they are waited for.

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Interval;

use super::lifecycle::Told;
use crate::qmp::{Events, Qmp, QmpError};
use crate::revert::source::PostcopyEvent;

/// Where QEMU and the source report.
#[derive(Default)]
pub(super) struct Reports {
    pub events: Option<Events>,
    pub source: Option<UnboundedReceiver<PostcopyEvent>>,
    pub poll: Option<Interval>,
}

/// Waits until QEMU says that the guest runs.
pub(super) async fn resumed(events: &mut Option<Events>) -> Result<Told, QmpError> {
    let Some(events) = events else { return std::future::pending().await };
    while events.next().await?.name != "RESUME" {}
    Ok(Told::Resumed)
}

/// Waits for the next time to ask how QEMU's migration stands, and asks.
pub(super) async fn migration(
    poll: &mut Option<Interval>,
    qmp: Option<&Qmp>,
) -> Result<Told, QmpError> {
    let (Some(poll), Some(qmp)) = (poll, qmp) else { return std::future::pending().await };
    poll.tick().await;
    let status = qmp.migration_info().await?.status;
    Ok(Told::Migration(status.unwrap_or_default()))
}

/// Waits for the source's next report; nothing when there are no more.
pub(super) async fn reported(
    source: &mut Option<UnboundedReceiver<PostcopyEvent>>,
) -> Option<PostcopyEvent> {
    match source {
        Some(source) => source.recv().await,
        None => std::future::pending().await,
    }
}
