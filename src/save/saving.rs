//! A save under way: what every step of it needs.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::access::Access;
use super::check;
use super::checked::Checked;
use super::devices::DeviceState;
use super::direct::{Places, Unchanged};
use super::error::SaveError;
use super::event::{OnEvent, SaveEvent};
use super::forking::Forking;
use super::options::SaveOptions;
use super::parent_tracker::Since;
use super::settings::Settings;
use super::undo::Undo;
use crate::cancel::Cancellation;
use crate::failpoint::failpoint;
use crate::keeper::{Held, Keeper, if_started};

/// A save under way. Each step is a method, in a file of its own.
pub(super) struct Saving<'a> {
    pub options: &'a SaveOptions,
    pub cancel: Cancellation,
    pub on_event: OnEvent<'a>,
    /// The guest's monitor, and libvirt where it has the guest.
    pub access: Access,
    /// What the checks found out about the guest.
    pub checked: Checked,
    /// What has been changed in the guest's QEMU.
    pub undo: Undo,
    /// Where memory can be read from outside.
    pub places: Option<Places>,
    /// How it is found out what differs from the parent.
    pub since: Since,
    /// What is known not to, once the guest stands still.
    pub unchanged: Arc<OnceLock<Unchanged>>,
    /// The state of the devices, at the moment or ready to be asked for.
    pub devices: Option<DeviceState>,
    /// Where there are to be clones.
    pub forking: Option<Forking>,
    /// Cleans up should this process be killed. Told last that this needs nobody.
    keeper: Option<Keeper>,
    /// Whether QEMU has been told to begin the snapshot.
    pub begun: bool,
}

impl<'a> Saving<'a> {
    /// Connects to the guest, checks it, and writes the journal. Nothing is changed yet.
    pub async fn begin(
        options: &'a SaveOptions,
        cancel: Cancellation,
        on_event: OnEvent<'a>,
    ) -> Result<Saving<'a>, SaveError> {
        let connect_and_check = async {
            let access = Access::open(&options.guest, Duration::ZERO).await?;
            if !options.no_wait {
                check::wait_complete(&access.qmp, || on_event(SaveEvent::Waiting)).await?;
            }
            let checked = check::ensure(&access, options).await?;
            Ok::<_, SaveError>((access, checked))
        };
        let (access, checked) = tokio::select! {
            ready = connect_and_check => ready?,
            () = cancel.requested() => return Err(SaveError::Interrupted),
        };
        let settings = Settings::ask(&access.qmp, checked.background).await?;
        let undo = Undo::begin(settings, options, &checked)?;
        let mut keeper = options.keeper.clone().map(Keeper::start).and_then(if_started);
        // Nothing is changed before there is somebody to undo it.
        keeper.iter_mut().for_each(Keeper::wait_started);
        failpoint("journal");
        Ok(Saving {
            options,
            cancel,
            on_event,
            access,
            checked,
            undo,
            places: None,
            since: Since::NoParent,
            unchanged: Arc::default(),
            devices: None,
            forking: None,
            keeper,
            begun: false,
        })
    }

    /// Has the keeper read on from `stream` should this process be killed.
    pub fn keep(&mut self, stream: BorrowedFd<'_>) {
        let Some(keeper) = &mut self.keeper else { return };
        keeper.wait_started();
        if let Err(error) = keeper.holder().hold(Held::Stream, stream) {
            tracing::warn!("the keeper can't hold the migration stream: {error}");
        }
    }

    /// Tells the caller of an event.
    pub fn tell(&mut self, event: SaveEvent) {
        (self.on_event)(event);
    }
}
