//! A save under way: what every step of it needs.

use super::check::{self, ANSWER_TIMEOUT};
use super::checked::Checked;
use super::error::SaveError;
use super::event::SaveEvent;
use super::failpoints::failpoint;
use super::options::SaveOptions;
use super::settings::Settings;
use super::undo::Undo;
use crate::cancel::Cancellation;
use crate::qmp::Qmp;

/// A save under way. Each step is a method, in a file of its own.
pub(super) struct Saving<'a, F> {
    pub options: &'a SaveOptions,
    pub cancel: Cancellation,
    pub on_event: F,
    /// The guest's monitor.
    pub qmp: Qmp,
    /// What the checks found out about the guest.
    pub checked: Checked,
    /// What has been changed in the guest's QEMU.
    pub undo: Undo,
    /// Whether QEMU has been told to begin the snapshot.
    pub begun: bool,
}

impl<'a, F: FnMut(SaveEvent)> Saving<'a, F> {
    /// Connects to the guest, checks it, and writes the journal. Nothing is changed yet.
    pub async fn begin(
        options: &'a SaveOptions,
        cancel: Cancellation,
        mut on_event: F,
    ) -> Result<Saving<'a, F>, SaveError> {
        let connect_and_check = async {
            let qmp = Qmp::connect(&options.qmp, ANSWER_TIMEOUT).await?;
            if !options.no_wait {
                check::wait_complete(&qmp, || on_event(SaveEvent::Waiting)).await?;
            }
            let checked = check::ensure(&qmp, options).await?;
            Ok::<_, SaveError>((qmp, checked))
        };
        let (qmp, checked) = tokio::select! {
            ready = connect_and_check => ready?,
            () = cancel.requested() => return Err(SaveError::Interrupted),
        };
        let settings = Settings::ask(&qmp, checked.background).await?;
        let undo = Undo::begin(settings, options, &checked)?;
        failpoint("journal");
        Ok(Saving { options, cancel, on_event, qmp, checked, undo, begun: false })
    }

    /// Tells the caller of an event.
    pub fn tell(&mut self, event: SaveEvent) {
        (self.on_event)(event);
    }
}
